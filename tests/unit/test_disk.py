"""Full disks and folders that cannot be written: told as such, nothing half-made, and well again afterwards.

All of it works as root and as a normal user, in a plain container too: as root the child process gives up the right
to pass over permissions; where no file system can be mounted, a limit on the size of files stands in for a full one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_apply import files_of
from test_checkout import assert_patched
from world import ENGINE, World, plain_git, scratch_left, snapshot

# --- permissions


def obey_permissions() -> None:
    """Run in the child: root without these two rights is bound by permissions like anybody else."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if libc.prctl(24, right, 0, 0, 0):  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "cannot give up a capability")


@contextlib.contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """No new name can be made in *folders*; checked, so that a test on them cannot pass by mistake."""
    for folder in folders:
        folder.chmod(0o555)
    try:
        for folder in folders:
            probe = ["touch", str(folder / "probe")]
            done = subprocess.run(probe, preexec_fn=obey_permissions, capture_output=True, check=False)
            assert done.returncode != 0, f"{folder} can be written"
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_cache_that_cannot_be_written(world: World) -> None:
    cache, before = world.cache / "vllm-patches", files_of(world.root)
    with read_only(cache):
        ran = world.apply(preexec_fn=obey_permissions)
    assert ran.status == 1
    assert ran.says("error: the folder cannot be written", f"file:     {cache / 'pristine-v1'}", "Permission denied")
    assert ran.says("next:     XDG_CACHE_HOME=/a/writable/folder make apply")
    assert files_of(world.root) == before
    assert world.apply().status == 0


def test_a_cache_that_cannot_be_written_but_has_all(world: World) -> None:
    assert world.apply().status == 0
    shutil.rmtree(world.build)
    folders = [path for path in world.cache.rglob("*") if path.is_dir()]
    with read_only(*folders):
        assert world.apply(preexec_fn=obey_permissions).status == 0
    assert world.head() == world.release().head


def test_a_cache_on_a_file_system_that_takes_nothing(world: World) -> None:
    """/sys: not even root makes a folder there, whatever the reason that the kernel gives."""
    assert Path("/sys/kernel").is_dir()
    ran = world.apply("--sdist", world.sdist(), env={"XDG_CACHE_HOME": "/sys/kernel"})
    assert ran.status == 1
    assert ran.says("error: the folder cannot be written", "file:     /sys/kernel/vllm-patches/pristine-v1", "next:")


@pytest.mark.parametrize("exists", [True, False])
def test_a_build_folder_that_cannot_be_written(world: World, exists: bool) -> None:
    if exists:
        world.build.mkdir()
    before = files_of(world.root)
    with read_only(world.build if exists else world.root):
        ran = world.apply(preexec_fn=obey_permissions)
    assert ran.status == 1
    assert ran.says("error: the folder cannot be written", f"file:     {world.build}", "BUILD=/a/writable/folder")
    assert files_of(world.root) == before


def test_an_already_patched_tree_in_a_folder_that_cannot_be_written(world: World) -> None:
    assert world.apply().status == 0
    with read_only(world.build):
        assert world.apply(preexec_fn=obey_permissions).says("already patched")


def test_a_catalogue_that_cannot_be_written(world: World) -> None:
    assert world.apply().status == 0
    (world.tree() / ENGINE).write_bytes((world.tree() / ENGINE).read_bytes() + b"more = 1\n")
    plain_git(world.tree(), "commit", "--quiet", "-a", "--amend", "--no-edit")
    before = snapshot(world.patches)
    with read_only(world.patches, world.patches / "v0.20.2"):
        ran = world.run("export", "--pin", "0.20.2", "--tree", world.tree(), preexec_fn=obey_permissions)
    assert ran.status == 1
    assert ran.says("the folder cannot be written", str(world.patches / "v0.20.2"), f"next:     ls -ld {world.patches}")
    assert snapshot(world.patches) == before


def _unchanged_source(source: Path) -> dict[str, str]:
    """All files but unreachable objects, and git's own notes of what it has done."""
    kept = snapshot(source, skip=(".git/objects", ".git/index", ".git/logs"))
    return {name: kind for name, kind in kept.items() if not kind.startswith("4")}


def test_a_checkout_whose_objects_cannot_be_written(world: World) -> None:
    source = world.checkout()
    before = _unchanged_source(source)
    folders = [path for path in (source / ".git").rglob("*") if path.is_dir()]
    with read_only(*folders, source / ".git"):
        ran = world.run("apply", "--src", source, preexec_fn=obey_permissions)
    assert ran.status == 1
    assert ran.says("error: ", f"file:     {source}", "next:")
    assert _unchanged_source(source) == before


@pytest.mark.parametrize("folder", ["vllm", "csrc", "tools"])
def test_a_checkout_whose_files_cannot_be_written(world: World, folder: str) -> None:
    """git gives up somewhere among the files; those that it has written by then are put back."""
    source = world.checkout()
    base, before = world.head(source), _unchanged_source(source)
    with read_only(source / folder):
        ran = world.run("apply", "--src", source, preexec_fn=obey_permissions)
    assert ran.status == 1
    assert ran.says("error: ", "Permission denied", f"file:     {source}", "next:")
    assert {name: kind.split()[-1] for name, kind in _unchanged_source(source).items()} == {
        name: kind.split()[-1] for name, kind in before.items()
    }, "the same content; git has written some of it twice"
    assert plain_git(source, "status", "--porcelain") == ""
    assert plain_git(source, "for-each-ref") == f"{base} commit\trefs/heads/main"
    assert world.run("apply", "--src", source).status == 0
    assert_patched(source, base)


# --- full disks

# In a mount namespace of its own: a small disk at $1, the command, what it left there; then more space, and again.
ON_A_SMALL_DISK = """\
disk=$1; size=$2; shift 2
mount -t tmpfs -o size="$size" none "$disk" || exit 99
"$@"; echo "status $?"
find "$disk" ! -type d -printf 'left %P\\n'
mount -o remount,size=64m "$disk" || exit 99
"$@"; echo "again $?"
git -C "$RESULT" rev-parse HEAD
"""


# git does not always tell the reason.
FULL = {"error: no space left on the device", "error: git cannot write: is the disk full?"}


@functools.cache
def _mounter() -> list[str]:
    """How this process may mount: as root, or in a user namespace; empty where it may not at all."""
    for command in (["unshare", "-m"], ["unshare", "-r", "-m"]):
        probe = [*command, "mount", "-t", "tmpfs", "none", "/mnt"]
        if shutil.which("unshare") and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return command
    warnings.warn("nothing can be mounted here: a full disk is tried by a limit on file sizes alone", stacklevel=1)
    return []


def _on_a_small_disk(world: World, disk: Path, size: str) -> list[str]:
    """The lines of the script; *disk* is the cache or the build folder."""
    command = [
        sys.executable,
        "-m",
        "vllm_patches",
        "apply",
        "--build",
        str(world.build),
        "--sdist",
        str(world.sdist()),
    ]
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    script = [*_mounter(), "sh", "-c", ON_A_SMALL_DISK, "sh", str(disk), size, *command]
    done = subprocess.run(
        script, env=world.env | {"RESULT": str(world.tree())}, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return (done.stdout + done.stderr).splitlines()


# Full at the first file of git's, at the objects, their index, a ref, the files, the index of the files.
SIZES = {"cache": ("4k", "12k", "20k"), "build": ("12k", "28k", "60k", "80k")}


@pytest.mark.parametrize("name", SIZES)
def test_a_full_disk(world: World, name: str) -> None:
    if not _mounter():
        _limited(world, name)
        return
    for size in SIZES[name]:
        for folder in (world.cache, world.build):
            shutil.rmtree(folder, ignore_errors=True)
        lines = _on_a_small_disk(world, getattr(world, name), size)
        shown = "\n".join([size, *lines])
        assert "status 1" in lines, shown
        assert FULL & set(lines), shown
        assert any(line.startswith("  next:     df -h ") and ".making-" not in line for line in lines), shown
        assert [line for line in lines if line.startswith("left ") and not line.endswith(".lock")] == [], shown
        assert "again 0" in lines, shown
        assert world.release().head in lines, shown


def _limited(world: World, name: str) -> None:
    """No file of more than *size* bytes: python is told so by an error, git dies of a signal."""
    for size in (0, 500, 2000, 4000):
        for folder in (world.cache, world.build):
            shutil.rmtree(folder, ignore_errors=True)

        def limit(size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        ran = world.apply("--sdist", world.sdist(), preexec_fn=limit)
        assert ran.status == 1, (name, size)
        assert ran.says("error: ", "next:")
        assert scratch_left(world.root) == []
        assert not world.tree().exists()
        assert world.apply("--sdist", world.sdist()).status == 0
        assert world.head() == world.release().head


def test_a_limit_on_the_size_of_files(world: World) -> None:
    """What `ulimit -f` and some job systems set; it also stands in for a full disk where none can be mounted."""
    _limited(world, "cache")


def test_a_git_that_was_killed_says_by_what(world: World) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    ran = world.apply(preexec_fn=limit)
    assert ran.status == 1
    assert ran.says("was killed by SIGXFSZ")


def test_a_full_disk_under_a_checkout(world: World) -> None:
    """The new objects do not fit: the checkout is as it was."""
    source = world.checkout()
    base, before = world.head(source), _unchanged_source(source)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))

    ran = world.run("apply", "--src", source, preexec_fn=limit)
    assert ran.status == 1
    assert ran.says("error: ", f"file:     {source}", "next:")
    assert _unchanged_source(source) == before
    assert plain_git(source, "for-each-ref") == f"{base} commit\trefs/heads/main"
    assert world.run("apply", "--src", source).status == 0
    assert_patched(source, base)
