"""What a patched package says about itself: patches.json for machines, MODIFICATIONS and a notice for people.

One form for every way in which a package gets patched: a wheel made from the official one or built from source, and a
package patched in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_patches import __version__
from vllm_patches.hashing import sha256
from vllm_patches.series.headers import pull_requests
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Artifact, Disposition, Fix, Patch, Wheel
from vllm_patches.series.patchset import Change, PatchSet

SCHEMA = 1
PATCHES_JSON = "patches.json"  # in the dist-info folder
MODIFICATIONS, NOTICE = "MODIFICATIONS", "NOTICE-vllm-patches"


@dataclass(frozen=True)
class Addition:
    """A file that the build itself adds or changes, and why: it is not part of the series."""

    path: str
    data: bytes
    why: str
    mode: int = 0o100644


@dataclass(frozen=True)
class Modifications:
    """All that distinguishes a patched package from the official one.

    *version* is the package's own, after patching. *wheel* is the official wheel that a build started from, *sdist* the
    source that it was built from whole; with neither, an installed package was patched in place. *native* and what is
    in *extra* go into patches.json as they are.
    """

    patch_set: PatchSet
    version: str
    fixes: Mapping[str, Fix]
    wheel: Wheel | None = None
    sdist: Artifact | None = None
    additions: tuple[Addition, ...] = ()
    native: Mapping[str, object] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)


def fix_result(mods: Modifications, fix_id: str) -> str:
    """What the package has of one fix, in a word or two."""
    patch = _patch_of(mods, fix_id)
    if patch is None:
        disposition = mods.patch_set.release.disposition(fix_id)
        if disposition is Disposition.APPLIED:  # the state wants a patch, and the series has none yet
            disposition = Disposition.NO_SERIES
        return str(disposition.value)
    all_left_out = set(mods.patch_set.left_out.get(fix_id, ())) >= {file.path for file in patch.files}
    return "left out" if all_left_out else str(Disposition.APPLIED.value)


def patches_json(mods: Modifications) -> bytes:
    """The bytes of patches.json; the same for the same series, package and tool.

    Keys: ``schema``, ``tool``, ``release``, ``version``, ``series``, ``from_wheel`` and ``from_sdist`` (``file`` and
    ``sha256``, or null), ``without``, ``fixes`` (by id: ``result``, ``patch``, ``patch_sha256``, ``left_out``),
    ``files`` (by path: ``before`` and ``after``, each ``blob`` and ``sha256``; ``patches``), ``not_of_the_series``
    (``path``, ``why`` and both hashes), and ``native`` only with a compiled part.
    """
    patch_set, wheel, sdist = mods.patch_set, mods.wheel, mods.sdist
    account: dict[str, object] = {
        "schema": SCHEMA,
        "tool": f"vllm-patches {__version__}",
        "release": patch_set.release.version,
        "version": mods.version,
        "series": patch_set.series.name,
        "from_wheel": {"file": wheel.file, "sha256": wheel.sha256} if wheel else None,
        "from_sdist": {"file": sdist.name, "sha256": sdist.sha256} if sdist else None,
        "without": list(patch_set.without),
        "fixes": {fix_id: _fix_entry(mods, fix_id) for fix_id in mods.fixes},
        "files": {change.path: _file_entry(change) for change in _by_path(patch_set)},
        "not_of_the_series": [
            {"path": a.path, "why": a.why, **hashes(a.data)} for a in sorted(mods.additions, key=lambda a: a.path)
        ],
    }
    if mods.native:
        account["native"] = mods.native
    account |= mods.extra
    return (json.dumps(account, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def hashes(data: bytes) -> dict[str, str]:
    """A content by git's id and by sha256."""
    return {"blob": blob_id(data), "sha256": sha256(data)}


def _by_path(patch_set: PatchSet) -> list[Change]:
    return sorted(patch_set.changes, key=lambda change: change.path)


def _fix_entry(mods: Modifications, fix_id: str) -> dict[str, object]:
    entry: dict[str, object] = {"result": fix_result(mods, fix_id)}
    if patch := _patch_of(mods, fix_id):
        entry |= {"patch": patch.name, "patch_sha256": sha256(patch.raw)}
    if paths := mods.patch_set.left_out.get(fix_id):
        entry["left_out"] = list(paths)
    return entry


def _file_entry(change: Change) -> dict[str, object]:
    return {"before": hashes(change.before), "after": hashes(change.after), "patches": list(change.patches)}


def _patch_of(mods: Modifications, fix_id: str) -> Patch | None:
    return next((patch for patch in mods.patch_set.series.patches if patch.number == fix_id), None)


def modifications_text(mods: Modifications) -> bytes:
    """MODIFICATIONS: every changed file, by which patch, after which change of upstream (Apache-2.0, section 4b)."""
    patch_set = mods.patch_set
    lines = [f"vllm {mods.version}: modifications", "", *_origin(mods)]
    lines += ["changed by vllm-patches, which is not affiliated with the vLLM project.", ""]
    lines.append(f"Files that the series {patch_set.series.name} changed:")
    for path, names in sorted(_changed(mods).items()):
        lines += ["", path, *(line for name in names for line in _patch_lines(mods, name))]
    for fix_id, paths in patch_set.left_out.items():
        lines += ["", f"Left out on request ({fix_id}): {', '.join(paths)}"]
    if mods.additions:
        lines += ["", "Added or changed by the build itself, not by a patch:"]
        lines += [f"  {a.path}: {a.why}" for a in sorted(mods.additions, key=lambda a: a.path)]
    lines += ["", f"All other files are {_others(mods)}."]
    return ("\n".join(lines) + "\n").encode("utf-8")


def _changed(mods: Modifications) -> dict[str, list[str]]:
    """By path the patches that change it: the package's own files, and all sources where it was built from them."""
    changed = {change.path: list(change.patches) for change in mods.patch_set.changes}
    if mods.sdist:
        for patch in mods.patch_set.compiled:
            for file in patch.files:
                changed.setdefault(file.path, []).append(patch.name)
    return changed


def _origin(mods: Modifications) -> list[str]:
    if mods.wheel:
        return [f"This is the official wheel {mods.wheel.file}", f"(sha256 {mods.wheel.sha256}),"]
    if mods.sdist:
        return [f"This was built from {mods.sdist.name}", f"(sha256 {mods.sdist.sha256}),"]
    return [f"This is vLLM {mods.version}, in place, after it was installed,"]


def _others(mods: Modifications) -> str:
    release = mods.patch_set.release.version
    if mods.wheel:
        return f"those of vLLM {release}, byte for byte"
    return f"built from those of vLLM {release}" if mods.sdist else "as they were installed"


def _patch_lines(mods: Modifications, name: str) -> list[str]:
    patch = next(patch for patch in mods.patch_set.series.patches if patch.name == name)
    fix = mods.fixes.get(patch.number)
    requests = [f"    upstream: {address}" for address in pull_requests(fix)] if fix else []
    return [f"  {name}: {patch.subject}", *requests]


def notice_text(mods: Modifications) -> bytes:
    """The notice for the licences folder."""
    release = mods.patch_set.release.version
    text = f"""\
vllm {mods.version}

This is a modified vLLM, built by vllm-patches from the official release {release} (Copyright contributors
to the vLLM project, Apache License 2.0). vllm-patches is not affiliated with the vLLM project. MODIFICATIONS, beside
this file, lists every changed file. Report a defect to the vLLM project only where its own release shows it as well.
"""
    return text.encode("utf-8")
