"""Which official wheel a wheel is, or a package was made from, by sha256 against the table of releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_patches.hashing import file_sha256
from vllm_patches.series.model import Release, Wheel
from vllm_patches.wheels.modifications import PATCHES_JSON


def wheel_origin(release: Release, path: Path) -> str:
    """In words, which of the release's recorded wheels the file *path* is; empty where it is none of them.

    Where upstream has built a wheel twice, pip takes the highest build number, and the other is official all the same.
    """
    fitting = [wheel for wheel in release.wheels if wheel.size == path.stat().st_size]
    if not fitting:
        return ""
    found = file_sha256(path)
    return next((f"the official wheel {_named(release, w)}" for w in fitting if w.sha256 == found), "")


def claimed_origin(release: Release, claims: dict[str, Any]) -> tuple[str, str]:
    """In words, what ``patches.json`` says that the package was made from; and what is wrong with that."""
    built = claims.get("from_sdist") is not None
    claimed = claims.get("from_sdist" if built else "from_wheel")
    if claimed is None:
        return "", ""
    if not isinstance(claimed, dict) or not {"file", "sha256"} <= claimed.keys():
        return "", f"{PATCHES_JSON} does not say which file it was made from"
    pair = claimed["file"], claimed["sha256"]
    if built and pair == (release.sdist, release.sha256):
        return f"built from {release.sdist}", ""
    wheels = [wheel for wheel in release.wheels if not built and pair == (wheel.file, wheel.sha256)]
    if not wheels:
        return "", f"{PATCHES_JSON} says that it was made from {pair[0]}, which is no recorded file"
    return f"made from {_named(release, wheels[0])}", ""


def _named(release: Release, wheel: Wheel) -> str:
    chosen = release.wheel_for(wheel.arch)
    other = f" (pip takes build {chosen.build} of it)" if chosen is not None and chosen != wheel else ""
    return f"{wheel.file}{other}"
