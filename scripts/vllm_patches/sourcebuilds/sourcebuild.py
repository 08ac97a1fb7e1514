"""`build --mode source`: upstream's own full build, from a patched tree of its own, and a wheel that is verified.

The tree lies in a folder of this tool's, apart from `apply`'s: upstream's build writes into the tree it builds. It
stays after a failure, so that the next run goes on where the compilers were, and is removed after a success.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.installed.verify import FixStatus, require_fixed, verify
from vllm_patches.outcome import Say
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import Release, Series
from vllm_patches.sourcebuilds import buildenv, buildlog
from vllm_patches.sourcebuilds.buildenv import DEVICE_VARIABLE, Device
from vllm_patches.sourcebuilds.sourcewheel import REWRITTEN, Source, made_version, mark
from vllm_patches.sources import cache
from vllm_patches.sources.store import FindSdist
from vllm_patches.trees import git
from vllm_patches.trees.apply import check_head, series_hash
from vllm_patches.trees.tree import PRISTINE, build_tree, check_files, pristine_objects
from vllm_patches.wheels import wheelmeta
from vllm_patches.wheels.outfile import unnamed

_RECORD = "made.json"
_ANOTHER = "another work folder: --work DIR, with make WORK=DIR"


@dataclass(frozen=True)
class SourceOptions:
    """How to build: for what, with which Python, and whether pip makes the build's environment or this is it."""

    device: Device = Device.CUDA
    python: Path = Path(sys.executable)
    isolated: bool = True

    def again(self, release: Release) -> str:
        """The same build as a command to type."""
        words = ["make build MODE=source", f"PIN={release.version}", f"{DEVICE_VARIABLE}={self.device.value}"]
        words += [] if self.isolated else ["NO_ISOLATION=1"]
        words += [] if self.python == Path(sys.executable) else [f"BUILD_PYTHON={self.python}"]
        return " ".join(words)


@dataclass(frozen=True)
class SourceBuilt:
    """The result: the wheel and how it was made; *seconds* are those of upstream's build alone."""

    release: str
    version: str
    device: str
    wheel: str
    sha256: str
    size: int
    fixes: tuple[FixStatus, ...]
    python: str
    torch: str  # empty: in pip's own environment, the one that the release pins
    jobs: int
    compiler_cache: str
    seconds: float
    log: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Work:
    """The private folder of one release and device; *held* is the descriptor of its lock."""

    folder: Path
    log: Path
    held: int

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"


def build_source(
    catalog: Catalog,
    release: Release,
    find_sdist: FindSdist,
    work: Path,
    out: Path,
    say: Say,
    options: SourceOptions,
    environ: Mapping[str, str] | None = None,
) -> SourceBuilt:
    """Build the patched *release* as upstream would, in a folder below *work*; only a whole wheel appears in *out*."""
    given = os.environ if environ is None else environ
    catalog.need_series(release)
    series = catalog.series_of(release)
    version = wheelmeta.local_version(release)
    again = options.again(release)
    count = _jobs(options.device, given, again)
    env = buildenv.environment(release, version, options.device, count, options.python, given)
    found = buildenv.look_at(options.python, options.device, env, isolated=options.isolated, again=again)
    with _locked(work, f"vllm-{release.version}-{options.device.value}", say) as place:
        base = _make_tree(release, series, find_sdist, place, say)
        source = Source(catalog, release, place.tree, base, release.head, options.device, version, found.torch)
        notes = _notes(options, found, given, place.tree)
        say(f"vLLM {release.version}: upstream's build for {options.device.value}, {count} jobs; log: {place.log}")
        started = time.monotonic()
        wheel = _run(place, env, options, count, release)
        seconds = time.monotonic() - started
        made = made_version(source, wheel, again)
        target, sha256, size, fixes = _publish(source, wheel, made, place, out)
        cache.remove(place.folder)
    cached = buildenv.compiler_cache(env)
    return SourceBuilt(
        release.version, made, options.device.value, str(target), sha256, size, fixes, found.python, found.torch,
        count, cached, round(seconds, 1), str(place.log), notes,
    )  # fmt: skip


def _jobs(device: Device, environ: Mapping[str, str], again: str) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = buildenv.jobs(device, environ, cores, buildenv.free_memory())
    if count < 1:
        raise PatchesError(
            "MAX_JOBS is no number of jobs",
            expected="a whole number of 1 or more, or no MAX_JOBS",
            found=environ.get("MAX_JOBS", ""),
            next_command=f"MAX_JOBS=1 {again}",
        )
    return count


@contextlib.contextmanager
def _locked(work: Path, name: str, say: Say) -> Iterator[_Work]:
    """One build of a release and device at a time; a killed run's compilers hold the lock until they are gone."""
    with cache.disk_errors(work, _ANOTHER):
        work.mkdir(parents=True, exist_ok=True)
        with (work / f".{name}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another build in {work / name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield _Work(work / name, work / f"{name}.log", lock.fileno())


def _make_tree(release: Release, series: Series, find_sdist: FindSdist, place: _Work, say: Say) -> str:
    """The patched tree to build in: a failed run's own, as it was left, or a new one; returns the pristine commit."""
    record = {"release": release.version, "head": release.head, "series_sha256": series_hash(series)}
    if _read_record(place) == record:
        say(f"going on in {place.tree}: what was compiled there is kept")
        _check_untouched(release, series, place)
        _forget_stale(place)
    else:
        if place.tree.exists():
            _check_untouched(release, None, place)
        cache.remove(place.folder)
        place.folder.mkdir()
        check_head(release, build_tree(release, series, pristine_objects(release, find_sdist(release)), place.tree))
        (place.folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")
    return git.rev_parse(place.tree, PRISTINE) or ""


def _read_record(place: _Work) -> object:
    try:
        return json.loads((place.folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_untouched(release: Release, series: Series | None, place: _Work) -> None:
    """The tree is this tool's own, but somebody may have worked in it: that must not be built, nor lost."""
    lines = git.status(place.tree) if (place.folder / _RECORD).is_file() else []
    changed = [line for line in lines if not line.startswith("??") and not line[3:].startswith(REWRITTEN)]
    if changed:
        raise PatchesError(
            "the tree of an earlier build was changed by hand; nothing was touched",
            release=release.version,
            file=str(place.tree),
            expected="the patched tree as this tool made it",
            found="\n".join(changed[:10]),
            next_command=f"mv {place.folder} {place.folder}.mine    # keeps it; then build again",
        )
    if series is not None:
        check_files(place.tree, release, series)


def _forget_stale(place: _Work) -> None:
    """Remove all of a failed run but what was compiled.

    setuptools takes a half file of a killed run for new. CMake keeps the compilers that it found first, and would not
    look at the CXX that shall mend the failure; its objects lie in folders named after the targets.
    """
    for pattern in ("lib*", "bdist*", "temp*/CMakeCache.txt", "temp*/CMakeFiles/[0-9]*"):
        for left in (place.tree / "build").glob(pattern):
            cache.remove(left)


def _notes(
    options: SourceOptions, found: buildenv.Interpreter, environ: Mapping[str, str], tree: Path
) -> tuple[str, ...]:
    dropped = [name for name in buildenv.NOT_PASSED_ON if environ.get(name)]
    notes = [f"not passed on to the build: {name}={environ[name]}" for name in dropped]
    pinned = buildenv.pinned_torch((tree / "pyproject.toml").read_text(encoding="utf-8"))
    built = found.torch.partition("+")[0]
    if options.device is not Device.EMPTY and built and pinned and built != pinned:
        notes.append(f"compiled against torch {found.torch}, the release pins {pinned}: use it with that torch only")
    return tuple(notes)


def _run(place: _Work, env: Mapping[str, str], options: SourceOptions, count: int, release: Release) -> Path:
    """Upstream's build through pip; returns the wheel that it made."""
    cache.remove(place.wheels)
    place.wheels.mkdir()
    command = [str(options.python), "-m", "pip", "--disable-pip-version-check", "--no-input", "wheel", "--verbose"]
    command += ["--no-deps", "--progress-bar=off", *([] if options.isolated else ["--no-build-isolation"])]
    command += ["--wheel-dir", str(place.wheels.resolve()), "."]
    progress = buildlog.Progress(sys.stderr)
    status = buildlog.run_logged(command, place.tree, env, place.log, progress, place.held)
    wheels = list(place.wheels.glob("*.whl"))
    if status == 0 and len(wheels) == 1:
        return wheels[0]
    raise _failed(place, status, count, options.again(release), release)


def _failed(place: _Work, status: int, count: int, again: str, release: Release) -> PatchesError:
    text = place.log.read_text(encoding="utf-8", errors="replace")
    known = buildlog.advice(text, count)
    return PatchesError(
        f"upstream's build failed{': ' + known.what if known else ''}",
        release=release.version,
        file=str(place.log),
        expected="a wheel from pip wheel",
        found="\n".join([f"exit status {status}", *buildlog.last_words(text)]),
        next_command=f"{known.command} {again}" if known else f"less {place.log}    # then go on with: {again}",
    )


def _publish(
    source: Source, wheel: Path, version: str, place: _Work, out: Path
) -> tuple[Path, str, int, tuple[FixStatus, ...]]:
    """Mark the wheel, verify the marked one, and give it its name in *out*: the last thing that is done."""
    with unnamed(place.wheels, _ANOTHER) as marked:
        sha256, size = mark(source, wheel, version, marked)
        wheel.unlink()
        whole = marked.publish(wheel.name)
    report = require_fixed(verify(source.catalog, whole))
    with unnamed(out) as copy:
        with whole.open("rb") as file, os.fdopen(os.dup(copy.file), "wb") as target:
            shutil.copyfileobj(file, target, 1 << 20)
        return copy.publish(wheel.name), sha256, size, report.fixes
