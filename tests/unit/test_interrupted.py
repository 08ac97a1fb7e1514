"""Killed, interrupted, or met by another run: the next one ends in the same commit, and nothing is left over.

Two ways to choose the moment: a `git` before the real one on PATH that kills its caller at its n-th call, which
reaches every step for certain, and plain delays, which reach what lies between.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_checkout import assert_patched
from world import World, plain_git, scratch_left, snapshot

# The n-th call of git: kill the caller alone, or its whole group (a closed terminal, a cancelled job).
SABOTEUR = """\
#!/bin/sh
echo "$*" >> "$CALLS"
if [ "$(wc -l < "$CALLS")" -eq "$AT" ]; then
  case $HOW in
    wait) exec sleep 30 ;;
    slow) sleep 0.7 ;;
    before) kill -KILL $PPID; exit 1 ;;
    after) "$REAL" "$@"; kill -KILL $PPID; exit 1 ;;
    orphan) kill -KILL $PPID; sleep 0.3; exec "$REAL" "$@" ;;
    group) "$REAL" "$@" & sleep 0.003; kill -KILL -$PPID ;;
  esac
fi
exec "$REAL" "$@"
"""


def _saboteur(world: World, at: int, how: str) -> dict[str, str]:
    """The environment in which the *at*-th call of git strikes."""
    folder = world.root / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "git").write_text(SABOTEUR, encoding="utf-8")
    (folder / "git").chmod(0o755)
    calls = world.root / "calls"
    calls.unlink(missing_ok=True)
    real = shutil.which("git") or ""
    path = f"{folder}:{os.environ['PATH']}"
    return {"PATH": path, "REAL": real, "CALLS": str(calls), "AT": str(at), "HOW": how}


def _calls(world: World) -> list[str]:
    return (world.root / "calls").read_text(encoding="utf-8").splitlines()


def _ends_well(world: World) -> None:
    """The next run: the recorded head, and no trace of the killed one in build folder or cache."""
    ran = world.apply()
    assert ran.status == 0, ran
    assert world.head() == world.release().head
    assert plain_git(world.tree(), "status", "--porcelain", "--ignored") == ""
    assert scratch_left(world.root) == []
    assert sorted(path.name for path in world.build.iterdir()) == [".lock", "vllm-0.20.2"]
    assert world.apply().says("already patched")


def _heat(world: World) -> None:
    assert world.apply().status == 0
    shutil.rmtree(world.build)


def _call(world: World, *arguments: object, of: str, which: int = -1) -> int:
    """The number of the last (or another) call of `git <of>` in an undisturbed run."""
    assert world.run(*arguments, env=_saboteur(world, 0, "")).status == 0
    return [number for number, call in enumerate(_calls(world), 1) if f" {of} " in call][which]


# Every third call of git in each, so that the work is shared by the workers of a test run.
THIRDS = pytest.mark.parametrize("start", [1, 2, 3])


@THIRDS
def test_killed_at_each_call_of_git_with_a_cold_cache(world: World, start: int) -> None:
    cold = shutil.copytree(world.cache, world.root / "cold")
    for at in range(start, 100, 3):
        ran = world.apply(env=_saboteur(world, at, "before"))
        if ran.status == 0:
            break
        assert ran.status == -signal.SIGKILL
        _ends_well(world)
        for folder in (world.build, world.cache):
            shutil.rmtree(folder)
        shutil.copytree(cold, world.cache)
    assert at > 10, "an apply calls git more often than that"


@pytest.mark.parametrize("of", ["fast-import", "checkout"])
@pytest.mark.parametrize("how", ["after", "group", "orphan"])
def test_killed_while_git_works(world: World, of: str, how: str) -> None:
    """Right behind it; together with it (a closed terminal); and alone, so that git goes on for a while."""
    _heat(world)
    at = _call(world, "apply", "--build", world.build, of=of)
    shutil.rmtree(world.build)
    assert world.apply(env=_saboteur(world, at, how)).status == -signal.SIGKILL
    _ends_well(world)


@pytest.mark.parametrize("how", ["group", "orphan"])
def test_killed_while_git_reads_the_sdist(world: World, how: str) -> None:
    """The second call, with a cold cache: the import of all files."""
    ran = world.apply(env=_saboteur(world, 2, how))
    assert ran.status == -signal.SIGKILL
    assert "fast-import" in _calls(world)[1]
    _ends_well(world)


@pytest.mark.parametrize("cache", ["cold", "hot"])
def test_killed_at_any_moment(world: World, cache: str) -> None:
    if cache == "hot":
        _heat(world)
    begun = time.monotonic()
    assert world.apply().status == 0
    whole = time.monotonic() - begun
    for step in range(5):
        shutil.rmtree(world.build)
        if cache == "cold":
            shutil.rmtree(world.cache / "vllm-patches" / "pristine-v1", ignore_errors=True)
        with world.start("apply", "--build", world.build) as process:
            time.sleep(whole * (step + 1) / 6)
            os.killpg(process.pid, signal.SIGKILL)
        world.apply()
        _ends_well(world)


def test_killed_while_an_old_tree_is_replaced(world: World) -> None:
    assert world.apply().status == 0
    patch = world.patch("0005")
    patch.write_bytes(patch.read_bytes().replace(b"Why: because", b"Why: only because"))
    assert world.run("record").status == 0
    for at in (1, 4, 8, 11):
        assert world.apply(env=_saboteur(world, at, "before")).status == -signal.SIGKILL
        assert plain_git(world.tree(), "status", "--porcelain") == "", "the old tree is whole"
    _ends_well(world)


# --- a user's checkout


@THIRDS
def test_a_checkout_is_as_before_or_patched(world: World, start: int) -> None:
    for at in range(start, 100, 3):
        source = world.checkout(name=f"src{at}")
        base, before = world.head(source), snapshot(source, skip=(".git",))
        ran = world.run("apply", "--src", source, env=_saboteur(world, at, "before"))
        if ran.status == 0:
            break
        assert ran.status == -signal.SIGKILL
        if " switch " in "".join(_calls(world)[:-1]):
            assert_patched(source, base)
        else:
            assert snapshot(source, skip=(".git",)) == before
            assert plain_git(source, "symbolic-ref", "--short", "HEAD") == "main"
        assert world.run("apply", "--src", source).status == 0
        assert_patched(source, base)
        assert scratch_left(source) == []
    assert at > 15, "an apply on a checkout calls git more often than that"


def test_a_switch_that_outlives_its_killed_caller(world: World) -> None:
    at = _call(world, "apply", "--src", world.checkout(name="other"), of="switch")
    source = world.checkout()
    base = world.head(source)
    with world.start("apply", "--src", source, env=_saboteur(world, at, "orphan")) as process:
        assert process.wait(30) == -signal.SIGKILL
    for _ in range(200):
        if world.head(source) != base and not scratch_left(source):
            break
        time.sleep(0.05)
    assert_patched(source, base)
    assert world.run("apply", "--src", source).says("already patched")


@pytest.mark.parametrize("how", ["group", "orphan"])
def test_a_checkout_killed_while_git_makes_the_commits(world: World, how: str) -> None:
    at = _call(world, "apply", "--src", world.checkout(name="other"), of="fast-import")
    source = world.checkout()
    base, before = world.head(source), snapshot(source, skip=(".git",))
    assert world.run("apply", "--src", source, env=_saboteur(world, at, how)).status == -signal.SIGKILL
    assert snapshot(source, skip=(".git",)) == before
    _wait_for_the_orphan(source)
    assert world.run("apply", "--src", source).status == 0
    assert_patched(source, base)


def _wait_for_the_orphan(source: Path) -> None:
    """Until the git that outlived its caller has made its ref; killed before it had its input, it makes none."""
    for _ in range(40):
        if plain_git(source, "for-each-ref", "refs/vllm-patches"):
            return
        time.sleep(0.05)


def test_a_checkout_killed_at_any_moment(world: World) -> None:
    for step in range(5):
        source = world.checkout(name=f"src{step}")
        base = world.head(source)
        with world.start("apply", "--src", source) as process:
            time.sleep(0.1 + 0.08 * step)
            process.kill()
        ran = _again(world, source)
        assert ran == 0
        assert_patched(source, base)


def _again(world: World, source: Path) -> int:
    """Until the orphaned git of the killed run, if there is one, has let go of its lock."""
    for _ in range(50):
        ran = world.run("apply", "--src", source)
        if "index.lock" not in ran.err:
            return ran.status
        time.sleep(0.1)
    return 1


# --- Ctrl-C


def _interrupt(
    world: World, *arguments: object, at: int, how: str = "wait", send: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """SIGINT to the whole group, as terminals send it, or SIGTERM to the process, while git is at its *at*-th call."""
    with world.start(*arguments, env=_saboteur(world, at, how)) as process:
        while not (world.root / "calls").exists() or len(_calls(world)) < at:
            assert process.poll() is None
            time.sleep(0.005)
        (os.killpg if send is signal.SIGINT else os.kill)(process.pid, send)
        try:
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()  # one that did not hear would be waited for without end
    return process.returncode, err


@pytest.mark.parametrize(
    ("send", "at"), [(signal.SIGINT, at) for at in (1, 2, 5, 8, 11)] + [(signal.SIGTERM, at) for at in (1, 5, 11)]
)
def test_an_interrupt_leaves_nothing(world: World, send: signal.Signals, at: int) -> None:
    """Ctrl-C; or `kill` and `timeout`, which signal the process alone: the git that it waits for goes with it."""
    status, err = _interrupt(world, "apply", "--build", world.build, at=at, send=send)
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143}[send]
    assert "interrupted; nothing half-made is left, run it again" in err
    assert "Traceback" not in err
    assert scratch_left(world.root) == []
    assert [path.name for path in world.build.iterdir()] == [".lock"]
    _ends_well(world)


@pytest.mark.parametrize("of", ["status", "fast-import", "update-ref"])
def test_ctrl_c_leaves_a_checkout_as_it_was(world: World, of: str) -> None:
    which = 0 if of == "status" else -1  # the last status is part of the switch
    at = _call(world, "apply", "--src", world.checkout(name="other"), of=of, which=which)
    source = world.checkout()
    base, before = world.head(source), snapshot(source, skip=(".git",))
    status, _ = _interrupt(world, "apply", "--src", source, at=at)
    assert status == 130
    assert snapshot(source, skip=(".git",)) == before
    assert plain_git(source, "for-each-ref") == f"{base} commit\trefs/heads/main"
    assert world.run("apply", "--src", source).status == 0
    assert_patched(source, base)


def test_ctrl_c_waits_for_the_switch(world: World) -> None:
    """Half a switch would be neither the old checkout nor the patched one."""
    at = _call(world, "apply", "--src", world.checkout(name="other"), of="switch")
    source = world.checkout()
    base = world.head(source)
    status, _ = _interrupt(world, "apply", "--src", source, at=at, how="slow")
    assert status == 0
    assert_patched(source, base)


def test_ctrl_c_while_waiting(world: World) -> None:
    world.build.mkdir()
    with (world.build / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with world.start("apply", "--build", world.build) as process:
            assert process.stderr
            assert process.stderr.readline() == f"waiting for another apply in {world.build}\n"
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(20) == 130
            finally:
                process.kill()  # a process that did not hear would be waited for without end
    assert sorted(path.name for path in world.build.iterdir()) == [".lock"]


# --- two at once


def test_two_at_once_both_end_well_and_one_says_that_it_waits(world: World) -> None:
    with world.start("apply", "--build", world.build, env=_saboteur(world, 2, "slow")) as first:
        while not (world.root / "calls").exists():
            time.sleep(0.005)
        with world.start("apply", "--build", world.build) as second:
            outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert "vLLM 0.20.2: applied" in outputs[0][0]
    assert "already patched" in outputs[1][0]
    assert outputs[1][1] == f"waiting for another apply in {world.build}\n"
    assert world.head() == world.release().head


def test_two_at_once_on_one_checkout(world: World) -> None:
    source = world.checkout()
    base = world.head(source)
    with world.start("apply", "--src", source, env=_saboteur(world, 8, "slow")) as first:
        while not (world.root / "calls").exists():
            time.sleep(0.005)
        second = world.run("apply", "--src", source)
        out, _ = first.communicate(timeout=60)
    assert sorted("already patched" in text for text in (out, second.out)) == [False, True]
    assert (first.returncode, second.status) == (0, 0)
    assert_patched(source, base)


def test_two_builds_with_one_cold_cache(world: World) -> None:
    """Both make the pristine objects; the slower one finds the folder there, and takes it."""
    script = (
        '#!/bin/sh\ncase "$*" in *fast-import*) touch "$MEET/$PPID"; '
        'until [ "$(ls "$MEET" | wc -l)" -ge 2 ]; do sleep 0.01; done ;; esac\nexec "$REAL" "$@"\n'
    )
    env = _saboteur(world, 0, "") | {"MEET": str(world.root / "meet")}
    (world.root / "meet").mkdir()
    (world.root / "bin" / "git").write_text(script, encoding="utf-8")
    builds = [world.root / "one", world.root / "two"]
    started = [world.start("apply", "--build", build, env=env) for build in builds]
    for process in started:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert {world.head(build / "vllm-0.20.2") for build in builds} == {world.release().head}
    assert scratch_left(world.root) == []


def test_many_at_once(world: World) -> None:
    started = [
        world.start("apply", "--build", world.build, "--pin", pin) for pin in ("0.20.2", "0.21.0", "0.20.2", "0.20.1")
    ]
    for process in started:
        process.communicate(timeout=60)
    assert [process.returncode for process in started] == [0] * 4
    for pin in ("0.20.1", "0.20.2", "0.21.0"):
        assert world.head(world.tree(pin)) == world.release(pin).head


def test_a_lock_that_is_left_by_a_dead_process_does_not_hold(world: World) -> None:
    world.build.mkdir()
    (world.build / ".lock").write_text("12345", encoding="utf-8")
    assert "waiting" not in world.apply().err
