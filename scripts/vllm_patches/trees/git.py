"""Every git call of the project, one function each, in an environment that no user setting reaches.

Two environments: *pinned* for our own repositories and for reading objects, *user* where git has to see a
user's checkout as its owner does (line-end conversion, filters, safe.directory).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from vllm_patches.errors import PatchesError

_PINNED = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    "TZ": "UTC",
}
# Neither asks anything nor, for a mere look, rewrites the index of the checkout that is looked at.
_ALWAYS = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
# Given with every call: hooks are never ours to run, and nothing we make needs a disk barrier: our own
# repositories are rebuilt from the sdist, and the cached pack is hashed at each use.
_SETTINGS = ("core.hooksPath=/dev/null", "core.fsync=none", "gc.auto=0", "maintenance.auto=false")

# git reads ~/.config/git/attributes and ~/.config/git/ignore even where it is to read no configuration.
_PINNED_SETTINGS = ("core.attributesFile=/dev/null", "core.excludesFile=/dev/null")


def _environment(directory: Path, pinned: bool) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # A folder of ours inside somebody's repository must never be taken for a part of it.
    env["GIT_CEILING_DIRECTORIES"] = str(directory.resolve().parent)
    if pinned:
        return env | _ALWAYS | _PINNED
    kept = {key: value for key, value in os.environ.items() if key.startswith("GIT_CONFIG")}
    return env | kept | _ALWAYS


def _command(directory: Path, arguments: Sequence[str], pinned: bool) -> list[str]:
    settings = list(_SETTINGS)
    if pinned:
        settings += _PINNED_SETTINGS
        # The user's own environment has judged the folder by now; the pinned one cannot see their safe.directory.
        settings.append(f"safe.directory={directory.resolve()}")
    options = [word for setting in settings for word in ("-c", setting)]
    return ["git", "-C", str(directory), *options, *arguments]


def _run(
    directory: Path, *arguments: str, stdin: bytes | None = None, pinned: bool = True, check: bool = True
) -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(
            _command(directory, arguments, pinned),
            input=stdin if stdin is not None else b"",
            capture_output=True,
            env=_environment(directory, pinned),
            check=False,
        )
    except FileNotFoundError as error:
        raise PatchesError("git is not installed", next_command="install git 2.31 or newer") from error
    if check and done.returncode:
        raise _failure(directory, arguments, done.returncode, done.stderr)
    return done


# What git says, what that means, what to type next.
_FAILURES = (
    (
        ("dubious ownership",),
        "git refuses the folder: it belongs to another user",
        "git config --global --add safe.directory {}",
    ),
    (("No space left on device", "Out of diskspace", "Disk quota"), "no space left on the device", "df -h {}"),
    (("Permission denied", "Read-only file system", "insufficient permission"), "git may not write there", "ls -ld {}"),
    # Without the reason of the system; a full disk is the usual one.
    (
        ("unable to write", "failed to write", "could not write", "couldn't write"),
        "git cannot write: is the disk full?",
        "df -h {}",
    ),
    (("not a git repository",), "not a git checkout", "git -C {} rev-parse --show-toplevel"),
)


def _failure(directory: Path, arguments: Sequence[str], status: int, stderr: bytes) -> PatchesError:
    """Classify what git said; an unknown case is quoted as it is."""
    text = stderr.decode("utf-8", "replace").strip()
    verb = next(word for word in arguments if not word.startswith("-") and "=" not in word)
    what, command = f"git {verb} failed with exit status {status}", f"git -C {directory} status"
    if status < 0:
        what, command = f"git {verb} was killed by {signal.Signals(-status).name}", "ulimit -a"
    for marks, meaning, advice in _FAILURES:
        if any(mark in text for mark in marks):
            what, command = meaning, advice.format(directory)
            break
    return PatchesError(what, file=str(directory), found=text, next_command=command)


def init(directory: Path, branch: str) -> None:
    """Make an empty repository whose files no line-end setting of its user can change."""
    directory.mkdir(parents=True, exist_ok=True)
    _run(directory, "init", "--quiet", "--template=", f"--initial-branch={branch}")
    with (directory / ".git" / "config").open("a", encoding="utf-8") as config:
        config.write("[core]\n\tautocrlf = false\n\teol = lf\n[advice]\n\tdetachedHead = false\n")


def fast_import(directory: Path, stream: Iterable[bytes]) -> None:
    """Feed a fast-import stream; objects go to one pack, stored and not deflated (speed over size)."""
    arguments = ("-c", "fastimport.unpackLimit=0", "-c", "pack.compression=0", "-c", "core.compression=0")
    command = _command(directory, (*arguments, "fast-import", "--quiet", "--depth=0", "--done"), pinned=True)
    env = _environment(directory, pinned=True)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, env=env) as process:
        assert process.stdin and process.stderr
        try:
            _feed(process.stdin, stream)
        except BaseException:
            process.kill()
            raise
        stderr = process.stderr.read()
    if process.returncode:
        raise _failure(directory, ("fast-import",), process.returncode, stderr)


def _feed(pipe: IO[bytes], stream: Iterable[bytes]) -> None:
    """Write the whole stream and close the pipe; where git has died before, its own message says why.

    Without the last word git makes nothing of it: a half stream must not become a repository that looks whole.
    """
    with contextlib.suppress(BrokenPipeError):
        for chunk in stream:
            pipe.write(chunk)
        pipe.write(b"done\n")
        pipe.flush()
    with contextlib.suppress(BrokenPipeError):  # what is still buffered
        pipe.close()


def top_level(directory: Path) -> Path | None:
    """The root of the work tree that *directory* lies in, as its user sees it; None outside any."""
    env_free = _run(directory, "rev-parse", "--show-toplevel", pinned=False, check=False)
    if env_free.returncode == 0 and env_free.stdout.strip():
        return Path(os.fsdecode(env_free.stdout.rstrip(b"\n"))).resolve()
    if b"dubious ownership" in env_free.stderr:
        raise _failure(directory, ("rev-parse",), env_free.returncode, env_free.stderr)
    return None


def git_path(directory: Path, name: str) -> Path:
    """Where git keeps *name* (``rebase-apply`` …) for this work tree."""
    found = _run(directory, "rev-parse", "--git-path", name).stdout
    return (directory / os.fsdecode(found.rstrip(b"\n"))).resolve()


def status(directory: Path, *, ignored: bool = False, pinned: bool = True) -> list[str]:
    """Changed and untracked paths in porcelain form; empty for a clean tree."""
    extra = ["--ignored"] if ignored else []
    out = _run(directory, "status", "--porcelain", *extra, pinned=pinned).stdout
    return out.decode("utf-8", "replace").splitlines()


def rev_parse(directory: Path, revision: str) -> str | None:
    """The commit that *revision* names, or None."""
    done = _run(directory, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", check=False)
    return done.stdout.decode().strip() or None


def current_branch(directory: Path) -> str | None:
    """The short name of the branch that HEAD is on, or None when detached."""
    done = _run(directory, "symbolic-ref", "--quiet", "--short", "HEAD", check=False)
    return done.stdout.decode().strip() or None


def is_ancestor(directory: Path, older: str, newer: str) -> bool:
    """True if commit *older* is *newer* or one of its ancestors."""
    return _run(directory, "merge-base", "--is-ancestor", older, newer, check=False).returncode == 0


def blobs(directory: Path, revision: str, paths: Iterable[str]) -> dict[str, str]:
    """Blob ids of those *paths* that are files in *revision*."""
    out = _run(directory, "ls-tree", "-z", "--full-tree", revision, "--", *paths).stdout
    entries = (entry.split(b"\t", 1) for entry in out.split(b"\0") if entry)
    return {os.fsdecode(path): meta.split()[2].decode() for meta, path in entries if b" blob " in meta}


def read_blobs(directory: Path, ids: Iterable[str]) -> dict[str, bytes]:
    """The contents of the blobs *ids*, all of which must exist."""
    wanted = list(dict.fromkeys(ids))
    out = _run(directory, "cat-file", "--batch", stdin="".join(f"{i}\n" for i in wanted).encode()).stdout
    contents: dict[str, bytes] = {}
    at = 0
    for blob in wanted:
        line_end = out.index(b"\n", at)
        fields = out[at:line_end].split()
        if len(fields) != 3:
            raise PatchesError("a git object is missing", file=str(directory), expected=blob, found=repr(fields))
        size = int(fields[2])
        contents[blob] = out[line_end + 1 : line_end + 1 + size]
        at = line_end + 1 + size + 1
    return contents


def refs(directory: Path, prefix: str) -> list[str]:
    """The full names of the refs that start with the path *prefix*."""
    return _run(directory, "for-each-ref", "--format=%(refname)", prefix).stdout.decode().split()


def update_ref(directory: Path, ref: str, commit: str) -> None:
    """Point *ref* at *commit*."""
    _run(directory, "update-ref", ref, commit)


def delete_ref(directory: Path, ref: str) -> None:
    """Delete a ref that this process has made."""
    _run(directory, "update-ref", "-d", ref)


def checkout(directory: Path, branch: str) -> None:
    """Write the files of *branch* into the empty work tree of a repository of ours."""
    arguments = ("-c", f"checkout.workers={os.cpu_count() or 1}", "checkout", "--quiet", "--force", branch)
    done = _run(directory, *arguments)
    if any(line.startswith((b"error:", b"fatal:")) for line in done.stderr.splitlines()):  # it may go on, and exit 0
        raise _failure(directory, arguments, done.returncode, done.stderr)


def switch(directory: Path, branch: str, *, force: bool = False) -> None:
    """Switch a user's checkout to *branch* (or commit) with the user's own settings.

    Without *force* git keeps what it would overwrite. A file that it cannot write does not make it fail: it goes on,
    and calls the file changed; so an unclean end is an error here. The caller has seen to it that it was clean.
    """
    where = ("--quiet", "--no-guess", branch) if rev_parse(directory, f"refs/heads/{branch}") else ("--detach", branch)
    arguments = ("switch", *(("--force",) if force else ()), *where)
    done = _run(directory, *arguments, pinned=False)
    if left := status(directory, pinned=False):
        said = done.stderr.decode("utf-8", "replace").strip()
        raise _failure(directory, arguments, 0, "\n".join([said, *left[:10]]).strip().encode())


@contextlib.contextmanager
def no_interrupt() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM here and in the processes that are started; only the main thread can, and it gets
    them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What a tree's own .git/config could change in a patch file (the user's global one is not read at all); those of
# the second group have no option.
_FORMAT_OPTIONS = (
    *("--stdout", "--zero-commit", "--no-signature", "--no-stat", "--no-numbered", "--subject-prefix=PATCH"),
    *("--no-signoff", "--no-from", "--no-to", "--no-cc", "--no-add-header", "--no-thread", "--no-attach", "--no-notes"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--full-index", "--no-renames", "--diff-algorithm=myers", "--unified=3"),
    *("--inter-hunk-context=0", "--indent-heuristic", "--no-color", "--encode-email-headers", "--encoding=UTF-8"),
)
_FORMAT_SETTINGS = ("diff.suppressBlankEmpty=false", "format.useAutoBase=false")


def format_patch(directory: Path, commit: str) -> bytes:
    """*commit* as a patch file whose bytes depend on nothing but the commit and its parent's files."""
    # --no-stat: no summary, hence no `---` line after the trailers; --full-index: blob ids that can be checked;
    # explicit prefixes: `--default-prefix` is unknown to git 2.39, and noprefix may be set in a local config.
    settings = [word for setting in _FORMAT_SETTINGS for word in ("-c", setting)]
    return _run(directory, *settings, "format-patch", "-1", *_FORMAT_OPTIONS, commit).stdout


def commits_after(directory: Path, base: str, head: str) -> list[str]:
    """Commit ids from *base* (not included) to *head*, oldest first."""
    return _run(directory, "rev-list", "--reverse", f"{base}..{head}").stdout.decode().split()


def tree_blobs(directory: Path, revision: str, folder: str) -> dict[str, str]:
    """Blob ids of every file below *folder* in *revision*."""
    out = _run(directory, "ls-tree", "-r", "-z", "--full-tree", revision, "--", folder).stdout
    entries = (entry.split(b"\t", 1) for entry in out.split(b"\0") if entry)
    return {os.fsdecode(path): meta.split()[2].decode() for meta, path in entries if b" blob " in meta}
