"""The wheel that upstream's build has made: held against the patched tree, and marked as patched."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Release
from vllm_patches.series.patchset import Change, PatchSet, is_packaged, native_parts, touching
from vllm_patches.sourcebuilds.buildenv import Device
from vllm_patches.trees import git
from vllm_patches.wheels import wheelmeta
from vllm_patches.wheels.modifications import (
    MODIFICATIONS,
    NOTICE,
    PATCHES_JSON,
    Modifications,
    hashes,
    modifications_text,
    notice_text,
    patches_json,
)
from vllm_patches.wheels.outfile import OutFile
from vllm_patches.wheels.record import Row, dump_record, parse_record, row_of
from vllm_patches.wheels.wheelfile import HashedSource, Member, ZipWriter, digest, read_data, read_members

LICENCES = (MODIFICATIONS, NOTICE)
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
        Change(path, before[path], after[path], touching(series, path)) for path in paths if is_packaged(path)
    )
    native = {
        path: {"before": hashes(before[path]), "after": hashes(after[path])}
        for paths in native_parts(series).values()
        for path in paths
    }
    compiled = [] if source.device is Device.EMPTY else [name for name in members if name.endswith(".so")]
    built = {name: {"sha256": digest(file, members[name], "sha256", name).hex()} for name in compiled if native}
    mods = Modifications(
        PatchSet(source.release, series, changes, (), {}), version, source.catalog.fixes,
        sdist=source.release.sdist_file, native={"source": native, "files": built} if native else {},
        extra={"head": source.head, "target_device": source.device.value, "torch": source.torch},
    )  # fmt: skip
    info = wheelmeta.dist_info(version)
    return {
        info + "licenses/" + LICENCES[0]: modifications_text(mods),
        info + "licenses/" + LICENCES[1]: notice_text(mods),
        info + PATCHES_JSON: patches_json(mods),
    }


def _contents(source: Source, commit: str, paths: list[str]) -> dict[str, bytes]:
    blobs = git.blobs(source.tree, commit, paths)
    contents = git.read_blobs(source.tree, blobs.values())
    return {path: contents[blob] for path, blob in blobs.items()}


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
