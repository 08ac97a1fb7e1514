"""Every choice of the five on every pin: today none needs another, so each goes out in the very bytes of the series."""

from __future__ import annotations

import itertools

import pytest
from vllm_patches.dist.compose import Wish, compose
from vllm_patches.series.catalog import open_catalog
from vllm_patches.series.model import Release
from vllm_patches.sources.index import fetch_sdist
from vllm_patches.sources.store import pristine_files

CATALOG = open_catalog()


@pytest.mark.parametrize("release", CATALOG.pins, ids=lambda release: release.version)
def test_every_choice(release: Release) -> None:
    contents = pristine_files([release], fetch_sdist)
    files = {path: contents[blob] for path, blob in release.blobs.items()}
    series = CATALOG.series_of(release)
    raws = {patch.number: patch.raw for patch in series.patches}
    choices = [c for n in range(1, len(raws) + 1) for c in itertools.combinations(raws, n)]
    assert len(choices) == 2 ** len(raws) - 1
    for chosen in choices:
        bundle = compose(release, series, Wish(chosen), lambda paths: {p: files[p] for p in paths if p in files})
        assert {item.fix: item.raw for item in bundle.items} == {fix: raws[fix] for fix in chosen}
