"""The pinned requirements of GPU runs, ``ci/requirements-gpu/<release>.txt``, against upstream's own files.

Each file names the upstream files it was written from, by git blob id, so that a warm `check` reads two small blobs
out of the cache; the sdist is opened only where they are not there yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from vllm_patches.series.catalog import Catalog
from vllm_patches.series.headers import Problem
from vllm_patches.series.model import Release
from vllm_patches.sources.store import FindSdist, OtherFile, pristine_files

CUDA, DEEP_GEMM = "requirements/cuda.txt", "tools/install_deepgemm.sh"
NEEDED = ("torch", "flashinfer-python")  # what upstream pins exactly, and a run must not replace

_UPSTREAM = re.compile(r"^# upstream (\S+) ([0-9a-f]{40})$", re.M)
_REVISION = re.compile(r"^# deep-gemm ([0-9a-f]{40})$", re.M)
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])? *== *([^\s;#]+)", re.M)


def lint_gpu_requirements(catalog: Catalog, releases: Iterable[Release], find_sdist: FindSdist) -> list[Problem]:
    """A finding for every pin that is not upstream's; *releases* without a file have none."""
    folder = catalog.folder.parent / "ci" / "requirements-gpu"
    problems: list[Problem] = []
    for release in releases:
        file = folder / f"{release.version}.txt"
        if file.is_file():
            problems += _check(file, release, find_sdist)
    return problems


def _check(file: Path, release: Release, find_sdist: FindSdist) -> list[Problem]:
    text = file.read_text(encoding="utf-8")
    named = {path: blob for path, blob in _UPSTREAM.findall(text) if path in (CUDA, DEEP_GEMM)}
    where = f"ci/requirements-gpu/{file.name}"
    if missing := {CUDA, DEEP_GEMM} - named.keys():
        return [Problem("gpu requirements", where, f"# upstream {path} <blob id>", "none") for path in sorted(missing)]
    try:
        contents = pristine_files([replace(release, blobs=named)], find_sdist)
    except OtherFile as other:
        return [Problem("gpu requirements", where, f"# upstream {other.file} {other.found}", other.expected)]
    return _compare(where, text, {path: contents[blob] for path, blob in named.items()}, release)


def _compare(where: str, text: str, upstream: Mapping[str, bytes], release: Release) -> list[Problem]:
    """Our pins against upstream's exact ones, and the revision of DeepGEMM."""
    ours, theirs = pins(text), pins(upstream[CUDA].decode())
    wanted = {"vllm": release.version} | {name: theirs.get(name, "a pin of upstream's") for name in NEEDED}
    wanted |= {name: version for name, version in theirs.items() if name in ours}
    problems = [
        Problem("gpu requirements", where, f"{name}=={version}", f"{name}=={ours[name]}" if name in ours else "none")
        for name, version in wanted.items()
        if ours.get(name) != version
    ]
    revision = re.search(r'^DEEPGEMM_GIT_REF="([0-9a-f]{40})"$', upstream[DEEP_GEMM].decode(), re.M)
    said = _REVISION.search(text)
    if (revision and revision[1]) != (said and said[1]):
        found = said[1] if said else "none"
        expected = f"# deep-gemm {revision[1]}" if revision else "no revision: upstream's script has none"
        problems.append(Problem("gpu requirements", where, expected, found))
    return problems


def pins(text: str) -> dict[str, str]:
    """Name to version of every exact requirement."""
    return {name.lower().replace("_", "-"): version for name, version in _PIN.findall(text)}
