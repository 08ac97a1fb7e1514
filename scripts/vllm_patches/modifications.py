"""What a patched wheel says about itself: patches.json for machines, MODIFICATIONS and a notice for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_patches import __version__
from vllm_patches.hunks import blob_id
from vllm_patches.model import Disposition, Fix, Patch, Release, Series, Wheel

SCHEMA = 1
PATCHES_JSON = "patches.json"  # in the dist-info folder
UPSTREAM = "https://github.com/vllm-project/vllm"


@dataclass(frozen=True)
class FileChange:
    """A file of the wheel that patches of the series change."""

    path: str
    before: bytes
    after: bytes
    patches: tuple[str, ...]


@dataclass(frozen=True)
class Addition:
    """A file that the build itself adds or changes, and why: it is not part of the series."""

    path: str
    data: bytes
    why: str
    mode: int = 0o100644


@dataclass(frozen=True)
class Modifications:
    """All that distinguishes a patched wheel from the official one; *native* goes into patches.json as it is."""

    release: Release
    version: str
    wheel: Wheel
    series: Series
    fixes: Mapping[str, Fix]
    files: tuple[FileChange, ...]
    additions: tuple[Addition, ...]
    without: tuple[str, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)  # fix -> files whose part is left out
    native: Mapping[str, object] = field(default_factory=dict)


def fix_result(mods: Modifications, fix_id: str) -> str:
    """What the wheel has of one fix, in a word or two."""
    patch = _patch_of(mods, fix_id)
    if patch is None:
        disposition = mods.release.disposition(fix_id)
        if disposition is Disposition.APPLIED:  # the state wants a patch, and the series has none yet
            disposition = Disposition.NO_SERIES
        return str(disposition.value)
    all_left_out = set(mods.left_out.get(fix_id, ())) >= {file.path for file in patch.files}
    return "left out" if all_left_out else str(Disposition.APPLIED.value)


def patches_json(mods: Modifications) -> bytes:
    """The bytes of patches.json; the same for the same series, wheel and tool."""
    record: dict[str, object] = {
        "schema": SCHEMA,
        "tool": f"vllm-patches {__version__}",
        "release": mods.release.version,
        "version": mods.version,
        "series": mods.series.name,
        "from_wheel": {"file": mods.wheel.file, "sha256": mods.wheel.sha256},
        "without": list(mods.without),
        "fixes": {fix_id: _fix_entry(mods, fix_id) for fix_id in mods.fixes},
        "files": {change.path: _file_entry(change) for change in sorted(mods.files, key=lambda c: c.path)},
        "not_of_the_series": [
            {"path": a.path, "why": a.why, **hashes(a.data)} for a in sorted(mods.additions, key=lambda a: a.path)
        ],
    }
    if mods.native:
        record["native"] = mods.native
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def hashes(data: bytes) -> dict[str, str]:
    """A content by git's id and by sha256."""
    return {"blob": blob_id(data), "sha256": hashlib.sha256(data).hexdigest()}


def _fix_entry(mods: Modifications, fix_id: str) -> dict[str, object]:
    entry: dict[str, object] = {"result": fix_result(mods, fix_id)}
    if patch := _patch_of(mods, fix_id):
        entry |= {"patch": patch.name, "patch_sha256": hashlib.sha256(patch.raw).hexdigest()}
    if paths := mods.left_out.get(fix_id):
        entry["left_out"] = list(paths)
    return entry


def _file_entry(change: FileChange) -> dict[str, object]:
    return {"before": hashes(change.before), "after": hashes(change.after), "patches": list(change.patches)}


def _patch_of(mods: Modifications, fix_id: str) -> Patch | None:
    return next((patch for patch in mods.series.patches if patch.number == fix_id), None)


def modifications_text(mods: Modifications) -> bytes:
    """MODIFICATIONS: every changed file, by which patch, after which change of upstream (Apache-2.0, section 4b)."""
    lines = [
        f"vllm {mods.version}: modifications",
        "",
        f"This is the official wheel {mods.wheel.file}",
        f"(sha256 {mods.wheel.sha256}),",
        f"changed by vllm-patches. The series {mods.series.name} changed these files:",
    ]
    for change in sorted(mods.files, key=lambda c: c.path):
        lines += ["", change.path, *(line for name in change.patches for line in _patch_lines(mods, name))]
    for fix_id, paths in mods.left_out.items():
        lines += ["", f"Left out on request ({fix_id}): {', '.join(paths)}"]
    lines += ["", "Added or changed by the build itself, not by a patch:"]
    lines += [f"  {a.path}: {a.why}" for a in sorted(mods.additions, key=lambda a: a.path)]
    lines += ["", f"All other files are those of vLLM {mods.release.version}, byte for byte."]
    return ("\n".join(lines) + "\n").encode("utf-8")


def _patch_lines(mods: Modifications, name: str) -> list[str]:
    patch = next(patch for patch in mods.series.patches if patch.name == name)
    fix = mods.fixes.get(patch.number)
    requests = [f"    upstream: {UPSTREAM}/pull/{number}" for number in fix.upstream_pr] if fix else []
    return [f"  {name}: {patch.subject}", *requests]


def notice_text(mods: Modifications) -> bytes:
    """The notice for the licences folder."""
    text = f"""\
vllm {mods.version}

This is a modified vLLM, built by vllm-patches from the official release {mods.release.version} (Copyright contributors
to the vLLM project, Apache License 2.0). vllm-patches is not affiliated with the vLLM project. MODIFICATIONS, beside
this file, lists every changed file. Report a defect to the vLLM project only where its own release shows it as well.
"""
    return text.encode("utf-8")
