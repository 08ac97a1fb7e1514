"""Speed of `apply`, `check` and `build` against the plain tools: paired runs, medians, ratios (`make bench`).

`python ci/bench.py PART ...` runs only these of the parts apply, check and wheel. ROUNDS is the number of pairs.

Every pair runs A B A B ... so that both see the same machine. Times are seconds of wall clock of whole processes, the
interpreter's start included. Nothing here is a test: machines differ, the ratios are what to quote.
"""

from __future__ import annotations

import gzip
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vllm_patches.series.catalog import open_catalog
from vllm_patches.series.model import Release
from vllm_patches.sources import cache
from vllm_patches.sources.index import fetch_sdist, fetch_wheel

ROUNDS = int(os.environ.get("ROUNDS", "5"))
FIRST_PINS = ("0.18.1", "0.19.1", "0.20.2", "0.21.0")
CATALOG = open_catalog()
PLAIN = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "QUILT_PC": ".pc", "LC_ALL": "C"}
IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "gc.auto=0"]


def main() -> None:
    """Run the chosen comparisons, or all, in a scratch folder and print one line each."""
    parts = {"apply": bench_apply, "check": bench_check, "wheel": bench_wheel}
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        sys.exit(f"error: no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for part in chosen:
            parts[part](Path(name), CATALOG.release("0.20.2"))


def bench_apply(scratch: Path, release: Release) -> None:
    """`apply` with and without cached git objects, the obvious shell script, and the floor."""
    sdist = fetch_sdist(release)
    build, plain = scratch / "build", scratch / "plain"
    apply = [sys.executable, "-m", "vllm_patches", "apply", "--pin", release.version, "--build", str(build)]

    def warm() -> None:
        run(apply)

    def by_hand() -> None:
        plain.mkdir()
        run(["tar", "xzf", str(sdist), "--no-same-owner", "-C", str(plain)])
        tree = plain / f"vllm-{release.version}"
        for command in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-q", "-m", "pristine"]):
            run(["git", *IDENTITY, *command], tree)
        patches = sorted((CATALOG.folder / release.series).glob("*.patch"))
        run(["git", *IDENTITY, "am", "-q", *map(str, patches)], tree)

    def floor() -> None:
        plain.mkdir()
        with gzip.open(sdist) as raw, tarfile.open(fileobj=raw) as archive:
            archive.extractall(plain, filter="data")

    def fresh(*folders: Path) -> Callable[[], None]:
        return lambda: [shutil.rmtree(folder, ignore_errors=True) for folder in folders] and None

    objects = cache.pristine_path(release.sha256)
    run(apply)
    by_script = compare("apply, git objects cached", warm, "tar + git add + git am", by_hand, fresh(build, plain))
    compare("apply, only the sdist cached", warm, "tar + git add + git am", by_hand, fresh(build, plain, objects))
    compare("apply, git objects cached", warm, "floor: inflate and write the files", floor, fresh(build, plain))
    print(f"wanted: at least 3x faster than the script; is {1 / by_script:.1f}x\n")


def bench_check(scratch: Path, _: Release) -> None:
    """`check` of several pins, from cached files and from the sdists alone."""
    sdists = {release.version: fetch_sdist(release) for release in CATALOG.pins}
    bench_check_warm(scratch, sdists)
    bench_check_cold(scratch, sdists)


def bench_check_warm(scratch: Path, sdists: dict[str, Path]) -> None:
    """`check` of the four first pins against `quilt push -a` on four extracted trees, then of all pins."""
    trees = [extract(scratch / "quilt", version, sdists[version]) for version in FIRST_PINS]
    check = [sys.executable, "-m", "vllm_patches", "check"]
    four = [*check, *(word for version in FIRST_PINS for word in ("--pin", version))]

    def pop() -> None:
        for tree in trees:
            if (tree / ".pc").exists():
                subprocess.run(["quilt", "pop", "-aq"], cwd=tree, env=PLAIN, capture_output=True, check=False)

    def push() -> None:
        for version, tree in zip(FIRST_PINS, trees, strict=True):
            quilt(tree, version)

    run(check)
    compare("check, four pins, warm", lambda: run(four), "quilt push -a, four extracted trees", push, pop)
    compare("check, all pins, warm", lambda: run(check), "check, four pins, warm", lambda: run(four), lambda: None)
    print()


def bench_check_cold(scratch: Path, sdists: dict[str, Path]) -> None:
    """`check` of all pins with nothing but the sdists, against extracting each and `quilt push -a`."""
    check = [sys.executable, "-m", "vllm_patches", "check"]
    trees = scratch / "cold"

    def forget() -> None:
        shutil.rmtree(cache.root() / "blob", ignore_errors=True)
        shutil.rmtree(trees, ignore_errors=True)

    def by_hand() -> None:
        for version, sdist in sdists.items():
            quilt(extract(trees, version, sdist), version)

    def inflate() -> None:
        for sdist in sdists.values():
            run(["gzip", "-dc", str(sdist)])

    ratio = compare("check, all pins, cold", lambda: run(check), "tar + quilt push -a, all pins", by_hand, forget)
    compare("check, all pins, cold", lambda: run(check), "floor: gzip -dc of each sdist", inflate, forget)
    print(f"wanted: at least 2x faster than tar + quilt; is {1 / ratio:.1f}x")


def bench_wheel(scratch: Path, release: Release) -> None:
    """`build` from a cached wheel against `wheel unpack`, an edit and `wheel pack`, against copying, and thorough."""
    official = release.wheel_for("x86_64")
    assert official is not None
    cached = fetch_wheel(release.wheel_file(official))
    out, plain = scratch / "dist", scratch / "unpacked"
    build = [sys.executable, "-m", "vllm_patches", "build", "--pin", release.version, "--arch", "x86_64"]
    build += ["--without=0001-native"] if any(p.startswith("csrc/") for p in CATALOG.series_of(release).paths) else []

    def ours() -> None:
        run([*build, "--out", str(out)])

    def by_hand() -> None:
        run([sys.executable, "-m", "wheel", "unpack", "--dest", str(plain), str(cached)])
        tree = plain / f"vllm-{release.version}"
        for path in CATALOG.series_of(release).paths:
            if (tree / path).is_file():
                (tree / path).write_bytes((tree / path).read_bytes() + b"# edited\n")
        run([sys.executable, "-m", "wheel", "pack", "--dest-dir", str(plain), str(tree)])

    def copy() -> None:
        out.mkdir(exist_ok=True)
        run(["cp", str(cached), str(out)])

    def fresh() -> None:
        for folder in (out, plain):
            shutil.rmtree(folder, ignore_errors=True)

    name = f"build of {release.version} ({official.size / 1e6:.0f} MB)"
    ratio = compare(name, ours, "wheel unpack, edit, wheel pack", by_hand, fresh)
    compare(name, ours, "cp of the wheel", copy, fresh)
    compare(f"{name}, thorough", lambda: run([*build, "--out", str(out), "--thorough"]), name, ours, fresh)
    peak = peak_memory([*build, "--out", str(out)])
    print(f"wanted: at least 20x faster than unpacking and packing; is {1 / ratio:.1f}x")
    print(f"wanted: a peak below 200 MB; is {peak:.0f} MB")


def peak_memory(command: list[str]) -> float:
    """The most memory that a command held, in MB. Its parent is small: Linux hands the peak on to a child."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
    code += "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1000


def extract(folder: Path, version: str, sdist: Path) -> Path:
    """Unpack an sdist below *folder*; returns its tree."""
    folder.mkdir(parents=True, exist_ok=True)
    run(["tar", "xzf", str(sdist), "--no-same-owner", "-C", str(folder)])
    return folder / f"vllm-{version}"


def quilt(tree: Path, version: str) -> None:
    """All patches of the release's series, fuzz 0."""
    series = CATALOG.folder / CATALOG.release(version).series
    subprocess.run(
        ["quilt", "push", "-aq", "--fuzz=0"],
        cwd=tree,
        env={**PLAIN, "QUILT_PATCHES": str(series)},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def compare(
    a_name: str, a: Callable[[], None], b_name: str, b: Callable[[], None], before: Callable[[], object]
) -> float:
    """Run both in turn, *before* each; print medians and the median of the paired ratios, and return that."""
    pairs = []
    for _ in range(ROUNDS):
        before()
        first = seconds(a)
        before()
        pairs.append((first, seconds(b)))
    ratio = statistics.median(x / y for x, y in pairs)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    print(f"{a_name}: {medians[0]:.2f} s | {b_name}: {medians[1]:.2f} s | ratio {ratio:.2f}", flush=True)
    return ratio


def seconds(work: Callable[[], None]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(command: list[str], cwd: Path | None = None) -> None:
    """Run to the end; a failure ends the benchmark."""
    env = PLAIN if command[0] == "git" else None
    subprocess.run(command, cwd=cwd, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
