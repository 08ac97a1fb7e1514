"""The streams that become commits, as git itself reads them."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
from test_model import PATCH
from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import IDENT_EMAIL, IDENT_NAME, Release
from vllm_patches.sources.sdist import Entry
from vllm_patches.trees import git
from vllm_patches.trees.commits import pristine_stream, series_stream
from world import plain_git

RELEASE = Release("1.2.3", datetime.date(2026, 1, 2), "vllm-1.2.3.tar.gz", "abc", 1, {})
ENTRIES = [
    Entry("a.py", "100644", b"one\n"),
    Entry("with blank.py", "100644", b""),
    Entry("docs/caf\u00e9.md", "100644", b"\x00\xff\r\n"),
    Entry("tools/run.sh", "100755", b"no line feed"),
    Entry('say "hi"', "100644", b"data 3\n"),
]
OURS = f"{IDENT_NAME} <{IDENT_EMAIL}>"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    git.init(folder, "main")
    git.fast_import(folder, pristine_stream(RELEASE, "refs/heads/main", ENTRIES))
    return folder


def _commit(folder: Path, revision: str) -> list[str]:
    return plain_git(folder, "cat-file", "-p", revision).split("\n")


def test_the_root_commit(repository: Path) -> None:
    lines = _commit(repository, "main")
    seconds = int(datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC).timestamp())
    assert lines[1:] == [
        f"author {OURS} {seconds} +0000",
        f"committer {OURS} {seconds} +0000",
        "",
        "vLLM 1.2.3, as in vllm-1.2.3.tar.gz",
        "",
        "sha256: abc",
    ]


def test_every_file_is_in_it_with_its_mode_and_bytes(repository: Path) -> None:
    listed = plain_git(repository, "ls-tree", "-r", "-z", "main").rstrip("\0").split("\0")
    assert sorted(listed) == sorted(f"{e.mode} blob {blob_id(e.data)}\t{e.path}" for e in ENTRIES)


def test_a_commit_per_patch_with_the_authors_own_zone(repository: Path) -> None:
    base = git.rev_parse(repository, "main") or ""
    first = replace(
        PATCH, author="A Name <a@name.invalid>", date="Sat, 21 Nov 2026 02:00:00 +0200", body="Why: x\n\n\n"
    )
    second = replace(PATCH, subject="caf\u00e9: do it")
    steps = [(first, [Entry("a.py", "100644", b"two\n")]), (second, [Entry("tools/run.sh", "100755", b"new\n")])]
    git.fast_import(repository, series_stream("refs/heads/out", base, steps))
    seconds = int(datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC).timestamp())
    assert _commit(repository, "out~1")[1:] == [
        f"parent {base}",
        f"author A Name <a@name.invalid> {seconds} +0200",
        f"committer {OURS} {seconds} +0000",
        "",
        "engine: do it",
        "",
        "Why: x",
    ]
    assert _commit(repository, "out")[5] == "caf\u00e9: do it"
    assert plain_git(repository, "diff", "--name-only", "main", "out~1") == "a.py"
    assert plain_git(repository, "diff", "--name-only", "out~1", "out") == "tools/run.sh"


@pytest.mark.parametrize("path", ['"quoted"', "two\nlines"])
def test_a_name_that_the_stream_would_misread_is_refused(path: str) -> None:
    with pytest.raises(PatchesError) as caught:
        list(pristine_stream(RELEASE, "refs/heads/main", [Entry(path, "100644", b"")]))
    assert repr(path) in caught.value.file
