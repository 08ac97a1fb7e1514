"""A small world for in-place installs: a catalogue with real patch files, and site folders as pip leaves them."""

from __future__ import annotations

import base64
import csv
import datetime
import difflib
import hashlib
import io
import os
import py_compile
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import FIX_IDS, FixState, Release, State
from vllm_patches.series.patchfile import FROM_LINE
from vllm_patches.series.tables import dump_releases

SLUGS = ("dsa-mtp-ima", "gdn-null-block-guard", "mla-flat-buffer", "rocm-kv-strides", "mrv2-wake-up")
ENGINE, KERNEL, WORKER, CUDA = "vllm/engine.py", "vllm/ops/kernel.py", "vllm/worker.py", "csrc/kernel.cu"
ODD = 'vllm/caf\u00e9, "odd".txt'  # a path that RECORD has to quote

Files = dict[str, bytes]


def _numbered(stem: str, count: int) -> bytes:
    return b"".join(f"{stem}{number} = {number}\n".encode() for number in range(1, count + 1))


def sources(version: str) -> Files:
    """The files of one release; KERNEL alone differs between 0.20.1 and 0.20.2."""
    return {
        "vllm/__init__.py": b"",
        "vllm/_version.py": f"__version__ = version = '{version}'\n".encode(),
        ENGINE: _numbered("step", 60),
        "vllm/ops/__init__.py": b"",
        KERNEL: f"# {version}\n".encode() + _numbered("lane", 40),
        WORKER: _numbered("task", 20) + b"last = True",  # no newline at its end
        ODD: b"odd\n",
        CUDA: _numbered("int l", 40),
        "PKG-INFO": f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n\nText\n".encode(),
    }


Edit = tuple[str, bytes, bytes]
SERIES: dict[str, tuple[tuple[str, tuple[Edit, ...]], ...]] = {
    "v0.20.2": (
        ("0001", ((ENGINE, b"step20 = 20\n", b"step20 = 20\nstep20b = 0\n"),)),
        ("0003", ((ENGINE, b"step22 = 22\n", b"step22 = -22\n"), (KERNEL, b"lane9 = 9\n", b"lane9 = -9\n"))),
        ("0005", ((WORKER, b"last = True", b"last = False"),)),
    ),
    "v0.19.1": (
        ("0001", ((CUDA, b"int l9 = 9\n", b"int l9 = -9\n"), (ENGINE, b"step20 = 20\n", b"step20 = -20\n"))),
        ("0005", ((WORKER, b"last = True", b"last = False"),)),
    ),
}
_STATES = {"v0.20.2": ("0001", "0003", "0005"), "v0.19.1": ("0001", "0005")}


def make_patch(number: str, before: Files, after: Files) -> bytes:
    """One patch file as `git format-patch` writes it, as far as the reader looks."""
    head = f"{FROM_LINE}\nFrom: A <a@b>\nDate: Sat, 21 Nov 2026 00:00:00 +0000\nSubject: [PATCH] {number}\n\nWhy: x\n\n"
    return head.encode() + b"".join(
        _section(path, before[path], after[path]) for path in after if after[path] != before[path]
    )


def _section(path: str, old: bytes, new: bytes) -> bytes:
    out = [f"diff --git a/{path} b/{path}\nindex {blob_id(old)}..{blob_id(new)} 100644\n".encode()]
    lines = [data.decode().splitlines(keepends=True) for data in (old, new)]
    for line in difflib.unified_diff(*lines, f"a/{path}", f"b/{path}"):
        out.append(line.encode() if line.endswith("\n") else line.encode() + b"\n\\ No newline at end of file\n")
    return b"".join(out)


def patched(series: str, files: Files) -> Files:
    """The files after the whole series, by plain replacement."""
    return _steps(series, files)[-1]


def _steps(series: str, files: Files) -> list[Files]:
    steps = [files]
    for _, edits in SERIES[series]:
        after = dict(steps[-1])
        for path, old, new in edits:
            assert after[path].count(old) == 1, (path, old)
            after[path] = after[path].replace(old, new)
        steps.append(after)
    return steps


def make_catalog(folder: Path) -> Catalog:
    """0.19.1 has a C++ part, 0.20.2 has none, 0.21.0 has no series yet, 0.22.0 needs none."""
    for name, changes in SERIES.items():
        steps = _steps(name, sources(name[1:]))
        (folder / name).mkdir(parents=True)
        names = [f"{number}-{SLUGS[int(number) - 1]}.patch" for number, _ in changes]
        for (number, _), file, before, after in zip(changes, names, steps, steps[1:], strict=False):
            (folder / name / file).write_bytes(make_patch(number, before, after))
        (folder / name / "series").write_text("".join(f"{file}\n" for file in names))
    releases = {version: _release(version) for version in ("0.19.1", "0.20.1", "0.20.2", "0.21.0", "0.22.0")}
    (folder / "releases.toml").write_text(dump_releases(releases), encoding="utf-8")
    keys = ("title", "defect", "symptom", "introduced_by", "first_fixed", "severity", "removal")
    fixes = [
        f'[[fix]]\nid = "{i}"\nslug = "{slug}"\nupstream_pr = [1]\nparts = ["x"]\n'
        + "".join(f'{k} = "x"\n' for k in keys)
        for i, slug in zip(FIX_IDS, SLUGS, strict=True)
    ]
    (folder / "fixes.toml").write_text("\n".join(fixes))
    return Catalog(folder)


def _release(version: str) -> Release:
    series = f"v{version}" if f"v{version}" in SERIES else ""
    live = _STATES.get(series, FIX_IDS if version == "0.21.0" else ())
    states = {i: FixState(State.LIVE if i in live else State.FIXED, "vllm/engine.py:1") for i in FIX_IDS}
    touched = dict.fromkeys(path for _, edits in SERIES.get(series, ()) for path, _, _ in edits)
    blobs = {path: blob_id(sources(version)[path]) for path in touched}
    date = datetime.date(2026, 5, 10)
    return Release(
        version, date, f"vllm-{version}.tar.gz", "0" * 64, 1, states, series, "0" * 40 if series else "", blobs
    )


def put_in(site: Path, version: str, *, files: Files | None = None) -> Path:
    """Install a vLLM as pip does: files, dist-info, compiled modules, RECORD. Returns the dist-info folder."""
    chosen = {name: data for name, data in (files or sources(version)).items() if name.startswith("vllm/")}
    info = site / f"vllm-{version.replace('-', '_')}.dist-info"
    chosen[f"{info.name}/METADATA"] = f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n\nVersion: 9\n".encode()
    chosen[f"{info.name}/INSTALLER"] = b"pip\n"
    for name, data in chosen.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(data)
        os.utime(site / name, ns=(10**18, 10**18))
    (site / ENGINE).chmod(0o640)
    compiled = [Path(py_compile.compile(str(site / name), doraise=True)) for name in (ENGINE, WORKER)]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, data in chosen.items():
        rows.writerow((name, record_hash(data), len(data)))
    for path in [*compiled, info / "RECORD"]:
        rows.writerow((path.relative_to(site).as_posix(), "", ""))
    (info / "RECORD").write_text(text.getvalue(), encoding="utf-8")
    return info


def make_wheel(folder: Path, version: str) -> Path:
    """The same vLLM as a wheel that pip takes."""
    info = f"vllm-{version}.dist-info"
    files = {name: data for name, data in sources(version).items() if name.startswith("vllm/")}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows((name, record_hash(data), len(data)) for name, data in files.items())
    rows.writerow((f"{info}/RECORD", "", ""))
    path = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": text.getvalue().encode()}.items():
            archive.writestr(name, data)
    return path


def record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def record_rows(site: Path) -> dict[str, tuple[str, str]]:
    """All rows of the RECORD of the one vLLM in *site*."""
    (record,) = site.glob("vllm-*.dist-info/RECORD")
    with record.open(encoding="utf-8", newline="") as file:
        return {row[0]: (row[1], row[2]) for row in csv.reader(file)}


def snapshot(folder: Path, *, times: bool = True) -> dict[str, object]:
    """Everything that is there: bytes or link, mode and (for files) time of change."""
    return {path.relative_to(folder).as_posix(): _state(path, times) for path in walk(folder)}


def walk(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")))


def _state(path: Path, times: bool) -> object:
    if path.is_symlink():
        return str(path.readlink())
    stat = path.stat()
    if path.is_dir():
        return oct(stat.st_mode)
    return path.read_bytes(), oct(stat.st_mode), stat.st_mtime_ns if times else 0


CHANGES = {
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.chown",
    "os.symlink",
    "os.utime",
}


def _changes_disk(event: str, arguments: tuple[object, ...]) -> bool:
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run *action* in a process that is killed just before its step-th change on disk; False where it had ended."""

    def prepare() -> None:
        left = step

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if _changes_disk(event, arguments):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)  # it cannot be removed again, and need not: the process ends

    return in_child(action, prepare) == -signal.SIGKILL


def in_child(action: Callable[[], object], prepare: Callable[[], None] = lambda: None) -> int:
    """The exit status of `told_by_child`."""
    return told_by_child(action, prepare)[0]


def told_by_child(action: Callable[[], object], prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Fork, prepare, act; 0, 1 where *action* raised a `PatchesError`, or minus the signal that ended it; its message.

    The message comes through a pipe, which no limit on the size of files cuts short.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            prepare()
            action()
            code = 0
        except PatchesError as error:
            os.write(theirs, str(error).encode())
            code = 1
        except BaseException:
            os.write(theirs, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def become_nobody() -> None:
    """Permissions do not bind root; whoever is not root stays who they are."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
