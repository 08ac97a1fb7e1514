"""What the runner tests: an install, a wheel or a source tree, and the patched one made from it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

from vllm_patches import api, git  # noqa: E402
from vllm_patches.catalog import Catalog, open_catalog  # noqa: E402
from vllm_patches.errors import PatchesError  # noqa: E402
from vllm_patches.hunks import apply_patch  # noqa: E402

NATIVE = "0001-native"


@dataclass(frozen=True)
class Target:
    """A folder that holds ``vllm``. *kind* is "installed", "wheel" or "tree"; *verified* is fix to status."""

    folder: Path
    kind: str
    version: str
    verified: dict[str, str]


def open_target(path: Path, work: Path) -> Target:
    """The vLLM at *path*: a site folder, an unpacked or packed wheel, or a source tree."""
    if path.suffix == ".whl":
        folder = work / path.stem
        if not folder.is_dir():
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder)
        return _described(folder, "wheel")
    if not (path / "vllm" / "__init__.py").is_file():
        raise PatchesError(
            "no vLLM to test",
            file=str(path),
            expected="a site folder, a wheel or a source tree with vllm/__init__.py",
            found="a folder without it" if path.is_dir() else "nothing",
            next_command="python tests/gpu/run.py --help",
        )
    installed = bool(list(path.glob("vllm-*.dist-info")))
    return _described(path.resolve(), "installed" if installed else "tree")


def _described(folder: Path, kind: str) -> Target:
    found = api.verify(folder)
    return Target(folder, kind, found.release or found.version, {row.fix: row.status.value for row in found.fixes})


def make_patched(stock: Target, work: Path) -> Target:
    """A copy of *stock* with the release's series in it, put there by the tool itself; *stock* keeps every byte."""
    folder = work / f"patched-{stock.version}"
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(stock.folder, folder, copy_function=os.link)  # the tool never writes through a link
    catalog = open_catalog()
    if stock.kind == "tree":
        _patch_tree(catalog, stock.version, folder)
    else:
        native = any("csrc/" in file for patch in _series(catalog, stock.version) for file in patch_paths(patch))
        api.install(folder, without=(NATIVE,) if native else ())
    return _described(folder, stock.kind)


def _series(catalog: Catalog, version: str) -> tuple:
    return catalog.series_of(catalog.release(version)).patches


def patch_paths(patch: object) -> list[str]:
    """The files that a patch touches."""
    return [file.path for file in patch.files]  # type: ignore[attr-defined]


def _patch_tree(catalog: Catalog, version: str, folder: Path) -> None:
    """Every file of the series, patched by the code that builds wheels, each checked by its blob id."""
    patches = _series(catalog, version)
    paths = sorted({path for patch in patches for path in patch_paths(patch)})
    files = {path: (folder / path).read_bytes() for path in paths}
    for patch in patches:
        files = apply_patch(patch, files, release=version)
    for path, data in files.items():
        (folder / path).unlink()
        (folder / path).write_bytes(data)


def patch_set(version: str) -> dict[str, str]:
    """The series and head that the table records for a release."""
    release = open_catalog().release(version)
    return {"series": str(release.series or ""), "head": str(release.head or "")}


def commit() -> str:
    """The commit of this repository, "+changes" behind it if tracked files differ; from git or the environment."""
    found = os.environ.get("VLLM_PATCHES_COMMIT", "").strip() or _head()
    if re.fullmatch(r"[0-9a-f]{40}", found) and _changed():
        found += "+changes"
    if not re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found):
        raise PatchesError(
            "the results must name the commit that they are of",
            file=str(ROOT),
            expected="a git checkout, or VLLM_PATCHES_COMMIT with 40 hex digits",
            found=found or "neither",
            next_command="VLLM_PATCHES_COMMIT=$(git rev-parse HEAD) make test-gpu STOCK=...",
        )
    return found


def _head() -> str:
    """The commit of this checkout; empty where it is none of its own."""
    return git.rev_parse(ROOT, "HEAD") or "" if (ROOT / ".git").exists() else ""


def _changed() -> bool:
    """Whether a tracked file of this checkout differs from its commit."""
    return (ROOT / ".git").exists() and any(not line.startswith("??") for line in git.status(ROOT))
