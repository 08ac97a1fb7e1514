"""The wheel that upstream's build has made: held against the patched tree, and marked as patched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_patches import git, wheelmeta
from vllm_patches.buildenv import Device
from vllm_patches.catalog import Catalog
from vllm_patches.errors import PatchesError
from vllm_patches.hunks import blob_id
from vllm_patches.model import Release
from vllm_patches.modifications import PATCHES_JSON, UPSTREAM, hashes
from vllm_patches.outfile import OutFile
from vllm_patches.patchset import Change, PatchSet, is_packaged, manifest
from vllm_patches.record import Row, dump_record, parse_record, row_of
from vllm_patches.wheelfile import HashedSource, Member, ZipWriter, digest, read_data, read_members

LICENCES = ("MODIFICATIONS", "NOTICE-vllm-patches")
# What upstream's build writes anew where the sdist has a file too.
REWRITTEN = (wheelmeta.VERSION_FILE, "vllm.egg-info/", "vllm/vllm_flash_attn/", "vllm/third_party/")


@dataclass(frozen=True)
class Source:
    """The patched tree that a wheel was built from, and how: *head* is its commit, *base* the pristine one."""

    catalog: Catalog
    release: Release
    tree: Path
    base: str
    head: str
    device: Device
    version: str  # as it was asked for: upstream appends to it
    torch: str


def made_version(source: Source, wheel: Path, again: str) -> str:
    """The version that the wheel calls itself, once it is the one that was asked for and upstream's suffix."""
    parts = wheel.name.removesuffix(".whl").split("-")
    version = parts[1] if len(parts) >= 5 else ""
    if parts[0] == "vllm" and re.fullmatch(re.escape(source.version) + source.device.suffix, version):
        return version
    raise PatchesError(
        "upstream's build made a wheel of another version; nothing was published",
        release=source.release.version,
        file=wheel.name,
        expected=f"vllm-{source.version}{source.device.suffix}-….whl",
        found=version or "no version",
        next_command=f"env | grep -E 'VLLM|SETUPTOOLS'    # what in it could decide the version? then {again}",
    )


def mark(source: Source, wheel: Path, version: str, out: OutFile) -> tuple[str, int]:
    """Write *wheel* to *out* with patches.json, MODIFICATIONS and a notice; returns its sha256 and size.

    All other members are copied as they are compressed. Every file that stands in the patched tree too must have the
    tree's content, and no module may be missing: a killed earlier run could have left a half copy in build/.
    """
    file = os.open(wheel, os.O_RDONLY)
    try:
        members = {member.name: member for member in read_members(file, wheel.name)}
        _compare(source, file, members, wheel.name)
        info = wheelmeta.dist_info(version)
        rows = parse_record(read_data(file, members[info + "RECORD"], wheel.name), wheel.name)
        metadata = read_data(file, members[info + "METADATA"], wheel.name)
        new = {
            info + "METADATA": wheelmeta.patched_metadata(metadata, version, version, LICENCES),
            **_account(source, file, members, version),
        }
        return _write(file, members, rows, new, info, out)
    finally:
        os.close(file)


def _compare(source: Source, file: int, members: Mapping[str, Member], name: str) -> None:
    """Raise unless every file of the wheel that the patched tree has is the tree's, and all its modules are there."""
    tree = {
        path: blob
        for path, blob in git.tree_blobs(source.tree, source.head, "vllm").items()
        if not path.startswith(REWRITTEN)
    }
    wrong = [f"{path} is not in it" for path in tree if path.endswith(".py") and path not in members]
    for path in sorted(tree.keys() & members.keys()):
        found = blob_id(read_data(file, members[path], name))
        if found != tree[path]:
            wrong.append(f"{path} is {found}, in the tree {tree[path]}")
    if wrong:
        raise PatchesError(
            "the wheel does not hold the patched tree's files; nothing was published",
            release=source.release.version,
            file=name,
            expected=f"the files of {source.head}",
            found="\n".join(wrong[:10]),
            next_command=f"rm -rf {source.tree}    # then build again, from a new tree",
        )


def _account(source: Source, file: int, members: Mapping[str, Member], version: str) -> dict[str, bytes]:
    """patches.json, MODIFICATIONS and the notice, by member name."""
    series = source.catalog.series_of(source.release)
    paths = list(series.paths)
    before, after = _contents(source, source.base, paths), _contents(source, source.head, paths)
    changes = tuple(
        Change(path, before[path], after[path], _touching(source, path)) for path in paths if is_packaged(path)
    )
    native = [path for path in paths if not is_packaged(path)]
    record = manifest(source.catalog, PatchSet(source.release, series, changes, (), ()), version)
    record["from_sdist"] = {"file": source.release.sdist, "sha256": source.release.sha256, "head": source.head}
    record["target_device"] = source.device.value
    record["torch"] = source.torch
    if native:
        compiled = [] if source.device is Device.EMPTY else [n for n in members if n.endswith(".so")]
        record["native"] = {
            "source": {path: {"before": hashes(before[path]), "after": hashes(after[path])} for path in native},
            "files": {n: {"sha256": digest(file, members[n], "sha256", n).hex()} for n in compiled},
        }
    info = wheelmeta.dist_info(version)
    return {
        info + "licenses/" + LICENCES[0]: _modifications(source, paths, version),
        info + "licenses/" + LICENCES[1]: _notice(source, version),
        info + PATCHES_JSON: (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8"),
    }


def _contents(source: Source, commit: str, paths: list[str]) -> dict[str, bytes]:
    blobs = git.blobs(source.tree, commit, paths)
    contents = git.read_blobs(source.tree, blobs.values())
    return {path: contents[blob] for path, blob in blobs.items()}


def _touching(source: Source, path: str) -> tuple[str, ...]:
    series = source.catalog.series_of(source.release)
    return tuple(patch.name for patch in series.patches if any(file.path == path for file in patch.files))


def _modifications(source: Source, paths: list[str], version: str) -> bytes:
    """MODIFICATIONS: every changed source file, by which patch, after which change of upstream (Apache-2.0, 4b)."""
    series = source.catalog.series_of(source.release)
    lines = [
        f"vllm {version}: modifications",
        "",
        f"Built from {source.release.sdist} (sha256 {source.release.sha256}),",
        f"changed by vllm-patches. The series {series.name} changed these source files:",
    ]
    for path in sorted(paths):
        lines += ["", path]
        for patch in (patch for patch in series.patches if patch.name in _touching(source, path)):
            lines.append(f"  {patch.name}: {patch.subject}")
            lines += [f"    upstream: {UPSTREAM}/pull/{n}" for n in source.catalog.fixes[patch.number].upstream_pr]
    return ("\n".join([*lines, "", "All other source files are those of the release."]) + "\n").encode("utf-8")


def _notice(source: Source, version: str) -> bytes:
    text = f"""\
vllm {version}

This is a modified vLLM, built with vllm-patches from the sources of the release {source.release.version} (Copyright
contributors to the vLLM project, Apache License 2.0). vllm-patches is not affiliated with the vLLM project.
MODIFICATIONS, beside this file, lists every changed source file. Report a defect to the vLLM project only where its own
release shows it as well.
"""
    return text.encode("utf-8")


def _write(
    file: int,
    members: Mapping[str, Member],
    rows: Mapping[str, Row],
    new: Mapping[str, bytes],
    info: str,
    out: OutFile,
) -> tuple[str, int]:
    source, writer, written = HashedSource(file), ZipWriter(out.file), list[Row]()
    for name, member in members.items():
        if name in new or name == info + "RECORD":
            continue
        writer.copy(source, member)
        written += [rows[name]] if name in rows else []
    for name, data in new.items():
        writer.add(name, data)
        written.append(row_of(name, data))
    writer.add(info + "RECORD", dump_record([*written, Row(info + "RECORD")]))
    sha256 = writer.finish()
    return sha256, os.fstat(out.file).st_size
