"""What each channel writes, on the small world's release; real tools read it in tests/packaging."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_patches.dist import aur, combined, conda, dockerfile, nix, quilt, rpm, spack
from vllm_patches.dist.bundle import Bundle, Item
from vllm_patches.dist.compose import Wish, compose
from vllm_patches.dist.links import Links
from vllm_patches.dist.manifest import manifest, modifications
from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256, sri
from vllm_patches.series.hunks import blob_id
from vllm_patches.sources.store import pristine_files
from world import ENGINE, KERNEL, SCRIPT, World, sdist_files, write_tree

BASE = "https://example.invalid/assets/"
NAMES = ["0001-dsa-mtp-ima.patch", "0003-mla-flat-buffer.patch", "0005-mrv2-wake-up.patch"]


@pytest.fixture
def bundle(world: World) -> Bundle:
    release = world.release()
    contents = pristine_files([release], lambda _: world.sdist())
    files = {path: contents[blob] for path, blob in release.blobs.items()}
    return compose(
        release, world.catalog.series_of(release), Wish(), lambda paths: {p: files[p] for p in paths if p in files}
    )


def one(assets: list, name: str) -> str:
    (found,) = [asset for asset in assets if asset.path == name]
    return found.data.decode()


def test_quilt_is_the_committed_series(bundle: Bundle, world: World) -> None:
    made = {asset.path: asset.data for asset in quilt.assets(bundle, Links())}
    folder = world.patches / "v0.20.2"
    assert made == {f"patches/{path.name}": path.read_bytes() for path in folder.iterdir()}


def test_rpm(bundle: Bundle) -> None:
    lines = one(rpm.assets(bundle, Links()), "rpm/vllm-patches.inc").splitlines()
    assert lines[1:] == [f"Patch{name[:4]}: {name}" for name in NAMES]
    fetched = one(rpm.assets(bundle, Links(BASE)), "rpm/vllm-patches.inc").splitlines()
    assert fetched[1] == f"Patch0001: https://example.invalid/assets/0.20.2/patches/{NAMES[0]}"


def test_rpm_says_where_git_am_cannot_be_used(bundle: Bundle) -> None:
    last = replace(bundle.items[-1], raw=b"Description: no mail\n")
    text = one(rpm.assets(replace(bundle, items=(*bundle.items[:-1], last)), Links()), "rpm/vllm-patches.inc")
    assert "not for -S git_am" in text


def test_nix(bundle: Bundle) -> None:
    made = nix.assets(bundle, Links())
    assert [line.strip() for line in one(made, "nix/patches.nix").splitlines()[2:-1]] == [
        f"../patches/{n}" for n in NAMES
    ]
    fetched = one(made, "nix/fetched.nix")
    assert "{ fetchurl, baseUrl }:" in fetched
    for item in bundle.items:
        assert f'hash = "{sri(item.raw)}"' in fetched
    assert 'baseUrl ? "https://example.invalid/assets" }' in one(nix.assets(bundle, Links(BASE)), "nix/fetched.nix")


def test_conda(bundle: Bundle) -> None:
    text = one(conda.assets(bundle, Links()), "conda/source.yaml")
    assert f"  - path: vllm-0.20.2.tar.gz\n    sha256: {bundle.release.sha256}\n    patches:\n" in text
    assert text.splitlines()[5:] == [f"      - patches/{name}" for name in NAMES]
    text = one(conda.assets(bundle, Links(sdist="https://example.invalid/{version}/v.tgz")), "conda/source.yaml")
    assert "  - url: https://example.invalid/0.20.2/v.tgz\n" in text


def directives(text: str) -> list[tuple[str, dict[str, object]]]:
    """The body as Spack would run it."""
    calls: list[tuple[str, dict[str, object]]] = []
    exec(
        compile(ast.parse(f"class Vllm:\n{text}"), "package", "exec"),
        {"patch": lambda name, **kw: calls.append((name, kw))},
    )
    return calls


def test_spack(bundle: Bundle) -> None:
    local = directives(one(spack.assets(bundle, Links()), "spack/patches.py"))
    assert local == [
        (f"vllm-patches/0.20.2/{item.name}", {"sha256": sha256(item.raw), "when": "@0.20.2"}) for item in bundle.items
    ]
    fetched = directives(one(spack.assets(bundle, Links(BASE)), "spack/patches.py"))
    assert [name for name, _ in fetched] == [f"https://example.invalid/assets/0.20.2/patches/{name}" for name in NAMES]


def bash(text: str, *, cwd: Path | None = None) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_aur(bundle: Bundle) -> None:
    part = one(aur.assets(bundle, Links(BASE, "https://example.invalid/{version}.tgz")), "aur/PKGBUILD.part")
    said = bash(part + 'printf "%s\\n" "${source[@]}" "${sha256sums[@]}"').splitlines()
    assert said[0] == "vllm-0.20.2.tar.gz::https://example.invalid/0.20.2.tgz"
    assert said[1] == f"{NAMES[0]}::https://example.invalid/assets/0.20.2/patches/{NAMES[0]}"
    assert said[4:] == [bundle.release.sha256, *(sha256(item.raw) for item in bundle.items)]


def test_aur_prepares(bundle: Bundle, tmp_path: Path) -> None:
    part = one(aur.assets(bundle, Links()), "aur/PKGBUILD.part")
    write_tree(tmp_path / "vllm-0.20.2", sdist_files("0.20.2"))
    for item in bundle.items:
        (tmp_path / item.name).write_bytes(item.raw)
    bash(f"srcdir={tmp_path}; {part} prepare", cwd=tmp_path)
    assert patched(tmp_path / "vllm-0.20.2", bundle) == promised(bundle)


def patched(tree: Path, bundle: Bundle) -> Mapping[str, str]:
    return {path: blob_id((tree / path).read_bytes()) for path in bundle.after}


def promised(bundle: Bundle) -> Mapping[str, str]:
    return {path: blob_id(data) for path, data in bundle.after.items() if data is not None}


@pytest.mark.parametrize("tool", [["patch", "-p1", "-F0", "-i"], ["git", "apply", "--whitespace=nowarn"]], ids=" ".join)
def test_the_combined_patch(bundle: Bundle, tmp_path: Path, tool: list[str]) -> None:
    """One section a file, though two patches touch the engine; a file without a newline at its end is among them."""
    text = combined.assets(bundle, Links())[0].data
    assert text.count(b"diff --git ") == len(bundle.after) == 3
    (tmp_path / "x.patch").write_bytes(text)
    write_tree(tmp_path / "tree", sdist_files("0.20.2"))
    done = subprocess.run(
        [*tool, str(tmp_path / "x.patch")], cwd=tmp_path / "tree", capture_output=True, text=True, check=True
    )
    assert "offset" not in done.stdout and "fuzz" not in done.stdout
    assert patched(tmp_path / "tree", bundle) == promised(bundle)


def test_the_combined_patch_is_as_gits(bundle: Bundle, tmp_path: Path) -> None:
    from world import plain_git

    tree = tmp_path / "tree"
    write_tree(tree, sdist_files("0.20.2"))
    plain_git(tree, "init", "--quiet")
    plain_git(tree, "add", "-A", "-f")
    write_tree(tree, {path: data for path, data in bundle.after.items() if data is not None})
    theirs = plain_git(tree, "diff", "--full-index", "--no-color")
    ours = combined.diff(bundle, bundle.after).decode()
    sections = [line for line in theirs.splitlines() if line.startswith("@@")]
    for line in sections:  # git adds the heading of the section
        theirs = theirs.replace(line, line[: line.index("@@", 2) + 2])
    assert ours == theirs + "\n"


class Script:
    """The Dockerfile script on a tree of the release."""

    def __init__(self, bundle: Bundle, tmp_path: Path) -> None:
        (asset,) = dockerfile.assets(bundle, Links())
        self.path, self.tree = tmp_path / "patches.sh", tmp_path / "tree"
        self.path.write_bytes(asset.data)
        assert asset.executable
        write_tree(self.tree, sdist_files("0.20.2"))

    def run(self, *arguments: str) -> tuple[int, str]:
        command = ["sh", str(self.path), *arguments, str(self.tree)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def contents(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.tree)): p.read_bytes() for p in self.tree.rglob("*") if p.is_file()}


@pytest.fixture
def script(bundle: Bundle, tmp_path: Path) -> Script:
    return Script(bundle, tmp_path)


def test_the_script_patches_and_keeps_modes(script: Script, bundle: Bundle) -> None:
    status, said = script.run()
    assert (status, said) == (0, f"{script.tree}: 3 files patched, now 0.20.2+patches.1\n")
    assert patched(script.tree, bundle) == promised(bundle)
    assert (script.tree / SCRIPT).stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in script.tree.iterdir() if path.name.startswith(".vllm")) == []


def test_the_script_says_where_there_is_nothing_to_do(script: Script) -> None:
    script.run()
    before = script.contents()
    assert script.run() == (0, f"{script.tree}: all 3 files are patched already\n")
    assert script.contents() == before


def test_the_script_refuses_another_file(script: Script) -> None:
    (script.tree / ENGINE).write_bytes((script.tree / ENGINE).read_bytes() + b"# mine\n")
    before = script.contents()
    status, said = script.run()
    found = hashlib.sha256(before[ENGINE]).hexdigest()
    assert status == 1 and f"{ENGINE}: expected sha256" in said and f"found {found}" in said
    assert script.contents() == before


def test_the_script_refuses_half_a_series(script: Script, bundle: Bundle) -> None:
    (script.tree / ENGINE).write_bytes(bundle.after[ENGINE] or b"")
    before = script.contents()
    status, said = script.run()
    assert status == 1 and "patched in part: 1 of 3 files" in said
    assert script.contents() == before


def test_the_script_on_an_installed_package(script: Script, bundle: Bundle) -> None:
    (script.tree / KERNEL).unlink()
    (script.tree / KERNEL).parent.rmdir()
    (script.tree / SCRIPT).unlink()
    status, said = script.run()
    assert status == 1 and f"--without-native {script.tree}" in said
    status, said = script.run("--without-native")
    assert (status, said.split(":")[1]) == (0, " 1 files patched, now 0.20.2+patches.1\n")
    assert blob_id((script.tree / ENGINE).read_bytes()) == promised(bundle)[ENGINE]


def test_the_script_refuses_more_words(script: Script) -> None:
    assert script.run("one")[0] == 1
    assert script.run("--what")[0] == 1


@pytest.mark.parametrize("value", ["example.invalid", "https://x y", "https://x'y", "https://x$y", "ftp:/x"])
@pytest.mark.parametrize("option", ["--base-url", "--sdist-url"])
def test_an_address_that_a_channel_could_not_carry(option: str, value: str) -> None:
    with pytest.raises(PatchesError) as caught:
        Links(value) if option == "--base-url" else Links(sdist=value)
    assert caught.value.found == value and option in caught.value.expected


def test_the_manifest(bundle: Bundle) -> None:
    record = json.loads(manifest(bundle, {"0001": "not proved"}).data)
    assert (record["version"], record["series"], record["git_am"]) == ("0.20.2+patches.1", "v0.20.2", True)
    assert [patch["sha256"] for patch in record["patches"]] == [sha256(item.raw) for item in bundle.items]
    assert record["statements"] == {"0001": "not proved", "0003": "fixed", "0005": "fixed"}
    assert record["files"][ENGINE]["after"]["blob"] == promised(bundle)[ENGINE]
    assert record["sdist"]["sha256"] == bundle.release.sha256


def test_modifications_name_every_file_and_patch(bundle: Bundle, world: World) -> None:
    text = modifications(bundle, world.catalog.fixes).data.decode()
    block = text.partition(f"\n{ENGINE}\n")[2].partition("\n\n")[0]
    assert [line.split(":")[0].strip() for line in block.splitlines() if line.startswith("  0")] == NAMES[:2]
    assert "https://github.com/vllm-project/vllm/pull/1" in block
    assert KERNEL in text and SCRIPT in text


def test_the_local_version_names_what_was_chosen(bundle: Bundle) -> None:
    item: Item = bundle.items[1]
    part = replace(bundle, items=(item,), left_out=("0001", "0005"), third_party="Our-Own_series")
    assert part.version == "0.20.2+patches.1.only.3.with.ourownseries"
