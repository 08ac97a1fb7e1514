"""One gather with more rows than tokens, for compute-sanitizer: gather_once.py LIBRARY SHARED POISON."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import native_unit


def main() -> None:
    """Load, poison, gather; what the kernel does is the sanitizer's to tell."""
    import torch

    library, shared, value = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    call = native_unit.operator(library, "_C_cache_ops")
    batch = native_unit.Batch((50, 0, 70), 1024)
    try:
        for _ in range(20):  # another process's kernel may come between the poison and the gather
            native_unit.poison(shared, value)
            call(*batch.arguments)
            print("gathered", flush=True)
            torch.cuda.synchronize()
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
