"""Real official wheels in plain virtual environments: a build of each, and the three lines of a Dockerfile on each.

pip, `wheel` and `check-wheel-contents` must take what is built. The wheels come out of the cache or from pip's index
(250 to 430 MB each): 0.20.2 here, four of them in `make test-wheels`, or those of WHEEL_PINS. Compiled parts are left
out: what nvcc makes of them has its own tests.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import zipfile
from functools import cache as once
from pathlib import Path

import pytest
from plainvenv import ROOT, make_environment, pip, project_copy, run, site_of
from vllm_patches.errors import PatchesError
from vllm_patches.installed.verify import Status, verify
from vllm_patches.series.catalog import open_catalog
from vllm_patches.series.patchset import native_parts
from vllm_patches.sources import cache
from vllm_patches.sources.index import fetch_wheel
from vllm_patches.wheels.wheel import Built, build_wheel

CATALOG = open_catalog()
PINS = os.environ.get("WHEEL_PINS", "0.20.2").split()
OTHER = dict(zip(PINS, [PINS[-1], *PINS], strict=False)) if len(PINS) > 1 else {PINS[0]: "0.20.1"}
"""Another release for each, to be forced over it."""


@once
def official(pin: str) -> Path:
    """The wheel that pip takes; of several test processes one fetches it."""
    release = CATALOG.release(pin)
    wheel = release.wheel_for("x86_64")
    assert wheel is not None
    folder = cache.wheel_path(wheel.sha256, wheel.file).parent
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return fetch_wheel(release.wheel_file(wheel))
    finally:
        os.close(handle)


def without(pin: str) -> tuple[str, ...]:
    """The compiled parts of the release's series."""
    return tuple(native_parts(CATALOG.series_of(CATALOG.release(pin))))


def options(pin: str) -> list[str]:
    """The same for the command line."""
    return [word for name in without(pin) for word in ("--without", name)]


def carried(pin: str) -> set[str]:
    return {patch.number for patch in CATALOG.series_of(CATALOG.release(pin)).patches}


@pytest.fixture(scope="module", params=PINS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    release = CATALOG.release(request.param)
    if not release.revision:
        pytest.fail("the series is not recorded: make record")
    path = official(request.param)
    return build_wheel(
        CATALOG, release, lambda wanted: path, tmp_path_factory.mktemp("dist"), print,
        given=path, without=without(request.param), thorough=True,
    )  # fmt: skip


def test_only_what_the_series_touches_differs(built: Built) -> None:
    """By CRC and size of every member; `thorough` has compared the copied ones with RECORD already."""
    old, new = f"vllm-{built.release}.dist-info/", f"vllm-{built.version}.dist-info/"
    with zipfile.ZipFile(official(built.release)) as stock, zipfile.ZipFile(built.wheel) as made:
        before = {i.filename.replace(old, new): (i.CRC, i.file_size, i.external_attr) for i in stock.infolist()}
        after = {i.filename: (i.CRC, i.file_size, i.external_attr) for i in made.infolist()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {*built.files, "vllm/_version.py", new + "METADATA", new + "RECORD"}
    added = {new + name for name in ("patches.json", "licenses/MODIFICATIONS", "licenses/NOTICE-vllm-patches")}
    assert after.keys() - before.keys() == added
    assert not before.keys() - after.keys()


PEAK = """\
import sys
from vllm_patches.cli import main
status = main(sys.argv[1:])
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))  # not ru_maxrss: that is handed on
sys.exit(status)
"""


def test_another_process_makes_the_same_bytes_in_little_memory(built: Built, tmp_path: Path) -> None:
    command = (sys.executable, "-c", PEAK, "build", "--wheel", official(built.release), *options(built.release))
    changed = {"TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT / "scripts"), "LC_ALL": "C"}
    told = run(*command, "--out", tmp_path / "dist", cwd=tmp_path, **changed)
    assert int(told.rsplit("VmHWM:", 1)[1].split()[0]) < 100_000  # kB
    (again,) = (tmp_path / "dist").iterdir()
    assert again.name == Path(built.wheel).name
    with again.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == built.sha256


def test_pip_installs_it_and_it_says_what_it_is(built: Built, tmp_path: Path) -> None:
    """`pip check` says the same of stock and patched, but for the version."""
    environment = make_environment(tmp_path / "venv")
    install = ("install", "--no-deps", "--no-index", "--no-compile")
    pip(environment, *install, official(built.release))
    stock = pip_check(environment)
    pip(environment, *install, built.wheel)  # an upgrade, for the local version is the higher one
    patched = pip_check(environment)
    assert stock.replace(f"vllm {built.release} ", f"vllm {built.version} ") == patched
    assert f"Version: {built.version}\n" in run(environment / "bin" / "pip", "show", "vllm")
    site = site_of(environment)
    code = f"import runpy; print(runpy.run_path({str(site / 'vllm' / '_version.py')!r})['__version__'])"
    assert run(environment / "bin" / "python", "-c", code).strip() == built.version
    assert [path.name for path in site.glob("vllm-*.dist-info")] == [f"vllm-{built.version}.dist-info"]
    account = json.loads((site / f"vllm-{built.version}.dist-info" / "patches.json").read_text(encoding="utf-8"))
    assert account["version"] == built.version and account["from_wheel"]["file"] == official(built.release).name
    assert verify(CATALOG, site, without(built.release)).ok


def test_wheel_unpacks_it(built: Built, tmp_path: Path) -> None:
    """`wheel unpack` compares every file with RECORD."""
    run(sys.executable, "-m", "wheel", "unpack", "--dest", tmp_path, built.wheel)
    assert (tmp_path / f"vllm-{built.version}" / "vllm" / "_version.py").is_file()


def test_check_wheel_contents_finds_what_it_finds_in_the_official_one(built: Built) -> None:
    findings = []
    for path in (official(built.release), Path(built.wheel)):
        report = run(sys.executable, "-m", "check_wheel_contents", path, code=1)
        findings.append(sorted(report.replace(str(path), "WHEEL").splitlines()))
    assert findings[0] == findings[1] and any("W002" in line for line in findings[0])


def test_verify_tells_the_two_apart(built: Built) -> None:
    stock, patched = (
        verify(CATALOG, official(built.release)),
        verify(CATALOG, Path(built.wheel), without(built.release)),
    )
    name = official(built.release).name
    assert (stock.origin, patched.origin) == (f"the official wheel {name}", f"made from {name}")
    assert {fix.fix for fix in stock.fixes if fix.status is Status.MISSING} == carried(built.release)
    assert {fix.by for fix in stock.fixes if fix.fix in carried(built.release)} == {"hash"}
    assert patched.ok and not stock.ok and not patched.problems and not stock.problems
    assert verify(CATALOG, Path(built.wheel)).ok is not bool(without(built.release))  # left out is not in


def test_what_is_not_the_official_wheel_is_refused(built: Built, tmp_path: Path) -> None:
    release, path = CATALOG.release(built.release), tmp_path / official(built.release).name
    size = official(built.release).stat().st_size

    def refused(given: Path, words: str) -> None:
        with pytest.raises(PatchesError, match=words) as caught:
            build_wheel(
                CATALOG, release, lambda wanted: given, tmp_path / "dist", print,
                given=given, without=without(built.release),
            )  # fmt: skip
        assert caught.value.next_command
        assert not any((tmp_path / "dist").glob("*"))

    refused(Path(built.wheel), "patched already")
    shutil.copyfile(official(built.release), path)
    with path.open("r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)
        file.seek(size // 2)
        file.write(bytes([byte[0] ^ 1]))
    refused(path, "not the recorded file")
    os.truncate(path, size - 1)
    refused(path, "damaged")
    os.truncate(path, size // 2)
    refused(path, "damaged")


@pytest.mark.parametrize("pin", PINS)
def test_the_three_lines_of_a_dockerfile(pin: str, tmp_path: Path) -> None:
    """On the official wheel, without its dependencies; then another official wheel is forced over the patches."""
    environment = make_environment(tmp_path / "venv")
    command, site = environment / "bin" / "vllm-patches", site_of(environment)
    from_wheel = ("install", "--no-deps", "--no-index", "--no-compile")
    pip(environment, *from_wheel, official(pin))
    stock = pip_check(environment)

    project = project_copy(tmp_path / "project")
    shutil.copytree(ROOT / "patches", project / "patches")
    pip(environment, "install", project)
    shutil.rmtree(project)
    before = hashes(site)
    assert "NOT VERIFIED" in call(command, "verify", code=1)
    call(command, "install", *options(pin))
    report = json.loads(call(command, "verify", *options(pin), "--json"))
    assert {fix["fix"] for fix in report["fixes"] if fix["by"] == "hash"} == carried(pin)
    assert pip_check(environment) == stock
    assert f"Version: {pin}\n" in run(environment / "bin" / "pip", "show", "vllm")

    assert hashes(site) != before
    call(command, "uninstall")
    assert hashes(site) == before
    assert "NOT VERIFIED" in call(command, "verify", code=1)

    other = OTHER[pin]
    call(command, "install", *options(pin))
    pip(environment, *from_wheel, official(other))
    told = call(command, "verify", code=1)
    assert f"vLLM {other}\n" in told and "NOT VERIFIED" in told
    assert not (site / f"vllm-{pin}.dist-info").exists()  # pip removed the patch set with the rest
    call(command, "install", *options(other))
    pip(environment, *from_wheel, "--ignore-installed", official(pin))
    told = call(command, "verify", code=1)
    assert "several versions" in told and f"a patch set is in vllm-{other}.dist-info" in told


def pip_check(environment: Path) -> str:
    """What pip misses, which is much: no dependency is installed."""
    told = run(environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "check", code=1)
    assert "requires torch" in told
    return told


def call(command: Path, *arguments: str, code: int = 0) -> str:
    """Run our command in its environment; it leaves no compiled files of itself."""
    return run(command, *arguments, code=code, PYTHONDONTWRITEBYTECODE="1")


def hashes(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Content, mode and time of change of every file; empty content for a folder."""
    found = {}
    for path in folder.rglob("*"):
        content = ""
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        stat = path.lstat()
        found[path.relative_to(folder).as_posix()] = (content, stat.st_mode, stat.st_mtime_ns if content else 0)
    return found
