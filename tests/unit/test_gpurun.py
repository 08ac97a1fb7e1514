"""What gsm8k runs and GPU cases share: real processes and sessions, a stand-in for vLLM's server, real copies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpurun.copies import patched_copy, whole_folder
from gpurun.process import run_to_end
from gpurun.provenance import commit, machine
from gpurun.server import ServerError, free_port, get, post, server_command, serving
from installs import ENGINE, make_catalog, put_in, snapshot
from vllm_patches.errors import PatchesError
from world import World, plain_git

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"
sys.path[:0] = [str(GPU)]

import targets  # noqa: E402

# As vLLM's: /health, JSON, an error with a text; and an "engine", a child of the server's that does not heed SIGINT.
SERVER = """
import http.server, json, os, signal, subprocess, sys, time
if "--die" in sys.argv: sys.exit("out of memory")
if "--slow" in sys.argv: time.sleep(60)
if "--engine" in sys.argv:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    engine = subprocess.Popen([sys.executable, "-c", code])
    open(sys.argv[sys.argv.index("--engine") + 1], "w").write(f"{os.getpid()} {engine.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.reply(200, b"{}")
    def do_POST(self):
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
        if self.path == "/broken": return self.reply(500, b"why")
        if self.path == "/gone": return
        self.reply(200, b"" if said is None else json.dumps({"said": said, "argv": sys.argv}).encode())
    def reply(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def stand_in(folder: Path) -> Path:
    """A folder whose `vllm` has the server's module, and is a source tree of 0.20.2 to the GPU cases' runner."""
    module = folder / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(SERVER, encoding="utf-8")
    for package in (folder / "vllm", folder / "vllm" / "entrypoints", module.parent):
        (package / "__init__.py").write_text("", encoding="utf-8")
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.20.2\n", encoding="utf-8")
    return folder


def lives(number: int) -> bool:
    """Whether the process is there, and no zombie that nobody has waited for."""
    stat = Path(f"/proc/{number}/stat")
    return stat.is_file() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


def gone(numbers: list[int]) -> bool:
    until = time.monotonic() + 5
    while any(map(lives, numbers)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(lives, numbers))


def numbers_in(file: Path) -> list[int]:
    return [int(word) for word in file.read_text(encoding="utf-8").split()]


# --- process


@pytest.mark.parametrize(
    ("code", "status"),
    [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV)],
)
def test_a_process_that_ends_by_itself(tmp_path: Path, code: str, status: int) -> None:
    assert run_to_end([sys.executable, "-c", f"print('said'); {code}"], os.environ, tmp_path / "log", 30) == status


def test_the_output_is_in_the_log_and_the_folder_is_the_given_one(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), flush=True); print('bad', file=sys.stderr)"
    assert run_to_end([sys.executable, "-c", code], os.environ, tmp_path / "log", 30, tmp_path) == 0
    assert (tmp_path / "log").read_text(encoding="utf-8") == f"{tmp_path}\nbad\n"


@pytest.mark.parametrize("hangs", [True, False])
def test_what_a_process_has_left_behind_is_ended_with_it(tmp_path: Path, hangs: bool) -> None:
    """One in the process group, and one in a group of its own, as a server is."""
    code = (
        "import subprocess, sys, time\n"
        "more = [subprocess.Popen(['sleep', '60']), subprocess.Popen(['sleep', '60'], process_group=0)]\n"
        "open('pids', 'w').write(' '.join(str(child.pid) for child in more))\n"
        f"time.sleep({60 if hangs else 0})\n"
    )
    status = run_to_end([sys.executable, "-c", code], os.environ, tmp_path / "log", 2 if hangs else 30, tmp_path)
    assert status == (None if hangs else 0)
    assert gone(numbers_in(tmp_path / "pids"))


# --- server


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(stand_in(tmp_path / "stand-in"))}


def test_a_server_is_ended_with_its_engine(tmp_path: Path, env: dict[str, str]) -> None:
    port, pids = free_port(), tmp_path / "pids"
    command = server_command(sys.executable, port, {"engine": pids})
    with serving(command, env, port, tmp_path / "log", 30) as address:
        assert get(address, "/health") == {}
        assert post(address, "/x", {"a": 1})["said"] == {"a": 1}
        assert post(address, "/sleep?level=1") is None
        with pytest.raises(ServerError, match="/broken answered 500: b'why'"):
            post(address, "/broken", 1)
        with pytest.raises(ServerError, match="/gone: no answer"):
            post(address, "/gone", 1)
        assert all(map(lives, numbers_in(pids)))
    assert gone(numbers_in(pids))
    with pytest.raises(ServerError, match="no answer"):
        post(address, "/x", 1)


@pytest.mark.parametrize(("option", "said"), [("die", "ended with status 1 before"), ("slow", "not ready after 1 s")])
def test_a_server_that_does_not_come_up(tmp_path: Path, env: dict[str, str], option: str, said: str) -> None:
    port, log = free_port(), tmp_path / "log"
    command = server_command(sys.executable, port, {option: True})
    with pytest.raises(ServerError, match=said), serving(command, env, port, log, 30 if option == "die" else 1):
        pass
    assert ("out of memory" in log.read_text(encoding="utf-8")) == (option == "die")


def test_engine_options_are_flags() -> None:
    options = {"model": "m", "enforce_eager": True, "enable_prefix_caching": False, "a": {"b": [1]}, "c": [2], "d": 3}
    assert server_command("python", 8000, options) == (
        "python", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "8000",
        "--model", "m", "--enforce-eager", "--no-enable-prefix-caching", "--a", '{"b": [1]}', "--c", "[2]", "--d", "3",
    )  # fmt: skip


CASES = '''
import time
from pathlib import Path
from gpu_case import case
from serving import Server

AT = ("0.20.2",)

def served(context):
    return Server(context, {"model": "m", "engine": str(context.shared / f"pids-{context.scratch.name}")}, {"A": "b"})

@case("answers", "0001", AT)
def answers(context):
    """The server answers."""
    with served(context) as api:
        assert api.get("/health") == {}
        assert "--served-model-name" in api.post("/x", 1)["argv"]
    try:
        api.post("/x", 1)
    except OSError as error:
        assert "no answer" in str(error)
        return {}
    raise AssertionError("it is still there")

@case("stuck", "0001", AT, limit=8.0)
def stuck(context):
    """The case is killed at its limit while its server runs."""
    with served(context):
        time.sleep(60)

@case("dead", "0001", AT)
def dead(context):
    """The server does not start."""
    with Server(context, {"die": True}, {}):
        pass
'''


@pytest.fixture
def cases(tmp_path: Path) -> Iterator[list[str]]:
    """The command that runs the cases of CASES with the stand-in on both sides."""
    folder = tmp_path / "cases"
    folder.mkdir()
    (folder / "synthetic.py").write_text(CASES, encoding="utf-8")
    sides = [str(stand_in(tmp_path / name)) for name in ("stock-tree", "patched-tree")]
    yield [sys.executable, str(GPU / "run.py"), "--stock", sides[0], "--patched", sides[1], "--cases", str(folder),
           "--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work"), "--jobs", "2"]  # fmt: skip


def test_a_cases_server_answers_and_does_not_outlive_it(
    tmp_path: Path, cases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PATCHES_COMMIT", "ab" * 20)  # for a test run in a copy without .git
    env = os.environ | {"VLLM_PATCHES_DIR": str(ROOT / "patches")}
    done = subprocess.run(cases, capture_output=True, text=True, check=False, env=env)
    (run,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["runs"]
    sides = {row["case"]: row["sides"] for row in run["cases"]}
    assert [sides["answers"][side]["outcome"] for side in ("stock", "patched")] == ["pass", "pass"], done.stdout
    assert [sides["stuck"][side]["outcome"] for side in ("stock", "patched")] == ["late", "late"]
    assert "ended with status 1 before it was ready: out of memory" in sides["dead"]["stock"]["detail"]
    assert run["commit"] == commit()
    (shared,) = (tmp_path / "work").glob("run-*/shared")
    files = list(shared.glob("pids-*"))
    assert {file.name for file in files} >= {"pids-stuck-stock", "pids-stuck-patched"}
    assert all(gone(numbers_in(file)) for file in files)


# --- copies


def test_a_copy_replaces_an_older_one_by_a_whole_one_only(tmp_path: Path) -> None:
    part = tmp_path / "stock" / "vllm"
    part.mkdir(parents=True)
    (part / "a.py").write_text("stock", encoding="utf-8")
    (tmp_path / "stock" / "one.py").write_text("one", encoding="utf-8")
    parts, copy = [part, tmp_path / "stock" / "one.py"], tmp_path / "work" / "copy"

    def patch(folder: Path) -> None:
        (folder / "vllm" / "a.py").unlink()
        (folder / "vllm" / "a.py").write_text("patched", encoding="utf-8")

    def fail(folder: Path) -> None:
        (folder / "vllm" / "a.py").unlink()
        raise PatchesError("no", file=str(folder / "vllm"))

    patched_copy(parts, copy, patch)
    (copy / "old").touch()
    with pytest.raises(PatchesError) as caught:
        patched_copy(parts, copy, fail)
    assert caught.value.file == str(copy.parent)
    assert (copy / "old").exists() and (copy / "vllm" / "a.py").read_text(encoding="utf-8") == "patched"
    patched_copy(parts, copy, patch)
    assert not (copy / "old").exists()
    assert (part / "a.py").read_text(encoding="utf-8") == "stock"
    assert (copy / "one.py").samefile(tmp_path / "stock" / "one.py")
    assert list(copy.parent.iterdir()) == [copy]


def test_what_a_killed_run_has_left_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "copy"
    (tmp_path / "work" / ".copy-left" / "new").mkdir(parents=True)
    with whole_folder(folder) as new:
        (new / "file").touch()
        assert not folder.exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_the_runner_patches_a_site_folder_by_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PATCHES_DIR", str(make_catalog(tmp_path / "patches").folder))
    site = tmp_path / "site"
    put_in(site, "0.20.2")
    (site / "other.py").write_text("x = 1\n", encoding="utf-8")
    before = snapshot(site, times=False)
    stock = targets.open_target(site, tmp_path / "work")
    for _ in range(2):
        patched = targets.make_patched(stock, tmp_path / "work")
        assert (stock.verified["0005"], patched.verified["0005"]) == ("missing", "present")
        assert (patched.folder / "other.py").samefile(site / "other.py")
    assert snapshot(site, times=False) == before
    assert (patched.folder / ENGINE).read_bytes() != (site / ENGINE).read_bytes()


def test_the_runner_patches_a_source_tree(world: World) -> None:
    tree, work = world.checkout(), world.root / "gpu-work"
    before = snapshot(tree / "vllm", times=False)
    patched = targets.make_patched(targets.open_target(tree, work), work)
    assert world.apply("--src", tree).status == 0
    for path in world.release().blobs:
        assert (patched.folder / path).read_bytes() == (tree / path).read_bytes()
    assert snapshot(tree / "vllm", times=False) != before


# --- provenance


def test_the_commit_is_gits_and_changes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PATCHES_COMMIT", "ab" * 20)
    plain_git(tmp_path, "init", "--quiet")
    assert commit(tmp_path) == "ab" * 20, "a repository without a commit is none"
    (tmp_path / "file").write_text("1", encoding="utf-8")
    plain_git(tmp_path, "add", "file")
    plain_git(tmp_path, "commit", "--quiet", "-m", "x")
    head = plain_git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "untracked").touch()
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert commit(tmp_path) == f"{head}+changes"


def test_a_copy_without_git_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("", "main"):
        monkeypatch.setenv("VLLM_PATCHES_COMMIT", wrong)
        with pytest.raises(PatchesError, match="must name the commit"):
            commit(tmp_path)
    for told in ("ab" * 20, "ab" * 20 + "+changes"):
        monkeypatch.setenv("VLLM_PATCHES_COMMIT", told)
        assert commit(tmp_path) == told


def fake_torch(folder: Path, available: bool) -> dict[str, str]:
    """An environment whose torch is a stand-in, and whose lm_eval is 9.9."""
    folder.mkdir()
    text = (
        "from types import SimpleNamespace as N\n__version__ = '1.2+cu3'\nversion = N(cuda='13.0')\n"
        f"cuda = N(is_available=lambda: {available}, get_device_name=lambda n: 'Some GPU', device_count=lambda: 2,\n"
        "    get_device_capability=lambda n: (9, 0), get_device_properties=lambda n: N(total_memory=80 * 2**30))\n"
    )
    (folder / "torch.py").write_text(text, encoding="utf-8")
    (folder / "lm_eval-9.9.dist-info").mkdir()
    (folder / "lm_eval-9.9.dist-info" / "METADATA").write_text("Name: lm_eval\nVersion: 9.9\n", encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("available", [True, False])
def test_the_machine_is_what_the_interpreter_says(tmp_path: Path, available: bool) -> None:
    found = machine(sys.executable, fake_torch(tmp_path / "site", available))
    assert (found["torch"], found["torch_cuda"], found["lm_eval"]) == ("1.2+cu3", "13.0", "9.9")
    told = (found["gpu"], found["gpus"], found["capability"], found["memory_gib"])
    assert told == (("Some GPU", 2, "9.0", 80) if available else ("none", 0, "", 0))
    assert found["os_kernel"].startswith("Linux ") and found["driver"]


def test_an_interpreter_without_torch_is_named(tmp_path: Path) -> None:
    env = fake_torch(tmp_path / "site", True)
    (tmp_path / "site" / "torch.py").write_text("raise ImportError('libcudart')", encoding="utf-8")
    with pytest.raises(PatchesError) as caught:
        machine(sys.executable, env)
    assert caught.value.file == sys.executable and "libcudart" in caught.value.found
