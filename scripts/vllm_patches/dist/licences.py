"""LICENSE and NOTICE of this project: from the checkout, or from the installed package's own metadata."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from vllm_patches.dist.bundle import Asset
from vllm_patches.errors import PatchesError

NAMES = ("LICENSE", "NOTICE")


def licences() -> list[Asset]:
    """Both files; raises `PatchesError` where one is missing."""
    return [Asset(name, _find(name).read_bytes()) for name in NAMES]


def _find(name: str) -> Path:
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file():
        found = checkout / name
    else:
        files = metadata.files("vllm-patches") or []
        found = next((Path(str(f.locate())) for f in files if f.name == name and "dist-info" in f.parts[0]), Path(name))
    if not found.is_file():
        raise PatchesError(
            "a licence file that goes into the tarball is missing",
            file=str(found),
            expected="the file of that name in the checkout or in the installed package",
            found="none",
            next_command="git checkout -- LICENSE NOTICE    # or: pip install --force-reinstall vllm-patches",
        )
    return found
