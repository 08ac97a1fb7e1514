"""A shell script for Dockerfiles: needs sh, coreutils and GNU patch, and nothing of ours."""

from __future__ import annotations

from importlib import resources

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.combined import diff
from vllm_patches.dist.links import Links, banner
from vllm_patches.hashing import sha256
from vllm_patches.series.patchset import is_packaged

NO_FILE = "-"  # in place of a hash


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``vllm-RELEASE-patches.sh``, with the changes and every hash in it (`links` plays no part)."""
    template = resources.files("vllm_patches.dist").joinpath("apply_sh.txt").read_text(encoding="utf-8")
    python = [path for path in sorted(bundle.after) if is_packaged(path)]
    native = [path for path in sorted(bundle.after) if not is_packaged(path)]
    values = {
        "@BANNER@": banner(bundle),
        "@RELEASE@": bundle.release.version,
        "@PYTHON@": _table(bundle, python),
        "@NATIVE@": _table(bundle, native),
    }
    for mark, value in values.items():
        template = template.replace(mark, value)
    head, middle, tail = template.partition("@PYTHON_PATCH@")
    middle, _, last = tail.partition("@NATIVE_PATCH@")
    parts = [head.encode(), diff(bundle, python), middle.encode(), diff(bundle, native), last.encode()]
    return [Asset(f"vllm-{bundle.release.version}-patches.sh", b"".join(parts), executable=True)]


def _table(bundle: Bundle, paths: list[str]) -> str:
    """A line for each file: sha256 before, sha256 after, path."""
    return "".join(f"{_hash(bundle.before[path])} {_hash(bundle.after[path])} {path}\n" for path in paths)


def _hash(data: bytes | None) -> str:
    return NO_FILE if data is None else sha256(data)
