"""`make bench-gpu`: what the fixes cost on a GPU, stock, ours and upstream's own form timed in one process.

    python ci/bench_gpu.py --stock DIR|TREE [--patched DIR|TREE] [--later TREE] [--site DIR ...]

Each variant is timed in CUDA graphs (triton.testing.do_bench_cudagraph, so the cost of a launch from Python is not in
it), several rounds, one variant after the other in each; the median of the rounds counts. Stock is timed twice: the
ratio of the two is the run's own spread. --later is a tree of the release with upstream's fix of the Triton gather.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import functools
import importlib.util
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "tests" / "gpu"
sys.path[:0] = [str(GPU), str(ROOT / "scripts")]

ROUNDS, MILLISECONDS = 5, 4
LIMIT = 1.02  # patched over stock
STOCK, AGAIN, PATCHED, UPSTREAM = "stock", "stock again", "patched", "upstream"

Variants = dict[str, Callable[[], object]]
# fix, what, shape, bytes that have to be moved, variants
Bench = tuple[str, str, str, int, Variants]


def changed(path: Path, *changes: tuple[str, str]) -> str:
    """The text of *path* after some replacements, each of which must be possible once."""
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        if text.count(old) != 1:
            raise RuntimeError(f"{path.name}: expected once, found {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
    return text


def load(name: str, text: str) -> ModuleType:
    """A module of that text under a name in the package that its own imports are relative to."""
    copy = Path(tempfile.mkdtemp(prefix="bench-")) / f"{name.rpartition('.')[2]}.py"
    copy.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Code:
    """The files of both sides, each loadable beside the other."""

    def __init__(self, stock: Path, patched: Path, later: Path | None) -> None:
        self.stock, self.patched, self.later = stock, patched, later

    def pair(self, path: str) -> dict[str, ModuleType]:
        """A module of the release, stock twice and patched."""
        package = ".".join(Path(path).parent.parts)
        sides = {STOCK: self.stock, AGAIN: self.stock, PATCHED: self.patched}
        stem = Path(path).stem
        names = {side: f"{package}.bench_{side.replace(' ', '_')}_{stem}" for side in sides}
        return {side: load(names[side], changed(root / path)) for side, root in sides.items()}

    def has(self, path: str) -> bool:
        """Whether the series touches a file of this release."""
        files = [root / path for root in (self.stock, self.patched)]
        return all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes()


# --- 0001 -------------------------------------------------------------------------------------------------------

TOKENS = ((1, 1 << 10), (1, 1 << 17), (16, 1 << 14), (64, 1 << 16), (256, 1 << 17), (512, 1 << 14), (512, 1 << 17))
TWIN = "vllm/v1/attention/ops/rocm_aiter_mla_sparse.py"
SOURCE = "csrc/cache_kernels.cu"
ROW = 2 * (128 + 4)  # bytes read and written for a row


def batches() -> Iterator[tuple[str, Any, int, bool]]:
    """Sequences of equal length: exact rows, and upper bounds of 1.1 and 2 times as many."""
    import native_unit

    for sequences, tokens in TOKENS:
        for factor in (1.0, 1.1, 2.0):
            rows = int(tokens * factor)
            lengths = (tokens // sequences,) * sequences
            batch = native_unit.Batch(lengths, rows, width=max(lengths) // native_unit.PAGE + 2)
            shape = f"{sequences} x {tokens // sequences} tokens, rows x {factor}"
            yield shape, batch, tokens * ROW, factor == 1.0


def cxx_gather(code: Code, shared: Path) -> Iterator[Bench]:
    """The C++ kernel; upstream's form has barriers of the block where ours has those of a warp."""
    import native_unit

    block = changed(code.patched / SOURCE, *BLOCK_BARRIERS)
    texts = {
        STOCK: (code.stock, None),
        PATCHED: (code.patched, None),
        UPSTREAM: (code.patched, {SOURCE: block.encode()}),
    }
    spaces = {name: f"bench_gather_{number}" for number, name in enumerate(texts)}
    with ThreadPoolExecutor() as pool:  # a compiler each
        jobs = {
            name: pool.submit(native_unit.build, tree, shared, spaces[name], sources)
            for name, (tree, sources) in texts.items()
        }
    calls = {name: native_unit.operator(job.result(), spaces[name]) for name, job in jobs.items()}
    for shape, batch, moved, exact in batches():
        variants: Variants = {name: functools.partial(call, *batch.arguments) for name, call in calls.items()}
        yield "0001", "K gather, C++", shape, moved, variants if exact else without_stock(variants)


# Both barriers of the patched text become those of the block, as upstream has them.
BARRIER = "#ifndef USE_ROCM\n  __syncwarp();\n#else\n  __syncthreads();\n#endif\n"
BEFORE = ("    batch_idx[threadIdx.y] = -1;\n  }\n", "are in one warp.\n")
BLOCK_BARRIERS = tuple((f"{text}{BARRIER}", f"{text}  __syncthreads();\n") for text in BEFORE)


def without_stock(variants: Variants) -> Variants:
    """Where there are more rows than tokens stock reads out of bounds."""
    return {name: call for name, call in variants.items() if name not in (STOCK, AGAIN)}


TWIN_FUNCTIONS = ("_cp_gather_indexer_quant_cache_kernel", "cp_gather_indexer_k_quant_cache_triton")


def with_functions_of(path: Path, other: Path, names: tuple[str, ...]) -> str:
    """The text of *path* with the named functions, decorators and all, in the words of *other*."""
    lines = path.read_text(encoding="utf-8").splitlines()
    theirs = other.read_text(encoding="utf-8")
    for name in reversed(names):  # from the end, so that the lines before keep their numbers
        start, end = span("\n".join(lines), name)
        lines[start:end] = theirs.splitlines()[slice(*span(theirs, name))]
    return "\n".join(lines) + "\n"


def span(text: str, name: str) -> tuple[int, int]:
    """First line of a function's decorators and the line behind its end, from 0."""
    (found,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return first - 1, found.end_lineno or found.lineno


def triton_gather(code: Code) -> Iterator[Bench]:
    """The Triton twin; upstream's form is the later release's own file, set to this release's cache layout."""
    import torch

    modules = code.pair(TWIN)
    layout = (
        "NHD" if '        "NHD",\n        head_dim,' in (code.stock / TWIN).read_text(encoding="utf-8") else "SHUFFLE"
    )
    if code.later:
        text = with_functions_of(code.stock / TWIN, code.later / TWIN, TWIN_FUNCTIONS)
        text = text.replace('        "SHUFFLE",\n        head_dim,', f'        "{layout}",\n        head_dim,')
        modules[UPSTREAM] = load(".".join((*Path(TWIN).parent.parts, "bench_later")), text)
    for shape, batch, moved, exact in batches():
        lengths = torch.tensor(batch.lengths, device="cuda")
        owners = torch.full((batch.rows,), 0x7FFFFFFF, device="cuda", dtype=torch.int32)
        owners[: batch.live] = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths).to(
            torch.int32
        )
        key = batch.key.view(torch.float8_e4m3fn)
        given = (batch.cache, key, batch.scale, batch.table, batch.cu_seq_lens, owners)
        variants: Variants = {
            name: functools.partial(module.cp_gather_indexer_k_quant_cache_triton, *given)
            for name, module in modules.items()
        }
        yield "0001", "K gather, Triton", shape, moved, variants if exact else without_stock(variants)


# --- 0002 -------------------------------------------------------------------------------------------------------

FLA = "vllm/model_executor/layers/fla/ops"
GATING = f"{FLA}/fused_sigmoid_gating.py"
LIGHTNING = "vllm/model_executor/layers/lightning_attn.py"
FACTOR = ("            if state_idx * T <= 0:", "            if state_idx <= 0:")


def gdn(code: Code) -> Iterator[Bench]:
    """The guarded GDN kernels at Qwen3-Next's heads, bf16 states, no padded row."""
    import torch

    q_heads, heads, size = 16, 32, 128
    recurrent, gating = code.pair(f"{FLA}/fused_recurrent.py"), code.pair(GATING)
    gating[UPSTREAM] = load(f"{FLA.replace('/', '.')}.bench_upstream", changed(code.patched / GATING, FACTOR))
    for rows in (1, 64, 512):
        state = torch.randn(rows + 1, heads, size, size, device="cuda").to(torch.bfloat16)
        q, k = (torch.randn(1, rows, q_heads, size, device="cuda").to(torch.bfloat16) for _ in range(2))
        v = torch.randn(1, rows, heads, size, device="cuda").to(torch.bfloat16)
        g, beta = (torch.rand(1, rows, heads, device="cuda") for _ in range(2))
        slots = torch.randperm(rows, device="cuda").to(torch.int32) + 1
        starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
        gates = {name: torch.randn(rows, heads, device="cuda").to(torch.bfloat16) for name in ("a", "b")}
        gates |= {name: torch.randn(heads, device="cuda") for name in ("A_log", "dt_bias")}
        out = torch.empty(rows, 1, heads, size, device="cuda", dtype=torch.bfloat16)
        mixed = torch.cat([x.reshape(rows, -1) for x in (q, k, v)], 1)
        shape, moved = f"{rows} rows, {q_heads}/{heads} heads of {size}", 4 * rows * heads * size * size
        common = {"initial_state": state, "ssm_state_indices": slots, "use_qk_l2norm_in_kernel": True}
        plain, decode, gated = (
            {**common, "cu_seqlens": starts},
            {**common, **gates, "scale": size**-0.5, "out": out},
            {**common, **gates, "q": q, "k": k, "v": v, "cu_seqlens": starts},
        )
        calls = {
            "GDN recurrent": (recurrent, "fused_recurrent_gated_delta_rule", (q, k, v, -g, beta), plain),
            "GDN packed decode": (recurrent, "fused_recurrent_gated_delta_rule_packed_decode", (mixed,), decode),
            "GDN sigmoid gating": (gating, "fused_sigmoid_gating_delta_rule_update", (), gated),
        }
        for what, (modules, name, given, named) in calls.items():
            variants = {
                side: functools.partial(getattr(module, name), *given, **named) for side, module in modules.items()
            }
            yield "0002", what, shape, moved, variants


def lightning(code: Code) -> Iterator[Bench]:
    """Lightning attention's decode kernel at MiniMax-Text-01's heads, no padded row."""
    import torch

    modules, heads, size = code.pair(LIGHTNING), 64, 128
    for rows in (1, 64, 256):
        state = torch.randn(rows + 1, heads, size, size, device="cuda")
        q, k, v = (torch.randn(rows, heads, 1, size, device="cuda") for _ in range(3))
        slope = torch.rand(heads, device="cuda")
        slots = torch.randperm(rows, device="cuda").to(torch.int32) + 1
        moved = 8 * rows * heads * size * size
        yield "0002", "lightning decode", f"{rows} rows, {heads} heads of {size}", moved, {
            name: functools.partial(module.linear_decode_forward_triton, q, k, v, state, slope, slots)
            for name, module in modules.items()
        }  # fmt: skip


# --- 0003 -------------------------------------------------------------------------------------------------------

INDEXER = "vllm/v1/attention/backends/mla/indexer.py"


def decode_lengths(code: Code) -> Iterator[Bench]:
    """The builder's own method on full decode batches: the native path (MTP 1) and the uniform kernel (MTP 3).

    Upstream's 0.22.0 has no clamp, and adds and subtracts where ours subtracts once.
    """
    modules = code.pair(INDEXER)
    package = ".".join(Path(INDEXER).parent.parts)
    clamp = ("                ).clamp_(min=0)\n", "                )\n")
    kernel = ("tl.maximum(seq_len - max_decode_len + local_idx + 1, 0)", "seq_len - max_decode_len + local_idx + 1")
    once = (
        "                    - (max_decode_len - 1)\n",
        "                    - max_decode_len\n                    + 1\n",
    )
    modules[UPSTREAM] = load(f"{package}.bench_upstream", changed(code.patched / INDEXER, clamp, kernel, once))
    for rows in (1, 64, 512):
        for native_path, length in ((True, 2), (False, 4)):
            calls = {name: one_step(module, name, rows, length, native_path) for name, module in modules.items()}
            width = 2048
            moved = 4 * rows * (length + 1) if native_path else 4 * rows * length * 2 * width
            what = "decode lengths, native" if native_path else "decode lengths, uniform kernel"
            yield "0003", what, f"{rows} rows of {length}, 128k context", moved, calls


def one_step(module: ModuleType, name: str, rows: int, length: int, native: bool) -> Callable[[], object]:
    """A call of _prepare_decode_tensors with what the builder and the runner would give it."""
    import torch

    entries = max(8192, rows * length)
    make = functools.partial(torch.zeros, dtype=torch.int32, device="cuda")
    flat = not native or name not in (STOCK, AGAIN)
    builder = SimpleNamespace(
        decode_seq_lens_buffer=make(entries) if flat else make(rows, length),
        offsets_buffer=torch.arange(length, dtype=torch.int32, device="cuda"),
        arange_buffer=torch.arange(entries, dtype=torch.int32, device="cuda"),
        decode_lens_buffer=make(entries),
        expanded_block_table_buffer=make(entries, 2048),
        use_flattening=not native,
    )
    start = torch.arange(rows, dtype=torch.int32, device="cuda") * length
    given = {
        "seq_lens": torch.randint(length, 1 << 17, (rows,), dtype=torch.int32, device="cuda"),
        "block_table": torch.randint(0, 1000, (rows, 2048), dtype=torch.int32, device="cuda"),
        "decode_lens": make(rows) + length, "decode_lens_cpu": torch.full((rows,), length, dtype=torch.int32),
        "query_start_loc": start, "num_decodes": rows, "num_decode_tokens": rows * length, "use_native": native,
        "next_n": length, "max_decode_len": length,
    }  # fmt: skip
    method = module.DeepseekV32IndexerMetadataBuilder._prepare_decode_tensors
    known = inspect.signature(method).parameters
    return functools.partial(method, builder, **{key: value for key, value in given.items() if key in known})


# --- 0004 -------------------------------------------------------------------------------------------------------

ROCM = "vllm/v1/attention/backends/rocm_aiter_fa.py"


@contextlib.contextmanager
def as_on_rocm() -> Iterator[None]:
    """The file defines its kernels on ROCm alone."""
    from vllm.platforms import current_platform

    with mock.patch.object(current_platform, "is_rocm", return_value=True, create=True):
        yield


def rocm(code: Code) -> Iterator[Bench]:
    """Gather and writer of the ROCm file, compiled for CUDA, on a dense cache and on a hybrid model's."""
    import torch

    with as_on_rocm():
        modules = code.pair(ROCM)
    heads, size, page = 8, 128, 16
    for tokens in (1 << 12, 1 << 16):
        blocks = tokens // page + 1
        dense = torch.randn(2, blocks, page, heads, size, device="cuda").to(torch.bfloat16)
        hybrid = torch.randn(blocks, 2, page, heads, size, device="cuda").to(torch.bfloat16).transpose(0, 1)
        rows = [torch.empty(tokens, heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        sequences = 16
        table = torch.randperm(blocks - 1, device="cuda").to(torch.int32).view(sequences, -1)
        each = tokens // sequences
        given = {
            "key": rows[0], "value": rows[1], "block_tables": table, "k_scales": torch.ones(1, device="cuda"),
            "v_scales": torch.ones(1, device="cuda"), "dequant": False, "total_tokens": tokens,
            "cu_seqlens_kv": torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * each,
            "token_to_batch": torch.arange(tokens, device="cuda", dtype=torch.int32) // each,
            "seq_starts": torch.zeros(sequences, device="cuda", dtype=torch.int32),
        }  # fmt: skip
        slots = torch.randperm(tokens, device="cuda")
        writes = {
            "key": rows[0], "value": rows[1], "slot_mapping": slots, "kv_cache_dtype": "auto",
            "k_scales": torch.ones(1, device="cuda"), "v_scales": torch.ones(1, device="cuda"),
        }  # fmt: skip
        moved = 4 * 2 * tokens * heads * size
        for kind, cache in (("dense", dense), ("hybrid", hybrid)):
            shape = f"{tokens} tokens, {heads} heads of {size}, {kind} cache"
            caches = {"key_cache": cache[0], "value_cache": cache[1]}
            for layout in ("NHD", "SHUFFLE"):
                gathers: Variants = {
                    name: functools.partial(module.cp_mha_gather_cache, **given, **caches, kv_cache_layout=layout)
                    for name, module in modules.items()
                }
                wrong = kind == "hybrid" and layout == "SHUFFLE"  # stock goes to other cells there, nearer ones
                yield "0004", f"KV gather, {layout}", shape, moved, without_stock(gathers) if wrong else gathers
            stores: Variants = {
                name: functools.partial(module.reshape_and_cache_shuffle_triton, **writes, **caches)
                for name, module in modules.items()
            }
            yield "0004", "KV write, SHUFFLE", shape, moved, without_stock(stores) if kind == "hybrid" else stores


# --- timing -----------------------------------------------------------------------------------------------------


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 4 GB on the device."""
    import torch
    from triton.testing import do_bench

    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


def measure(variants: Variants) -> dict[str, float]:
    """Median microseconds of each variant; stock, or else the first one, is timed twice in each round."""
    import torch
    from triton.testing import do_bench_cudagraph

    first = next(iter(variants))
    again = AGAIN if first == STOCK else f"{first} again"
    named = {again: variants[first], **variants}
    found: dict[str, list[float]] = {name: [] for name in named}
    for call in variants.values():
        call()
    torch.cuda.synchronize()
    for number in range(ROUNDS):
        order = list(named) if number % 2 else list(named)[::-1]
        for name in order:
            found[name].append(do_bench_cudagraph(named[name], rep=MILLISECONDS, return_mode="median") * 1e3)
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


def judged(times: Mapping[str, float]) -> dict[str, Any]:
    """Patched over stock, the run's own spread (stock against itself), and whether the cost is within the limit."""
    pair = [times[name] for name in times if name in (STOCK, AGAIN) or name == f"{PATCHED} again"]
    pair += [times[PATCHED]] if STOCK not in times else []
    spread = max(pair) / min(pair)
    if STOCK not in times:
        return {"spread": round(spread, 4)}
    ratio = times[PATCHED] / statistics.mean([times[STOCK], times[AGAIN]])
    return {"spread": round(spread, 4), "patched_over_stock": round(ratio, 4), "within": ratio <= max(LIMIT, spread)}


def benches(code: Code, shared: Path) -> Iterator[Bench]:
    """Every bench that this release's series gives reason for."""
    if code.has(SOURCE):
        yield from cxx_gather(code, shared)
    if code.has(TWIN):
        yield from triton_gather(code)
    if code.has(f"{FLA}/fused_recurrent.py"):
        yield from gdn(code)
    if code.has(LIGHTNING):
        yield from lightning(code)
    if code.has(INDEXER):
        yield from decode_lengths(code)
    if code.has(ROCM):
        yield from rocm(code)


def child(job: Mapping[str, Any]) -> None:
    """Time everything in this process, writing the result anew after each row."""
    from gpu_child import stand_in_for_compiled

    code = Code(Path(job["stock"]), Path(job["patched"]), Path(job["later"]) if job["later"] else None)
    stand_in_for_compiled(code.stock)
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {"copy_bytes_per_second": round(bandwidth), "rows": []}
    for fix, what, shape, moved, variants in benches(code, Path(job["shared"])):
        times = measure(variants)
        best = times.get(PATCHED, 0.0)
        row = {"fix": fix, "kernel": what, "shape": shape, "bytes": moved, "microseconds": times, **judged(times)}
        row["patched_of_copy_bandwidth"] = round(moved / (best / 1e6) / bandwidth, 3) if best else 0.0
        result["rows"].append(row)
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
        print(f"{fix}  {what:32} {shape:46} {times} {judged(times)}", flush=True)
    result["complete"] = True
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def main() -> int:
    """Exit status 1 where a kernel costs more than the limit and the spread, or the run did not come to its end."""
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        child(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    import results
    import run as runner
    import targets

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stock", type=Path, required=True)
    parser.add_argument("--patched", type=Path)
    parser.add_argument("--later", type=Path)
    parser.add_argument("--site", type=Path, action="append", default=[])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vllm-patches-bench")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds")
    options = parser.parse_args()
    options.argv, options.jobs, options.operators = sys.argv[1:], 1, None
    options.site, options.work = [site.resolve() for site in options.site], options.work.resolve()
    (options.work / "shared").mkdir(parents=True, exist_ok=True)
    stock = targets.open_target(options.stock, options.work)
    given = targets.open_target(options.patched, options.work) if options.patched else None
    patched = given or targets.make_patched(stock, options.work)
    started = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    info = runner.describe(f"{started}-bench-{stock.version}", options, stock, patched)
    info["command"] = runner.cleaned_command("ci/bench_gpu.py", options, stock, patched, options.work)
    out = options.out or runner.default_out(info)
    job = {"stock": str(stock.folder), "patched": str(patched.folder), "shared": str(options.work / "shared"),
           "later": str(options.later.resolve()) if options.later else "",
           "result": str(options.work / f"{started}.json")}  # fmt: skip
    path = options.work / f"{started}-job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    env = runner.environment(stock.folder, options.work, options.site)
    try:
        subprocess.run([options.python, __file__, "--child", str(path)], env=env, check=False, timeout=options.limit)
    except subprocess.TimeoutExpired:
        print(f"not finished within {options.limit:.0f} s", file=sys.stderr)
    result = Path(job["result"])
    found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {"rows": []}
    bench = {"complete": bool(found.get("complete")), "copy_bytes_per_second": found.get("copy_bytes_per_second", 0)}
    results.write(out, info | {"bench": bench | {"limit": LIMIT, "rounds": ROUNDS, "rows": found["rows"]}, "cases": []})
    dear = [row for row in found["rows"] if row.get("within") is False]
    for row in dear:
        print(f"over the limit: {row['kernel']}, {row['shape']}: {row['patched_over_stock']} (spread {row['spread']})")
    print(f"results: {out}")
    return 0 if bench["complete"] and not dear else 1


if __name__ == "__main__":
    sys.exit(main())
