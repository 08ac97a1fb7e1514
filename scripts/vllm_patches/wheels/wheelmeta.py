"""Names and metadata of a patched wheel: the local version wherever a wheel carries its version."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release, Wheel
from vllm_patches.wheels.wheelfile import damaged

VERSION_FILE = "vllm/_version.py"
MARK = "+patches."


def local_version(release: Release, without: Sequence[str] = ()) -> str:
    """The release's version with ``+patches.N``, as PEP 440 orders it: above upstream's, below the next N.

    N is the release's recorded revision of its series: a small number that grows, that no clock and no machine
    decides, and that stands for one recorded head. What is left out is said behind it.
    """
    if not release.revision:
        raise PatchesError(
            "the series of this release is not recorded, so a patched wheel of it has no version",
            release=release.version,
            file="patches/releases.toml",
            expected="a revision of 1 or more",
            found="none",
            next_command="make record",
        )
    left_out = "".join(f".without.{name.replace('-', '')}" for name in without)
    return f"{release.version}{MARK}{release.revision}{left_out}"


def wheel_name(wheel: Wheel, version: str) -> str:
    """The file name: upstream's tags, build tag included, behind the local version."""
    return "-".join(["vllm", version, *wheel.tags]) + ".whl"


def dist_info(version: str) -> str:
    """The folder of the metadata, with its slash."""
    return f"vllm-{version}.dist-info/"


def patched_metadata(data: bytes, old: str, new: str, licences: Sequence[str]) -> bytes:
    """METADATA with the new version and the added licence files; the description below is not touched."""
    head, blank, body = data.partition(b"\n\n")
    lines = head.split(b"\n")
    version = f"Version: {old}".encode()
    if lines.count(version) != 1:
        raise damaged("METADATA", version.decode(), "no such line, or two")
    lines[lines.index(version)] = f"Version: {new}".encode()
    last = max((i for i, line in enumerate(lines) if line.startswith((b"License-File:", b"Version:"))))
    lines[last + 1 : last + 1] = [f"License-File: {name}".encode() for name in licences]
    return b"\n".join(lines) + blank + body


def patched_version_file(data: bytes, old: str, new: str) -> bytes:
    """``vllm/_version.py`` with the new version in both of its forms, as setuptools-scm would have written it."""
    numbers = ", ".join(old.split("."))
    local = new.partition("+")[2]
    pairs = (
        (rb"(?m)^(__version__ = version = )'" + re.escape(old.encode()) + rb"'$", f"'{new}'"),
        (
            rb"(?m)^(__version_tuple__ = version_tuple = )\(" + re.escape(numbers.encode()) + rb"\)$",
            f"({numbers}, '{local}')",
        ),
    )
    for pattern, value in pairs:
        data, count = re.subn(pattern, lambda match, value=value: match[1] + value.encode(), data)  # type: ignore[misc]
        if count != 1:
            raise damaged(VERSION_FILE, f"one assignment of version {old} in each form", f"{count} of one of them")
    return data
