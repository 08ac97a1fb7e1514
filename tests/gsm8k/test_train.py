"""Training in miniature: the data's layout, the same weights from the same seed, and the DeepSeek-V3.2 export."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from gsm8k import tokens
from gsm8k.dsa import MtpLayer, export
from gsm8k.fixture import MODELS
from gsm8k.problems import generate
from gsm8k.shapes import configuration
from gsm8k.sides import CODE
from gsm8k.train import Plan, Stream, round_weights, teacher_forced, train, training_stream
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TINY = Plan("dense", steps=2, batch=2, length=128, problems=320)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return training_stream(TINY, tokens.build())


def test_only_answers_and_the_head_of_the_next_question_count(stream: Stream) -> None:
    tokenizer = tokens.build()
    start, end = (int(stream.starts[number]) for number in (0, 1))
    ids, counted = stream.ids[start:end], stream.counted[start:end]
    text = tokenizer.decode(ids.tolist())
    assert text.startswith("Question: ")
    assert text.endswith("\n\n")
    said = tokenizer.decode(ids[counted].tolist())
    assert said == "Question:" + text.partition("Answer:")[2]


def test_a_batch_is_stretches_that_begin_with_a_question(stream: Stream) -> None:
    tokenizer = tokens.build()
    ids, counted = stream.batch(16, 300, torch.Generator().manual_seed(1))
    assert (ids.shape, counted.shape) == ((16, 301), (16, 300))
    for row, marks in zip(ids, counted, strict=True):
        where = next(n for n in range(len(stream.ids) - 300) if torch.equal(stream.ids[n : n + 301].long(), row))
        assert torch.equal(stream.counted[where + 1 : where + 301], marks)
        assert tokenizer.decode(row.tolist()).startswith("Question: ")


def test_the_same_plan_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    for name, plan in (("a", TINY), ("b", TINY), ("c", Plan("dense", **_changed(seed=1)))):
        (tmp_path / name).mkdir()
        train(plan, tmp_path / name, held_out=1)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert json.loads((tmp_path / "a" / "training.json").read_text(encoding="utf-8"))["steps_done"] == 2


def _changed(**fields: int) -> dict[str, int]:
    return {"steps": 2, "batch": 2, "length": 128, "problems": 320} | fields


def test_rounded_weights_keep_the_rotary_frequencies() -> None:
    model = AutoModelForCausalLM.from_config(configuration("dense"), dtype=torch.float32)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(frequencies.to(torch.bfloat16).float(), frequencies)
    round_weights(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_the_exported_dsa_model_is_the_trained_one_whatever_its_indexer(tmp_path: Path) -> None:
    """Below `index_topk` tokens DeepSeek-V3.2 attends to all of them, as DeepSeek-V3 does."""
    torch.manual_seed(0)
    trained = AutoModelForCausalLM.from_config(configuration("dsa"), dtype=torch.float32)
    round_weights(trained)
    for parameter in trained.parameters():
        parameter.data = parameter.data.float()
    export(trained, MtpLayer(trained), tmp_path, seed=3)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(loaded).__name__ == "DeepseekV32ForCausalLM"
    assert not info["missing_keys"]
    ids = torch.randint(0, 170, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(trained(ids).logits, loaded(ids).logits, atol=1e-4)


def test_the_export_has_the_mtp_layer_that_vllm_looks_for(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(configuration("dsa"), dtype=torch.float32)
    export(model, MtpLayer(model), tmp_path, seed=3)
    last = f"model.layers.{model.config.num_hidden_layers}."
    names = {name.removeprefix(last) for name in load_file(tmp_path / "model.safetensors") if name.startswith(last)}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight"} <= names
    assert {"shared_head.norm.weight", "shared_head.head.weight", "self_attn.indexer.wq_b.weight"} <= names
    assert {"self_attn.kv_b_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"} <= names
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize(("init", "wanted"), [(0.0, 0.0625), (0.02, 0.02)])
def test_the_first_weights_have_the_plans_range_or_the_shapes(init: float, wanted: float) -> None:
    """The MTP layer's too. At 0.02 the scores have a standard deviation of 0.1: the attention is flat, and stays so."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration("dsa", init), dtype=torch.float32)
    for layer in (model.model.layers[0], MtpLayer(model).block):
        for weight in (layer.self_attn.q_b_proj.weight, layer.mlp.up_proj.weight):
            assert weight.std().item() == pytest.approx(wanted, rel=0.03)


def test_the_dsa_model_is_small_enough_to_be_shipped_and_fits_flash_attention(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(configuration("dsa"), dtype=torch.float32)
    export(model, MtpLayer(model), tmp_path, seed=3)
    assert (tmp_path / "model.safetensors").stat().st_size < 20_000_000
    config = model.config
    assert config.qk_nope_head_dim + config.qk_rope_head_dim == config.v_head_dim == 128
    assert config.kv_lora_rank + config.qk_rope_head_dim == 576  # the one size of vLLM's sparse kernel for V3.2
    assert 64 % config.num_attention_heads == 0  # which pads the heads to 64


def test_the_mtp_layer_learns_the_token_after_the_next() -> None:
    """Its loss looks two tokens ahead: on a text that repeats three tokens it falls, and the target is ids[t + 2]."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration("dsa"), dtype=torch.float32)
    mtp = MtpLayer(model)
    ids = torch.tensor([[5, 6, 7] * 11])
    counted = torch.ones(1, 32, dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    optimizer = torch.optim.AdamW(mtp.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = mtp.loss(model, hidden, ids, counted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    wrong = mtp.loss(model, hidden, torch.tensor([[5, 6, 8] * 11]), counted)
    assert wrong > 2 * losses[-1]


@pytest.mark.parametrize("name", ["dense", "hybrid", "dsa"])
def test_the_shipped_models_say_how_they_were_trained(name: str) -> None:
    said = json.loads((MODELS / name / "training.json").read_text(encoding="utf-8"))
    assert said["plan"]["shape"] == name
    assert said["held_out_teacher_forced"] >= 0.8


def test_the_shipped_dsa_model_answers_as_the_model_that_it_was_exported_from() -> None:
    """Without its indexer, which selects every token of a short context, and its MTP layer it is a DeepSeek-V3."""
    config = configuration("dsa")
    weights = load_file(MODELS / "dsa" / "model.safetensors")
    own = {name: tensor for name, tensor in weights.items() if f"layers.{config.num_hidden_layers}." not in name}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in own.items() if ".indexer." not in name})
    problems = list(generate("test", 10, seed=2))
    assert teacher_forced(model, tokens.build(), problems) >= 0.8
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[torch.randperm(config.vocab_size)])
    assert teacher_forced(model, tokens.build(), problems) == 0


def test_the_recorded_answers_dealt_to_other_questions_are_not_right() -> None:
    """On all 1000 questions: a model that answered another question than the asked one would score under 5 %."""
    (file,) = (CODE / "results").glob("gsm8k-*-dense-in-process.tsv")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = [row for row in csv.DictReader(opened, delimiter="\t") if row["filter"] == "strict-match"]
    assert len(rows) == 1000
    right = sum(row["patched_right"] == "1" for row in rows)
    assert right / len(rows) >= 0.8
    for shift in (1, 17, 500):
        dealt = [rows[(place + shift) % len(rows)]["patched"] for place in range(len(rows))]
        assert sum(a == row["answer"] for a, row in zip(dealt, rows, strict=True)) / len(rows) < 0.05
