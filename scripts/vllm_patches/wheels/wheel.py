"""`build`: a patched wheel from the official one. Only what a patch touches is new; the rest stays compressed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.outcome import FixRow, Say
from vllm_patches.series.catalog import DEFAULT_PIN, Catalog
from vllm_patches.series.model import ARCHS, Artifact, Release, Wheel
from vllm_patches.series.patchset import check_names, plan
from vllm_patches.sources.sdist import check_hash
from vllm_patches.sources.store import FindSdist
from vllm_patches.wheels import wheelmeta
from vllm_patches.wheels.modifications import (
    MODIFICATIONS,
    NOTICE,
    PATCHES_JSON,
    Addition,
    Modifications,
    fix_result,
    modifications_text,
    notice_text,
    patches_json,
)
from vllm_patches.wheels.native import NativeOptions, Overlay, build_overlay
from vllm_patches.wheels.official import Official
from vllm_patches.wheels.outfile import unnamed
from vllm_patches.wheels.record import Row, dump_record, row_of
from vllm_patches.wheels.wheelfile import HashedSource, Member, ZipWriter, digest, read_members

DEFAULT_NATIVE = NativeOptions()
FindWheel = Callable[[Artifact], Path]


@dataclass(frozen=True)
class Built:
    """The result of `build`."""

    release: str
    version: str
    wheel: str
    sha256: str
    size: int
    from_wheel: str
    rows: tuple[FixRow, ...]
    files: tuple[str, ...]
    copied: int
    notes: tuple[str, ...] = ()


def build_wheel(
    catalog: Catalog,
    release: Release,
    find_wheel: FindWheel,
    out: Path,
    say: Say,
    *,
    given: Path | None = None,
    arch: str = "",
    without: Iterable[str] = (),
    thorough: bool = False,
    find_sdist: FindSdist | None = None,
    native: NativeOptions = DEFAULT_NATIVE,
) -> Built:
    """Make the patched wheel of *release* in *out*, from the *given* official wheel or the one for *arch*.

    The official wheel's sha256 is computed from the very bytes that are copied. *thorough* inflates each copied
    member of the new wheel as well and compares it with upstream's RECORD: three times the work, and it finds nothing
    that the hash would let through but a broken disk or memory.
    """
    chosen = tuple(dict.fromkeys(without))
    catalog.need_series(release)
    check_names(release, catalog.series_of(release), chosen, "build")
    version = wheelmeta.local_version(release, chosen)
    path = given or find_wheel(release.wheel_file(_choose(release, arch)))
    say(f"vLLM {release.version}: building {version} from {path.name}")
    with Official.open(path, release) as official, unnamed(out) as made:
        wheel = _identified(official, path)
        patch_set = plan(catalog, release, official.find, chosen, _ways_out(release))
        overlay = Overlay((), {}, ())
        if compiled := patch_set.compiled:
            check_hash(path, HashedSource(official.file).finish(), wheel.size, release.wheel_file(wheel))
            overlay = build_overlay(official, wheel.arch, compiled, find_sdist or _no_sdist, native, say)
        additions = (_version_file(official, version), *overlay.additions)
        mods = Modifications(patch_set, version, catalog.fixes, wheel=wheel, additions=additions, native=overlay.info)
        source = HashedSource(official.file)
        sha256, copied = write_wheel(official, source, mods, made.file)
        check_hash(path, source.finish(), wheel.size, release.wheel_file(wheel))
        if thorough:
            check_copies(official, made.file, copied)
        target = made.publish(wheelmeta.wheel_name(wheel, version))
    return _built(mods, target, sha256, len(copied), overlay.notes)


def _built(mods: Modifications, target: Path, sha256: str, copied: int, notes: tuple[str, ...]) -> Built:
    release, made_from = mods.patch_set.release, mods.wheel.file if mods.wheel else ""
    rows = tuple(FixRow(i, fix.slug, fix_result(mods, i), _why(mods, i)) for i, fix in mods.fixes.items())
    paths = tuple(change.path for change in mods.patch_set.changes)
    size = target.stat().st_size
    return Built(release.version, mods.version, str(target), sha256, size, made_from, rows, paths, copied, notes)


def _ways_out(release: Release) -> str:
    return f"make build PIN={release.version}    # without WHEEL=FILE: from the official wheel"


def _no_sdist(release: Release) -> Path:
    raise PatchesError(
        "the compiled part needs the release's sdist",
        release=release.version,
        expected=release.sdist,
        next_command=f"make build PIN={release.version} SDIST=FILE    # or WITHOUT=0001-native",
    )


def _why(mods: Modifications, fix_id: str) -> str:
    """The files that were changed for a fix and those left out; without a patch, the release's own state."""
    patch_set = mods.patch_set
    patch = next((patch for patch in patch_set.series.patches if patch.number == fix_id), None)
    if patch is None:
        state = patch_set.release.states[fix_id]
        return f"{state.state.value} ({state.evidence})"
    changed = ", ".join(change.path for change in patch_set.changes if patch.name in change.patches)
    left_out = ", ".join(patch_set.left_out.get(fix_id, ()))
    return "; ".join(filter(None, (changed, left_out and f"left out: {left_out}")))


def release_of(catalog: Catalog, pin: str | None, given: Path | None) -> Release:
    """The release that is meant: the *pin*, else the one in the given wheel's name, else the default."""
    if pin or given is None:
        return catalog.release(pin or DEFAULT_PIN)
    named = given.name.split("-")[1].partition("+")[0] if given.name.startswith("vllm-") else ""
    if named in catalog.releases:
        return catalog.release(named)
    raise PatchesError(
        "the wheel's name does not say which release it is",
        file=str(given),
        expected="vllm-<release>-….whl, or the release by name",
        next_command=f"make build WHEEL={given} PIN={DEFAULT_PIN}",
    )


def _choose(release: Release, arch: str) -> Wheel:
    wanted = arch or platform.machine()
    wheel = release.wheel_for(wanted)
    if wheel is None:
        known = [name for name in ARCHS if release.wheel_for(name)]
        raise PatchesError(
            "no official wheel is recorded for this machine",
            release=release.version,
            expected=f"one of {', '.join(known)}" if known else "wheels in patches/releases.toml",
            found=wanted,
            next_command=f"make build PIN={release.version} ARCH={known[0]}" if known else "make new-pin",
        )
    return wheel


def _identified(official: Official, path: Path) -> Wheel:
    """The recorded wheel that *path* has the size of, whatever its name; its hash is for the caller to compare.

    Where no size fits no hash can: then hashing it gives the error that names both.
    """
    release, size = official.release, os.fstat(official.file).st_size
    named = [wheel for wheel in release.wheels if wheel.file == path.name]
    fitting = [wheel for wheel in (*named, *release.wheels) if wheel.size == size]
    if not fitting:
        nearest = named[0] if named else _choose(release, "")
        check_hash(path, HashedSource(official.file).finish(), size, release.wheel_file(nearest))
    return fitting[0]


def _version_file(official: Official, version: str) -> Addition:
    path = wheelmeta.VERSION_FILE
    data = wheelmeta.patched_version_file(official.read(path), official.release.version, version)
    return Addition(path, data, "carries the local version, so that nobody takes the build for upstream's")


def write_wheel(
    official: Official, source: HashedSource, mods: Modifications, file: int
) -> tuple[str, tuple[Member, ...]]:
    """Write the patched wheel to the open *file*; returns its sha256 and the members that were copied as they lie."""
    new = _new_contents(official, mods)
    writer, rows, copied = ZipWriter(file), list[Row](), list[Member]()
    for name, member in official.members.items():
        target = _renamed(official, mods, name)
        if target == name and name not in new:
            copied.append(writer.copy(source, member))
            rows += [] if member.is_folder else [official.rows[name]]
        elif name != official.info + "RECORD" and not member.is_folder:
            data = new.pop(name) if name in new else official.read(name)
            rows.append(_store(writer, target, data, member.external >> 16))
    mode = {a.path: a.mode for a in mods.additions}
    rows += [_store(writer, name, data, mode.get(name, 0o100644)) for name, data in new.items()]
    record = _renamed(official, mods, official.info + "RECORD")
    writer.add(record, dump_record([*rows, Row(record)]))
    sha256 = writer.finish()
    read_members(file, mods.version)  # what was written reads back
    return sha256, tuple(copied)


def _new_contents(official: Official, mods: Modifications) -> dict[str, bytes]:
    """By name of the member that it replaces, or by its own where it replaces none: every content that is new."""
    info = wheelmeta.dist_info(mods.version)
    licences = {MODIFICATIONS: modifications_text(mods), NOTICE: notice_text(mods)}
    metadata = official.read(official.info + "METADATA")
    new = {change.path: change.after for change in mods.patch_set.changes} | {a.path: a.data for a in mods.additions}
    new[official.info + "METADATA"] = wheelmeta.patched_metadata(
        metadata, official.release.version, mods.version, tuple(licences)
    )
    new |= {f"{info}licenses/{name}": text for name, text in licences.items()}
    new[info + PATCHES_JSON] = patches_json(mods)
    return new


def _renamed(official: Official, mods: Modifications, name: str) -> str:
    if name.startswith(official.info):
        return wheelmeta.dist_info(mods.version) + name.removeprefix(official.info)
    return name


def _store(writer: ZipWriter, name: str, data: bytes, mode: int) -> Row:
    writer.add(name, data, mode or 0o100644)
    return row_of(name, data)


def check_copies(official: Official, file: int, copied: Iterable[Member]) -> None:
    """Inflate what was copied from the new wheel, the biggest first, and compare it with upstream's RECORD."""
    files = sorted((member for member in copied if not member.is_folder), key=lambda m: m.size, reverse=True)

    def check(member: Member) -> None:
        algorithm = official.rows[member.name].algorithm
        official.compare(member.name, digest(file, member, algorithm, official.name))

    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))  # inflating and hashing release the interpreter
    try:
        for done in [pool.submit(check, member) for member in files]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
