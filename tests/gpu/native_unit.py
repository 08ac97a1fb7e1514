"""csrc/cache_kernels.cu of a tree, built by the tool's own code for this machine, and the operator in it called."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

from gpu_case import Defect, expect  # noqa: E402

SOURCE = "csrc/cache_kernels.cu"
OPERATOR = "cp_gather_indexer_k_quant_cache"
SCHEMA = f"{OPERATOR}(Tensor kv_cache, Tensor! dst_k, Tensor! dst_scale, Tensor block_table, Tensor cu_seq_lens) -> ()"
UNTOUCHED = 0xAA
_KEPT: list[Any] = []  # a torch Library takes its definitions back when it is collected
HEAD, PAGE = 128, 64  # bytes of a key (fp8, one scale of 4 bytes for all of it), tokens of a block
CUDA = Path("/usr/local/cuda/bin")

POISON = r"""
__global__ void fill(int value) {
  extern __shared__ int words[];
  for (int i = threadIdx.x; i < SIZE / 4; i += blockDim.x) ((volatile int*)words)[i] = value;
}
extern "C" int poison(int value) {
  cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, SIZE);
  for (int round = 0; round < 4; round++) fill<<<1024, 256, SIZE>>>(value);
  return int(cudaDeviceSynchronize());
}
"""


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on the path, or where the toolkit is usually installed."""
    found = shutil.which(name) or (str(CUDA / name) if (CUDA / name).is_file() else None)
    if found is None:
        raise RuntimeError(f"this case needs {name} of the CUDA toolkit, and it is neither on the path nor in {CUDA}")
    return found


def build(tree: Path, shared: Path, namespace: str, sources: Mapping[str, bytes] | None = None) -> Path:
    """The library of the tree's unit, registered under *namespace*; built once per text and kept in *shared*."""
    import torch
    from vllm_patches.wheels import native
    from vllm_patches.wheels.toolchain import Torch, find_nvcc

    os.environ.setdefault("CUDA_HOME", str(Path(tool("nvcc")).parents[1]))
    os.environ["XDG_CACHE_HOME"] = str(shared / "native-cache")
    unit = replace(native.UNITS[SOURCE], namespace=namespace)
    texts = {
        path.relative_to(tree).as_posix(): path.read_bytes() for path in (tree / "csrc").rglob("*") if path.is_file()
    }
    torch_folder = Torch(Path(torch.__file__).parent, torch.__version__.split("+")[0], str(torch.version.cuda))
    major, minor = torch.cuda.get_device_capability()
    target = (major * 10 + minor,)
    runtime = int(str(torch.version.cuda).split(".")[0])
    lock = shared / f"native-{namespace}-{tree.name}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # several cases want the same library
        nvcc = find_nvcc("")
        data = native._compiled(unit, {**texts, **(sources or {})}, nvcc, torch_folder, target, runtime, print)
        kept = shared / f"{namespace}-{tree.name}-{len(data)}.so"
        if not kept.is_file():
            kept.write_bytes(data)
    return kept


def operator(library: Path, namespace: str) -> Any:
    """The library's kernel behind upstream's schema, with nothing else of vLLM's loaded."""
    import torch

    schema = torch.library.Library(namespace, "FRAGMENT")
    schema.define(SCHEMA)
    _KEPT.append(schema)
    torch.ops.load_library(str(library))
    return getattr(getattr(torch.ops, namespace), OPERATOR)


def poison(shared: Path, value: int) -> None:
    """Leave *value* in every word of every multiprocessor's shared memory."""
    import torch

    library = shared / "libpoison.so"
    with (shared / "poison.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not library.is_file():
            size = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
            (shared / "poison.cu").write_text(POISON.replace("SIZE", str(size)), encoding="utf-8")
            major, minor = torch.cuda.get_device_capability()
            command = [
                tool("nvcc"),
                "-shared",
                "-Xcompiler=-fPIC",
                f"-arch=sm_{major}{minor}",
                "poison.cu",
                "-o",
                "p.so",
            ]
            subprocess.run(command, cwd=shared, check=True, capture_output=True)
            (shared / "p.so").rename(library)
    code = ctypes.CDLL(str(library)).poison(value)
    if code:
        raise RuntimeError(f"the poisoning kernel failed with CUDA error {code}")


def leftovers() -> None:
    """Leave in shared memory what a matrix product leaves there."""
    import torch

    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        x @ x
    torch.cuda.synchronize()


@dataclass
class Batch:
    """A paged cache, sequences of the given lengths, and an output with *rows* rows filled with `UNTOUCHED`."""

    lengths: tuple[int, ...]
    rows: int
    width: int = 0  # of the block table; 0: wide enough for a sequence as long as the output

    def __post_init__(self) -> None:
        import torch

        generator = torch.Generator(device="cuda").manual_seed(self.rows)
        width = self.width or max(self.rows, max(self.lengths)) // PAGE + 2
        blocks = len(self.lengths) * width + 8
        draw: Any = {"device": "cuda", "generator": generator}
        self.cache = torch.randint(0, UNTOUCHED, (blocks, PAGE, HEAD + 4), dtype=torch.uint8, **draw)
        order = torch.randperm(blocks, **draw)[: len(self.lengths) * width]
        self.table = order.to(torch.int32).view(len(self.lengths), width)
        ends = torch.tensor((0, *self.lengths)).cumsum(0)
        self.cu_seq_lens = ends.to(device="cuda", dtype=torch.int32)
        self.live = sum(self.lengths)
        self.key = torch.full((self.rows, HEAD), UNTOUCHED, dtype=torch.uint8, device="cuda")
        self.scale = torch.full((self.rows, 4), UNTOUCHED, dtype=torch.uint8, device="cuda")

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the operator takes."""
        return self.cache, self.key, self.scale, self.table, self.cu_seq_lens

    def check(self) -> None:
        """Live rows right, rows past the end untouched; raises `Defect`."""
        import torch

        torch.cuda.synchronize()
        lengths = torch.tensor(self.lengths, device="cuda")
        sequence = torch.repeat_interleave(torch.arange(len(self.lengths), device="cuda"), lengths)
        token = torch.arange(self.live, device="cuda") - self.cu_seq_lens[sequence]
        block, place = self.table[sequence, token // PAGE].long(), token % PAGE
        flat = self.cache.view(self.cache.shape[0], -1)
        keys = flat[:, : PAGE * HEAD].reshape(-1, PAGE, HEAD)[block, place]
        scales = flat[:, PAGE * HEAD :].reshape(-1, PAGE, 4)[block, place]
        for name, got, wanted in (("key", self.key, keys), ("scale", self.scale, scales)):
            wrong = int((got[: self.live] != wanted).any(1).sum())
            expect(not wrong, f"{wrong} of {self.live} live rows of {name} are wrong")
        stray = int((self.key[self.live :] != UNTOUCHED).any(1).sum())
        if stray:
            raise Defect(f"{stray} of {self.rows - self.live} rows past the end were written")
