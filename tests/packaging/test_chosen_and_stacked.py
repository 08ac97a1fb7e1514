"""Two of the five, and a series of somebody else's below them: through RPM, Debian's tools and the one-file patch.

On a tarball of the touched files: the whole sdist goes through them in test_document.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from packkit import PIN, RECIPES, Assets, dist, need, run
from vllm_patches.series.catalog import open_catalog

INDEXER = "vllm/v1/attention/backends/mla/indexer.py"  # 0003 changes it


@pytest.fixture(scope="module")
def chosen(touched: Path, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """0003 and 0005, above a patch that moves every hunk of 0003 by two lines, and makes a file."""
    folder = tmp_path_factory.mktemp("chosen")
    tree, own = folder / "tree", folder / "own"
    shutil.copytree(touched, tree)
    own.mkdir()
    text = (tree / INDEXER).read_bytes()
    (tree / INDEXER).write_bytes(b"# somebody's\n# two lines\n" + text)
    (tree / "vllm" / "somebody.py").write_text("X = 1\n", encoding="utf-8")
    run("git config user.name a && git config user.email a@a.invalid && git add -A", tree)
    run("git commit --quiet -m 'somebody: change'", tree)
    (own / "somebody.patch").write_text(run("git format-patch --stdout -1", tree), encoding="utf-8")
    (own / "series").write_text("somebody.patch\n", encoding="utf-8")
    words = ["--pin", PIN, "--fixes", "0003 0005", "--with-series", str(own), "--below"]
    return Assets(dist(folder / "out", *words))


@pytest.fixture
def tarball(touched: Path, tmp_path: Path) -> Path:
    run(f"tar czf {tmp_path}/vllm-{PIN}.tar.gz --exclude=.git vllm-{PIN}", touched.parent)
    return tmp_path / f"vllm-{PIN}.tar.gz"


def test_what_goes_out(chosen: Assets) -> None:
    patches = chosen.manifest["patches"]
    assert [(p["fix"], p["refreshed"]) for p in patches] == [("", False), ("0003", True), ("0005", False)]
    revision = open_catalog().release(PIN).revision
    assert chosen.manifest["version"] == f"{PIN}+patches.{revision}.only.3.5.with.own"
    assert chosen.manifest["git_am"] is True


@pytest.mark.parametrize("how", ["-p1", "-S git_am"])
def test_rpm(chosen: Assets, tarball: Path, tmp_path: Path, how: str) -> None:
    need("rpmbuild")
    for name in ("SOURCES", "SPECS"):
        (tmp_path / name).mkdir()
    spec = (RECIPES / "vllm.spec").read_text(encoding="utf-8").replace("%autosetup -p1", f"%autosetup {how}")
    (tmp_path / "SPECS" / "vllm.spec").write_text(spec, encoding="utf-8")
    run(f"cp {tarball} {chosen.folder}/patches/*.patch {chosen.folder}/rpm/vllm-patches.inc SOURCES", tmp_path)
    run('rpmbuild --define "_topdir $PWD" -bp SPECS/vllm.spec', tmp_path)
    chosen.check(tmp_path / "BUILD" / f"vllm-{PIN}")


def test_debian(chosen: Assets, touched: Path, tarball: Path, tmp_path: Path) -> None:
    need("dpkg-source")
    tree = tmp_path / f"vllm-{PIN}"
    shutil.copytree(touched, tree, ignore=shutil.ignore_patterns(".git"))
    shutil.copytree(RECIPES / "debian", tree / "debian")
    shutil.copytree(chosen.folder / "patches", tree / "debian" / "patches")
    tarball.rename(tmp_path / f"vllm_{PIN}.orig.tar.gz")
    run("dpkg-source --build . && dpkg-source -x ../vllm_*.dsc ../extracted", tree)
    chosen.check(tmp_path / "extracted")


@pytest.mark.parametrize("tool", ["patch -p1 -F0 -i {}.patch", "git apply {}.patch", "sh {}.sh ."])
def test_one_file(chosen: Assets, touched: Path, tmp_path: Path, tool: str) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(touched, tree, ignore=shutil.ignore_patterns(".git"))
    run(tool.format(chosen.folder / f"vllm-{PIN}-patches"), tree)
    chosen.check(tree)
