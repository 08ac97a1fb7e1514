"""What the runner tests: an install, a wheel or a source tree, and the patched one made from it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from gpurun.copies import patched_copy, whole_folder
from vllm_patches import api
from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog, open_catalog
from vllm_patches.series.hunks import apply_patch

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
            with zipfile.ZipFile(path) as wheel, whole_folder(folder) as new:
                wheel.extractall(new)
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
    patch = _patch_tree if stock.kind == "tree" else _install
    patched_copy(sorted(stock.folder.iterdir()), folder, lambda copy: patch(open_catalog(), stock.version, copy))
    return _described(folder, stock.kind)


def _install(catalog: Catalog, version: str, folder: Path) -> None:
    native = any("csrc/" in file for patch in _series(catalog, version) for file in patch_paths(patch))
    api.install(folder, without=(NATIVE,) if native else ())


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
