"""The pins of GPU runs against upstream's own files: made sdists, and the committed files themselves."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog, open_catalog
from vllm_patches.series.headers import Problem
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Release
from vllm_patches.upkeep.gpureqs import CUDA, DEEP_GEMM, lint_gpu_requirements, pins

REVISION = "89" * 20
UPSTREAM = {
    CUDA: b"-r common.txt\n\nnumba == 0.65.0 # for drafts\ntorch==2.11.0\nflashinfer-python==0.6.8.post1\nquack>=0.3\n",
    DEEP_GEMM: f'#!/bin/sh\nDEEPGEMM_GIT_REF="{REVISION}"\n'.encode(),
}
PINS = "vllm==0.20.2\ntorch==2.11.0\ntriton==3.6.0\nflashinfer-python==0.6.8.post1\n"


@dataclass
class Place:
    """A catalogue's folder with a file of pins beside it, and an sdist whose openings are counted."""

    catalog: Catalog
    release: Release
    sdist: Path
    opened: int = 0

    def write(self, pinned: str, *, upstream: dict[str, bytes] = UPSTREAM, revision: str = REVISION) -> None:
        heads = [f"# upstream {path} {blob_id(data)}\n" for path, data in upstream.items()]
        file = self.catalog.folder.parent / "ci" / "requirements-gpu" / "0.20.2.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join([*heads, f"# deep-gemm {revision}\n", pinned]), encoding="utf-8")

    def find(self, release: Release) -> Path:
        self.opened += 1
        return self.sdist

    def lint(self) -> list[Problem]:
        return lint_gpu_requirements(self.catalog, [self.release], self.find)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        for path, data in UPSTREAM.items():
            member = tarfile.TarInfo(f"vllm-0.20.2/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    sdist = tmp_path / "vllm-0.20.2.tar.gz"
    sdist.write_bytes(gzip.compress(inner.getvalue()))
    sha256 = hashlib.sha256(sdist.read_bytes()).hexdigest()
    release = Release("0.20.2", datetime.date(2026, 5, 10), sdist.name, sha256, sdist.stat().st_size, {})
    return Place(Catalog(tmp_path / "project" / "patches"), release, sdist)


def test_upstreams_pins_are_fine_and_the_sdist_is_opened_once(place: Place) -> None:
    place.write(PINS)
    assert place.lint() == []
    assert place.lint() == []
    assert place.opened == 1


@pytest.mark.parametrize(
    ("old", "new", "expected", "found"),
    [
        ("torch==2.11.0", "torch==2.11.1", "torch==2.11.0", "torch==2.11.1"),
        ("torch==2.11.0\n", "", "torch==2.11.0", "none"),
        ("torch==2.11.0", "torch>=2.11.0", "torch==2.11.0", "none"),
        ("0.6.8.post1", "0.6.8", "flashinfer-python==0.6.8.post1", "flashinfer-python==0.6.8"),
        ("vllm==0.20.2", "vllm==0.20.1", "vllm==0.20.2", "vllm==0.20.1"),
        ("triton==3.6.0", "numba==0.61.2", "numba==0.65.0", "numba==0.61.2"),
    ],
)
def test_another_pin_is_a_finding(place: Place, old: str, new: str, expected: str, found: str) -> None:
    place.write(PINS.replace(old, new))
    assert [(p.file, p.expected, p.found) for p in place.lint()] == [
        ("ci/requirements-gpu/0.20.2.txt", expected, found)
    ]


def test_another_revision_of_deep_gemm_is_a_finding(place: Place) -> None:
    place.write(PINS, revision="ab" * 20)
    assert [(p.expected, p.found) for p in place.lint()] == [(f"# deep-gemm {REVISION}", "ab" * 20)]


def test_a_file_written_from_another_upstream_file_is_a_finding(place: Place) -> None:
    place.write(PINS, upstream=UPSTREAM | {CUDA: b"torch==2.11.0\n"})
    (problem,) = place.lint()
    assert problem.expected == f"# upstream {CUDA} {blob_id(UPSTREAM[CUDA])}"


def test_a_file_that_does_not_name_upstreams_is_a_finding(place: Place) -> None:
    place.write(PINS, upstream={CUDA: UPSTREAM[CUDA]})
    (problem,) = place.lint()
    assert problem.expected == f"# upstream {DEEP_GEMM} <blob id>"
    assert place.opened == 0


def test_a_pin_that_upstream_has_no_longer_is_a_finding(place: Place) -> None:
    loose = UPSTREAM | {CUDA: b"torch>=2.11\nflashinfer-python==0.6.8.post1\n"}
    place.write(PINS, upstream=loose)
    from vllm_patches.sources import cache

    for data in loose.values():
        cache.store_blob(data)
    (problem,) = place.lint()
    assert (problem.expected, problem.found) == ("torch==a pin of upstream's", "torch==2.11.0")


def test_another_sdist_is_refused(place: Place) -> None:
    place.write(PINS)
    place.sdist.write_bytes(b"another")
    with pytest.raises(PatchesError, match="sha256 is wrong"):
        place.lint()


def test_a_release_without_a_file_has_nothing_to_compare(place: Place) -> None:
    assert place.lint() == []
    assert place.opened == 0


def test_extras_comments_and_case_do_not_hide_a_pin() -> None:
    text = "Lm_Eval[api]==0.4.13\nnumba == 0.65.0 # why\nx>=1\n# y==2\nz==1; python_version > '3'\n"
    assert pins(text) == {"lm-eval": "0.4.13", "numba": "0.65.0", "z": "1"}


def test_the_committed_files_are_for_releases_with_a_series_and_agree_on_the_harness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_PATCHES_DIR")
    catalog = open_catalog()
    ci = catalog.folder.parent / "ci"
    files = sorted((ci / "requirements-gpu").glob("*.txt"))
    assert {file.stem for file in files} >= {"0.18.1", "0.19.1", "0.20.0", "0.20.2", "0.21.0"}
    ours = pins((ci / "constraints.txt").read_text(encoding="utf-8"))
    for file in files:
        assert catalog.release(file.stem).series
        text = file.read_text(encoding="utf-8")
        for name in ("lm-eval", "scipy", "matplotlib"):
            assert pins(text)[name] == ours[name], (file.name, name)
        in_wheel = re.search(r"# deep-gemm .*\n# In the wheel", text) is not None
        assert in_wheel == (catalog.release(file.stem).date >= catalog.release("0.20.0").date)
