"""Faults of in-place installs: killed before any change on disk or in the middle of a write, full and read-only disks.

SIGKILL keeps what the kernel has. For a power cut the order of writes, fsyncs and renames is held against rules that
make one harmless; that the disk keeps its word is not tested here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from durability import Disk
from installs import (
    ENGINE,
    KERNEL,
    WORKER,
    become_nobody,
    in_child,
    killed_at,
    make_catalog,
    put_in,
    snapshot,
    sources,
    told_by_child,
)
from vllm_patches import swap
from vllm_patches.errors import PatchesError
from vllm_patches.installed import install as installing
from vllm_patches.installed.install import InstallOutcome, uninstall
from vllm_patches.installed.verify import verify
from vllm_patches.series.catalog import Catalog


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return loaded(tmp_path_factory.mktemp("catalog") / "patches")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of fsyncs take a minute, and a process that is killed loses nothing by leaving them out."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def loaded(folder: Path) -> Catalog:
    """A catalogue that is read already: a child that may read nothing else can use it."""
    catalog = make_catalog(folder)
    assert catalog.series and catalog.releases and catalog.fixes
    return catalog


def install(catalog: Catalog, site: Path) -> installing.Installed:
    return installing.install(catalog, site, (), lambda line: None)


def restore(site: Path) -> installing.Installed:
    return uninstall(site, lambda line: None)


class World:
    """A fresh site folder each time, and what it looks like before and after."""

    def __init__(self, catalog: Catalog, folder: Path) -> None:
        self.catalog, self.folder, self.count = catalog, folder, 0
        site = self.fresh()
        self.pristine = snapshot(site)
        install(catalog, site)
        self.patched = snapshot(site, times=False)

    def fresh(self) -> Path:
        self.count += 1
        site = self.folder / f"site{self.count}"
        put_in(site, "0.20.2")
        # The compiled files name their source by its path; here every copy shall be the same, byte for byte.
        for pyc in site.rglob("*.pyc"):
            pyc.write_bytes(b"compiled\n")
            os.utime(pyc, ns=(10**18, 10**18))
        record = site / "vllm-0.20.2.dist-info" / "RECORD"
        os.utime(record, ns=(10**18, 10**18))
        return site

    def installed(self) -> Path:
        site = self.fresh()
        install(self.catalog, site)
        return site

    def check_told(self, site: Path) -> None:
        """`verify` says that all is in only where all is in, and never stumbles."""
        report = verify(self.catalog, site)
        if report.ok:
            assert snapshot(site, times=False) == self.patched
        elif snapshot(site) != self.pristine:
            assert any("interrupted" in problem for problem in report.problems), report

    def check_ways_out(self, break_it: Callable[[Path], object]) -> None:
        """From the broken state both ways lead on: forward to the patched package, back to the pristine one."""
        forward, back = self.fresh_or_installed(), self.fresh_or_installed()
        break_it(forward)
        break_it(back)
        self.check_told(forward)
        install(self.catalog, forward)
        assert snapshot(forward, times=False) == self.patched
        assert verify(self.catalog, forward).ok
        restore(back)
        assert snapshot(back) == self.pristine

    start: Callable[[World], Path] = fresh

    def fresh_or_installed(self) -> Path:
        return type(self).start(self)


class InstalledWorld(World):
    start = World.installed


@pytest.fixture
def world(catalog: Catalog, tmp_path: Path) -> World:
    return World(catalog, tmp_path)


@pytest.fixture
def installed_world(catalog: Catalog, tmp_path: Path) -> InstalledWorld:
    return InstalledWorld(catalog, tmp_path)


def steps_until_done(world: World, action: Callable[[Path], object]) -> Iterator[int]:
    """1, 2, 3, ... as long as *action*, killed before that change on disk, does not come to its end."""
    step = 1
    while True:
        site = world.fresh_or_installed()
        if not killed_at(step, lambda at=site: action(at)):  # type: ignore[misc]
            return
        yield step
        step += 1


def test_install_killed_before_every_change(world: World) -> None:
    steps = 0
    for steps in steps_until_done(world, lambda site: install(world.catalog, site)):
        world.check_ways_out(lambda site, at=steps: killed_at(at, lambda: install(world.catalog, site)))  # type: ignore[misc]
    assert steps > 40  # journal, six originals, five new files, their renames, two compiled files


def test_uninstall_killed_before_every_change(installed_world: InstalledWorld) -> None:
    world, steps = installed_world, 0
    for steps in steps_until_done(world, restore):
        world.check_ways_out(lambda site, at=steps: killed_at(at, lambda: restore(site)))  # type: ignore[misc]
    assert steps > 15


def test_a_rollback_killed_before_every_change(world: World) -> None:
    """The second fault while the first is being mended."""
    broken = next(step for step in range(20, 100) if half_patched(world, step))

    def break_twice(site: Path, step: int) -> bool:
        assert killed_at(broken, lambda: install(world.catalog, site))
        return killed_at(step, lambda: restore(site))

    step = 1
    while break_twice(world.fresh(), step):
        world.check_ways_out(lambda site, at=step: break_twice(site, at))  # type: ignore[misc]
        step += 1
    assert step > 15


def half_patched(world: World, step: int) -> bool:
    """Whether an install that is killed there leaves some files patched and some not."""
    site = world.fresh()
    assert killed_at(step, lambda: install(world.catalog, site))
    changed = [name for name in (ENGINE, KERNEL, WORKER) if (site / name).read_bytes() != sources("0.20.2")[name]]
    return len(changed) == 2


def limit_files(size: int, *, deadly: bool) -> Callable[[], None]:
    """No file may grow past *size*: the write stops half-way, with an error or with a signal that kills."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


SIZES = (0, 1, 100, 300, 600, 900, 1200, 1500)  # the largest file that an install writes here has about 1,900 bytes


@pytest.mark.parametrize("size", SIZES)
def test_killed_in_the_middle_of_a_write(world: World, size: int) -> None:
    def tear(site: Path) -> None:
        assert in_child(lambda: install(world.catalog, site), limit_files(size, deadly=True)) == -signal.SIGXFSZ

    world.check_ways_out(tear)


@pytest.mark.parametrize("size", SIZES)
def test_no_space_is_an_error_and_leaves_nothing(world: World, size: int) -> None:
    site = world.fresh()
    code, message = told_by_child(lambda: install(world.catalog, site), limit_files(size, deadly=False))
    assert code == 1, message
    assert snapshot(site) == world.pristine
    assert "no space left" in message and "df -h" in message


@pytest.mark.parametrize("staged", range(1, 7))  # the journal, three files, patches.json, MODIFICATIONS
def test_a_full_device_is_an_error_and_leaves_nothing(
    world: World, staged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own ENOSPC, out of /dev/full in the place of the n-th new file."""
    site, real, left = world.fresh(), os.open, [staged]

    def full(path: object, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_EXCL:
            left[0] -= 1
            if not left[0]:
                return real("/dev/full", os.O_WRONLY)
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(PatchesError, match="no space left") as caught:
        install(world.catalog, site)
    monkeypatch.undo()
    assert left[0] == 0 and os.strerror(errno.ENOSPC) in caught.value.found
    assert snapshot(site) == world.pristine


def test_uninstall_needs_no_space(world: World) -> None:
    site = world.installed()
    assert in_child(lambda: restore(site), limit_files(0, deadly=True)) == 0
    assert snapshot(site) == world.pristine


@pytest.mark.parametrize("locked_folder", ["vllm-0.20.2.dist-info", "vllm/ops", "vllm"])
def test_a_site_that_cannot_be_written(reachable: Path, locked_folder: str) -> None:
    catalog, site = loaded(reachable / "patches"), reachable / "site"
    put_in(site, "0.20.2")
    for path in (site, *site.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    (site / locked_folder).chmod(0o555)
    before = snapshot(site)
    code, message = told_by_child(lambda: install(catalog, site), become_nobody)
    assert code == 1, message
    assert snapshot(site) == before
    assert "cannot be written by this user" in message and "as it was before" in message and "ls -ld" in message
    assert not verify(catalog, site).problems


def test_verify_needs_no_right_to_write(reachable: Path) -> None:
    catalog, site = loaded(reachable / "patches"), reachable / "site"
    put_in(site, "0.20.2")
    (site / ENGINE).chmod(0o644)
    install(catalog, site)
    for folder in (site, *(path for path in site.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    try:
        assert in_child(lambda: verify(catalog, site).ok or os._exit(9), become_nobody) == 0
    finally:
        for folder in (site, *(path for path in site.rglob("*") if path.is_dir())):
            folder.chmod(0o755)


def test_several_at_once_install_once(world: World) -> None:
    site = world.fresh()
    outcomes: list[InstallOutcome] = []
    runs = [threading.Thread(target=lambda: outcomes.append(install(world.catalog, site).outcome)) for _ in range(6)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(outcome.name for outcome in outcomes) == ["ALREADY"] * 5 + ["INSTALLED"]
    assert snapshot(site, times=False) == world.patched


def test_a_second_one_waits_and_says_so(world: World) -> None:
    site, said = world.fresh(), threading.Event()
    done = threading.Thread(target=lambda: installing.install(world.catalog, site, (), lambda line: said.set()))
    with swap.locked(site / "vllm-0.20.2.dist-info", lambda: None):
        done.start()
        assert said.wait(10)
        done.join(0.3)
        assert done.is_alive()
        assert snapshot(site) == world.pristine
    done.join(10)
    assert snapshot(site, times=False) == world.patched


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(world: World, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk of a test lacks them, so the call is made to fail. Where nobody can write, who reads needs no lock."""
    fresh, done = world.fresh(), world.installed()

    def no_locks(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for action in (lambda: install(world.catalog, fresh), lambda: restore(done)):
        with pytest.raises(PatchesError, match="has no locks") as caught:
            action()
        assert "findmnt" in caught.value.next_command and os.strerror(code) in caught.value.found
    assert verify(world.catalog, done).ok
    assert snapshot(fresh) == world.pristine
    assert snapshot(done, times=False) == world.patched


def test_another_error_of_the_lock_is_not_hidden(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"):
        install(world.catalog, world.fresh())


def test_a_power_cut_at_any_moment_finds_the_journal_and_whole_files(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = world.fresh()
    state = site / "vllm-0.20.2.dist-info" / "vllm-patches"
    disk = Disk(monkeypatch)
    install(world.catalog, site)
    disk.check()
    named = disk.named()
    assert named[0] == state / "installing.json" and named[-1] == state / "installed.json"
    assert named[-2] == site / "vllm-0.20.2.dist-info" / "RECORD"
    first_live = min(named.index(site / name) for name in (ENGINE, KERNEL, WORKER))
    kept = {state / "original" / name for name in (ENGINE, KERNEL, WORKER, "vllm-0.20.2.dist-info/RECORD")}
    assert kept < set(named[:first_live])  # every original is safe before the first file goes

    disk = Disk(monkeypatch)
    restore(site)
    disk.check()
    assert disk.named()[0] == state / "uninstalling.json"
    assert disk.removed()[-1] == state / "uninstalling.json"
    monkeypatch.undo()
    assert snapshot(site) == world.pristine


def test_an_interrupted_install_is_rolled_back_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two renames."""
    site, rename, seen = world.fresh(), swap.rename, []

    def interrupt(source: Path, target: Path) -> None:
        seen.append(target)
        if target.name == Path(KERNEL).name and len(seen) < 5:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(swap, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        install(world.catalog, site)
    assert snapshot(site) == world.pristine


def test_a_file_that_changes_while_it_is_patched_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site, stage = world.fresh(), swap.stage

    def change(target: Path, data: bytes, like: os.stat_result | None = None) -> Path:
        if target.name == Path(WORKER).name:
            target.unlink()
            target.write_bytes(b"mine\n")
        return stage(target, data, like)

    monkeypatch.setattr(swap, "stage", change)
    with pytest.raises(PatchesError):
        install(world.catalog, site)
    monkeypatch.undo()
    assert (site / WORKER).read_bytes() == b"mine\n"
    report = verify(world.catalog, site)
    assert not report.ok and any("interrupted" in problem for problem in report.problems)
    (site / WORKER).rename(site / "mine")
    restore(site)
    (site / "mine").unlink()
    assert snapshot(site) == world.pristine


@pytest.mark.parametrize("keep_link", [True, False])
def test_originals_are_kept_where_links_are_not_possible(
    world: World, monkeypatch: pytest.MonkeyPatch, keep_link: bool
) -> None:
    def no_link(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not keep_link:
        monkeypatch.setattr(os, "link", no_link)
    site = world.installed()
    assert snapshot(site, times=False) == world.patched
    restore(site)
    assert snapshot(site) == world.pristine
