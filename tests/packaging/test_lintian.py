"""lintian on a source package of the touched files: not a word about the patches. (127 packages: not in CI.)"""

from __future__ import annotations

import shutil
from pathlib import Path

from packkit import PIN, RECIPES, Assets, need, run


def tags(tmp_path: Path, assets: Assets, touched: Path, spoil: bool) -> list[str]:
    """lintian's tags, all of its levels; *spoil* takes one header away."""
    need("lintian", "dpkg-source")
    tree = tmp_path / f"vllm-{PIN}"
    shutil.copytree(touched, tree, ignore=shutil.ignore_patterns(".git"))
    run(f"tar czf vllm_{PIN}.orig.tar.gz vllm-{PIN}", tmp_path)
    shutil.copytree(RECIPES / "debian", tree / "debian")
    shutil.copytree(assets.folder / "patches", tree / "debian" / "patches")
    if spoil:
        patch = tree / "debian" / "patches" / "0003-mla-flat-buffer.patch"
        text = patch.read_text(encoding="utf-8")
        patch.write_text(text[text.index("diff --git ") :], encoding="utf-8")
    run("dpkg-source --build .", tree)
    said = run("lintian --allow-root --display-info --pedantic vllm_*.dsc || true", tmp_path)
    assert "vllm source: " in said, "lintian always has something to say about this package"
    return [line for line in said.splitlines() if "patch" in line]


def test_clean(tmp_path: Path, assets: Assets, touched: Path) -> None:
    assert tags(tmp_path, assets, touched, spoil=False) == []


def test_it_looks(tmp_path: Path, assets: Assets, touched: Path) -> None:
    (found,) = tags(tmp_path, assets, touched, spoil=True)
    assert "0003-mla-flat-buffer.patch" in found
