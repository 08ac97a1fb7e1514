"""A patched vLLM beside the stock one: the same files again, hard-linked, and the patches in them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vllm_patches.sources import cache


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill; when the block ends well it is called *folder*, and what was called so is gone."""
    with cache.scratch(folder.parent, f".{folder.name}-") as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(scratch / "old")
        new.rename(folder)


def patched_copy(parts: Iterable[Path], folder: Path, patch: Callable[[Path], object]) -> None:
    """Link every file of *parts* into *folder*, changed by *patch*, which is given the folder that holds them.

    *patch* replaces files, as the tool does: it must not write through a link, so that the originals keep every byte.
    """
    with whole_folder(folder) as new:
        for part in parts:
            if part.is_dir():
                shutil.copytree(part, new / part.name, copy_function=os.link, symlinks=True)
            else:
                os.link(part, new / part.name)
        patch(new)
