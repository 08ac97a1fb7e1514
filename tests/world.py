"""A small synthetic world for the unit tests: fake vLLM sdists, a sound catalogue, and the command line on both.

Everything in it is real: tarballs, git repositories, patch files out of `git format-patch`, processes. The recorded
heads are computed the plain way (tar, git init, git am), never by the code under test.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm_patches.series.catalog import Catalog
from vllm_patches.series.headers import ORIGIN, REPOSITORY, SECTIONS
from vllm_patches.series.model import FIX_IDS, IDENT_EMAIL, IDENT_NAME, FixState, Release, State
from vllm_patches.series.tables import dump_releases
from vllm_patches.trees import git
from vllm_patches.upkeep.matrix import BEGIN, END, render_matrix

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SLUGS = ("dsa-mtp-ima", "gdn-null-block-guard", "mla-flat-buffer", "rocm-kv-strides", "mrv2-wake-up")
PATCH_DATE = "Sat, 21 Nov 2026 00:00:00 +0000"

ENGINE, KERNEL, SCRIPT = "vllm/engine.py", "csrc/kernel.cu", "tools/run.sh"

Files = dict[str, bytes]


def _numbered(stem: str, count: int) -> bytes:
    return b"".join(f"{stem} = {number}\n".encode() for number in range(1, count + 1))


def sdist_files(version: str) -> Files:
    """The files of one fake release; 0.20.1 and 0.20.2 differ in untouched files only, 0.21.0 in touched ones."""
    newer = b"// moved on\n" if version == "0.21.0" else b""
    return {
        ".gitignore": b"/vllm/_version.py\n*.so\n",
        "PKG-INFO": f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n".encode(),
        "README.md": f"vLLM {version}\n".encode(),
        "docs/caf\u00e9.md": "Caf\u00e9\n".encode(),
        "vllm/__init__.py": b"",
        "vllm/_version.py": f"__version__ = version = '{version}'\n".encode(),
        ENGINE: newer.replace(b"//", b"#") + _numbered("step", 60),
        KERNEL: newer + _numbered("int lane", 40),
        SCRIPT: b"#!/bin/sh\nset -e\necho start\necho run\nexec true",  # no newline at its end
    }


@dataclass(frozen=True)
class Change:
    """One patch to be made: for each file, pairs of old and new text."""

    fix: str
    subject: str
    edits: dict[str, tuple[tuple[bytes, bytes], ...]]


# 0003 changes the context of 0001 (its lines are two apart), and it touches two files.
FIRST = Change(
    "0001",
    "engine: take the third step twice",
    {ENGINE: ((b"step = 20\n", b"step = 20\nstep = 20.5\n"), (b"step = 50\n", b"step = 50 + 0\n"))},
)
SECOND = Change(
    "0003",
    "kernel: widen the lanes",
    {
        ENGINE: ((b"step = 22\n", b"step = 22 * 1\n"),),
        KERNEL: ((b"int lane = 9\n", b"long lane = 9\n"), (b"int lane = 30\n", b"")),
    },
)
THIRD = Change("0005", "tools: run it", {SCRIPT: ((b"exec true", b"exec true --now\n"),)})

SERIES = {"v0.20.2": (FIRST, SECOND, THIRD), "v0.21.0": (SECOND,)}
SERVED = {"v0.20.2": ("0.20.1", "0.20.2"), "v0.21.0": ("0.21.0",)}

_LIVE = {"0001": State.LIVE, "0002": State.FIXED, "0003": State.LATENT, "0004": State.ABSENT, "0005": State.LIVE}
STATES = {
    "0.19.0": dict.fromkeys(FIX_IDS, State.LIVE) | {"0005": State.ABSENT},
    "0.20.1": _LIVE,
    "0.20.2": _LIVE,
    "0.21.0": dict.fromkeys(FIX_IDS, State.FIXED) | {"0003": State.LIVE},
    "0.22.0": dict.fromkeys(FIX_IDS, State.FIXED) | {"0004": State.ABSENT, "0005": State.BROKEN},
}
PINS = ("0.20.1", "0.20.2", "0.21.0")


def write_sdist(path: Path, files: Files, top: str, executable: tuple[str, ...] = (SCRIPT,)) -> Path:
    """A .tar.gz with one top folder, the same bytes each time."""
    members = [(f"{top}/{name}", data, 0o755 if name in executable else 0o644) for name, data in files.items()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, mode in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
    return write_gzip(path, buffer.getvalue())


def write_gzip(path: Path, tar: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(tar, mtime=0))
    return path


def edited(change: Change, files: Files) -> Files:
    """The files after *change*; an edit that finds nothing is a mistake in the tests."""
    result = dict(files)
    for path, pairs in change.edits.items():
        for old, new in pairs:
            assert result[path].count(old) == 1, (path, old)
            result[path] = result[path].replace(old, new)
    return result


def message(change: Change, series: str, *, requires: str = "none") -> str:
    """A commit message that keeps every rule of headers.py."""
    prose = "\n\n".join(f"{label}: because the fake engine needs it." for label in SECTIONS)
    return f"""\
{change.subject}

{prose}

Origin: {ORIGIN}
Bug: {REPOSITORY}/issues/1
Forwarded: no
Applied-Upstream: no
Last-Update: 2026-11-21
Upstream-Status: Pending
Applies-To: {", ".join(SERVED[series])}
Requires: {requires}
Test: tests/repro/test_proof.py::test_proof[{change.fix}-{series.removeprefix("v")}]
"""


def plain_env(**extra: str) -> dict[str, str]:
    """An environment for git in which nothing of the machine's user counts."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": IDENT_NAME,
        "GIT_AUTHOR_EMAIL": IDENT_EMAIL,
        "GIT_COMMITTER_NAME": IDENT_NAME,
        "GIT_COMMITTER_EMAIL": IDENT_EMAIL,
        **extra,
    }


def sh(cwd: Path, *command: str, env: dict[str, str] | None = None, stdin: str = "") -> str:
    """A command that has to succeed; its standard output."""
    done = subprocess.run(
        command, cwd=cwd, env=env or plain_env(), input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout.rstrip("\n")


def plain_git(cwd: Path, *arguments: str, env: dict[str, str] | None = None, stdin: str = "") -> str:
    return sh(cwd, "git", *arguments, env=env, stdin=stdin)


def write_tree(folder: Path, files: Files) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if name == SCRIPT else 0o644)


def plain_tree(folder: Path, sdist: Path, release: Release, patches: list[Path]) -> str:
    """The way a person would do it, in a plain environment; returns HEAD."""
    folder.mkdir(parents=True)
    sh(folder, "tar", "xzf", str(sdist), "--strip-components=1")
    when = f"{release.date.isoformat()}T00:00:00+0000"
    env = plain_env(GIT_AUTHOR_DATE=when, GIT_COMMITTER_DATE=when)
    plain_git(folder, "init", "--quiet", "--initial-branch=pristine")
    plain_git(folder, "add", "-A", "-f")
    text = f"vLLM {release.version}, as in {release.sdist}\n\nsha256: {release.sha256}\n"
    plain_git(folder, "commit", "--quiet", "-F", "-", env=env, stdin=text)
    plain_git(folder, "am", "--quiet", "--committer-date-is-author-date", *map(str, patches))
    return plain_git(folder, "rev-parse", "HEAD")


def make_series(folder: Path, scratch: Path, name: str) -> None:
    """Write the patches of the series *name* by `git format-patch`, as `export` would."""
    files = sdist_files(SERVED[name][0])
    write_tree(scratch, files)
    plain_git(scratch, "init", "--quiet")
    plain_git(scratch, "add", "-A", "-f")
    env = plain_env(GIT_AUTHOR_DATE=PATCH_DATE, GIT_COMMITTER_DATE=PATCH_DATE)
    plain_git(scratch, "commit", "--quiet", "-m", "pristine", env=env)
    folder.mkdir(parents=True)
    names = []
    for change in SERIES[name]:
        files = edited(change, files)
        write_tree(scratch, {path: files[path] for path in change.edits})
        plain_git(scratch, "commit", "--quiet", "-a", "-F", "-", env=env, stdin=message(change, name))
        names.append(f"{change.fix}-{SLUGS[FIX_IDS.index(change.fix)]}.patch")
        (folder / names[-1]).write_bytes(git.format_patch(scratch, "HEAD"))
    (folder / "series").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")


def fixes_toml() -> str:
    rows = []
    for fix, slug in zip(FIX_IDS, SLUGS, strict=True):
        rows.append(
            f'[[fix]]\nid = "{fix}"\nslug = "{slug}"\ntitle = "{slug.replace("-", " ")}"\ndefect = "d"\n'
            'symptom = "s"\nupstream_pr = [1]\nintroduced_by = "i"\nfirst_fixed = "f"\nseverity = "crash"\n'
            'removal = "r"\nparts = ["a"]\n'
        )
    return "\n".join(rows)


def bare_release(version: str, sdist: Path | None) -> Release:
    """The table's row without what `record` fills in."""
    data = sdist.read_bytes() if sdist else b""
    states = {
        fix: FixState(state, f"{ENGINE}:{number}") for number, (fix, state) in enumerate(STATES[version].items(), 1)
    }
    if version == "0.22.0":
        states["0004"] = replace(states["0004"], note="removed with the old runner")
    series = next((name for name, served in SERVED.items() if version in served), "")
    return Release(
        version=version,
        date=datetime.date(2026, 3, int(version.split(".")[1])),
        sdist=f"vllm-{version}.tar.gz",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        states=states,
        series=series,
    )


def recorded(release: Release, patches: Path, sdist: Path, scratch: Path) -> Release:
    """*release* with the head and blobs that the plain way gives."""
    names = (patches / release.series / "series").read_text(encoding="utf-8").split()
    head = plain_tree(scratch, sdist, release, [patches / release.series / name for name in names])
    root = plain_git(scratch, "rev-list", "--max-parents=0", "HEAD")
    touched = sorted({path for change in SERIES[release.series] for path in change.edits})
    blobs = {path: plain_git(scratch, "rev-parse", f"{root}:{path}") for path in touched}
    return replace(release, head=head, blobs=blobs, revision=1)


def make_template(folder: Path) -> Path:
    """The whole world once; tests work on copies (`World.copy_of`)."""
    patches = folder / "project" / "patches"
    patches.mkdir(parents=True)
    (patches / "fixes.toml").write_text(fixes_toml(), encoding="utf-8")
    for name in SERIES:
        make_series(patches / name, folder / "scratch" / name, name)
    releases = {version: _template_release(folder, patches, version) for version in STATES}
    (patches / "releases.toml").write_text(dump_releases(releases), encoding="utf-8")
    matrix = f"{BEGIN}\n{render_matrix(Catalog(patches))}{END}\n"
    (patches.parent / "README.md").write_text(f"# fake\n\n{matrix}", encoding="utf-8")
    (folder / "home").mkdir()
    shutil.rmtree(folder / "scratch")
    return folder


def _template_release(folder: Path, patches: Path, version: str) -> Release:
    """One row; the sdist of a pin is made, and put into the cache."""
    if version not in PINS:
        return bare_release(version, None)
    made = write_sdist(folder / "sdists" / f"vllm-{version}.tar.gz", sdist_files(version), f"vllm-{version}")
    bare = bare_release(version, made)
    cached = folder / "cache" / "vllm-patches" / "sdist" / bare.sha256 / bare.sdist
    cached.parent.mkdir(parents=True)
    shutil.copyfile(made, cached)
    return recorded(bare, patches, made, folder / "scratch" / version)


@dataclass(frozen=True)
class Ran:
    """What one command line did."""

    status: int
    out: str
    err: str

    def says(self, *parts: str) -> bool:
        """True if every part stands in the output; the assertion's message shows the rest."""
        missing = [part for part in parts if part not in self.out + self.err]
        assert not missing, f"missing {missing} in:\n{self.out}\n{self.err}"
        return True


@dataclass(frozen=True)
class World:
    """One test's own copy of the template."""

    root: Path
    extra: dict[str, str] = field(default_factory=dict)

    @classmethod
    def copy_of(cls, template: Path, root: Path) -> World:
        shutil.copytree(template, root)
        return cls(root)

    @property
    def patches(self) -> Path:
        return self.root / "project" / "patches"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.patches)

    def release(self, version: str = "0.20.2") -> Release:
        return self.catalog.release(version)

    def sdist(self, version: str = "0.20.2") -> Path:
        return self.root / "sdists" / f"vllm-{version}.tar.gz"

    def tree(self, version: str = "0.20.2") -> Path:
        return self.build / f"vllm-{version}"

    def patch(self, number: str = "0001", series: str = "v0.20.2") -> Path:
        return next((self.patches / series).glob(f"{number}-*.patch"))

    @property
    def env(self) -> dict[str, str]:
        """The environment of a command line: nothing of the machine's but PATH, and no index to ask."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.cache),
            "VLLM_PATCHES_DIR": str(self.patches),
            "PYTHONPATH": str(SCRIPTS),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "NO_PROXY": "*",
            **self.extra,
        }

    def start(self, *arguments: object, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[str]:
        """The command line in a session of its own, so that a signal to its group reaches git too."""
        command = [sys.executable, "-m", "vllm_patches", *map(str, arguments)]
        settings: dict[str, object] = {"cwd": self.root, "start_new_session": True, "stdin": subprocess.DEVNULL}
        settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.env | (env or {}), **(settings | options))  # type: ignore[call-overload]

    def run(self, *arguments: object, env: dict[str, str] | None = None, **options: object) -> Ran:
        """The command line, to its end."""
        with self.start(*arguments, env=env, **options) as process:
            try:
                out, err = process.communicate(timeout=60)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert "Traceback" not in (err or ""), err
        return Ran(process.returncode, out or "", err or "")

    def apply(self, *arguments: object, env: dict[str, str] | None = None, **options: object) -> Ran:
        return self.run("apply", "--build", self.build, *arguments, env=env, **options)

    def head(self, tree: Path | None = None) -> str:
        return plain_git(tree or self.tree(), "rev-parse", "HEAD")

    def write_release(self, release: Release) -> None:
        """Replace one row of releases.toml."""
        releases = self.catalog.releases | {release.version: release}
        (self.patches / "releases.toml").write_text(dump_releases(releases), encoding="utf-8")

    def checkout(self, version: str = "0.20.2", *, changes: tuple[Change, ...] = (), name: str = "src") -> Path:
        """A user's own git checkout of that release, with its own history, and *changes* committed one by one."""
        folder, files = self.root / name, sdist_files(version)
        files.pop("PKG-INFO")  # an sdist has it, a checkout has not
        files.pop("vllm/_version.py")
        write_tree(folder, files)
        plain_git(folder, "init", "--quiet", "--initial-branch=main")
        self.commit(folder, "theirs")
        for change in changes:
            files = edited(change, files)
            write_tree(folder, {path: files[path] for path in change.edits})
            self.commit(folder, f"own {change.fix}")
        return folder

    def commit(self, folder: Path, text: str) -> None:
        plain_git(folder, "add", "-A")
        plain_git(folder, "commit", "--quiet", "-m", text)


def snapshot(folder: Path, *, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Everything below *folder*: kind, mode, time of change and content of each path, .git included."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(skip):
            continue
        stat = path.lstat()
        text = f"{stat.st_mode:o}"
        if path.is_symlink():
            text += f" -> {path.readlink()}"
        elif path.is_file():
            text += f" {stat.st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        found[name] = text
    return found


def scratch_left(folder: Path) -> list[str]:
    """Half-made things anywhere below *folder*."""
    marks = (".making-", ".head-", ".tmp", "tmp_pack", "tmp_obj", "index.lock")
    return [str(path) for path in folder.rglob("*") if any(mark in path.name for mark in marks)]
