"""Every command of docs/packaging.md, section by section, on a small package of the real sdist."""

from __future__ import annotations

import ast
import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from document import commands, sections
from packkit import HERE, PIN, RECIPES, ROOT, TOP, Assets, need, own_environment, run

SECTIONS = sections()


class Section:
    """The commands of one section, to be run in *cwd*."""

    def __init__(self, name: str, cwd: Path, assets: Assets) -> None:
        self.name, self.cwd, self.assets = name, cwd, assets

    def run(self, env: dict[str, str] | None = None, user: int | None = None, lines: list[str] | None = None) -> str:
        lines = lines or commands(SECTIONS[self.name])
        assert lines, self.name
        return run("\n".join(lines), self.cwd, {"A": str(self.assets.folder), **(env or {})}, user)


def test_every_section_with_commands_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for name, body in SECTIONS.items():
        if commands(body):
            assert f'Section("{name}"' in text or f'MAKE["{name}"]' in text, name


def test_debian(tmp_path: Path, assets: Assets, pristine: Path, sdist: Path) -> None:
    need("quilt", "dpkg-source")
    tree = tmp_path / f"vllm-{PIN}"
    shutil.copytree(pristine, tree)
    shutil.copytree(RECIPES / "debian", tree / "debian")
    shutil.copyfile(sdist, tmp_path / f"vllm_{PIN}.orig.tar.gz")
    said = Section("Debian", tree, assets).run()
    assert "Now at patch 0005-mrv2-wake-up.patch" in said.replace("debian/patches/", "")
    assert said.count("applying 0003-mla-flat-buffer.patch") == 2  # by --build, and by -x
    assets.check(tmp_path / "extracted")


def test_rpm(tmp_path: Path, assets: Assets, sdist: Path) -> None:
    need("rpmbuild")
    for name in ("SOURCES", "SPECS"):
        (tmp_path / name).mkdir()
    shutil.copyfile(RECIPES / "vllm.spec", tmp_path / "SPECS" / "vllm.spec")
    shutil.copyfile(sdist, tmp_path / "SOURCES" / f"vllm-{PIN}.tar.gz")
    tree = tmp_path / "BUILD" / f"vllm-{PIN}"
    section = Section("RPM", tmp_path, assets)
    copy, build, change, again = commands(SECTIONS[section.name])
    said = section.run(lines=[copy, build])
    assert "patch -p1 -s --fuzz=0" in said and "git am" not in said
    assets.check(tree)
    assert "git am" in section.run(lines=[change, again])
    assets.check(tree)
    subjects = run("git log --reverse --format=%s", tree).splitlines()[1:]
    assert subjects == [patch["subject"] for patch in assets.manifest["patches"]]


def test_nix(tmp_path: Path, assets: Assets, sdist: Path) -> None:
    need("nix-build", "nix-instantiate")
    text = (RECIPES / "default.nix").read_text(encoding="utf-8")
    given = f'src ? "{sdist}", patched ? "{" ".join(sorted(assets.promised))}"'
    (tmp_path / "default.nix").write_text(text.replace("src, patched", given), encoding="utf-8")
    env = {f"NIX_{name}_DIR": str(tmp_path / "nix" / name.lower()) for name in ("STORE", "STATE", "LOG", "CONF")}
    env["NIX_CONFIG"] = "sandbox = false\nbuild-users-group ="
    said = Section("Nix", tmp_path, assets).run(env)
    assert said.count("patching file") == len(assets.promised)
    assets.check(Path(said.split()[-1]))


def test_conda(tmp_path: Path, assets: Assets, sdist: Path) -> None:
    shutil.copyfile(RECIPES / "recipe.yaml", tmp_path / "recipe.yaml")
    shutil.copyfile(sdist, tmp_path / f"vllm-{PIN}.tar.gz")
    (tmp_path / "patched.txt").write_text("\n".join(sorted(assets.promised)), encoding="utf-8")
    Section("conda", tmp_path, assets).run()
    (package,) = (tmp_path / "output" / "noarch").glob("vllm-*.conda")
    run(f"unzip -q {package} && tar --zstd -xf pkg-*.tar.zst", tmp_path)
    assets.check(tmp_path / "patched")


def test_spack(tmp_path: Path, assets: Assets, touched: Path) -> None:
    """Not by Spack: its directives by a stand-in, and `patch` called as Spack calls it."""
    shutil.copyfile(RECIPES / "package.py", tmp_path / "package.py")
    Section("Spack", tmp_path, assets).run()
    calls: list[tuple[str, str, str]] = []
    names = {"PythonPackage": object, "version": lambda name: None}
    names["patch"] = lambda path, *, sha256, when: calls.append((path, sha256, when))
    exec(compile(ast.parse((tmp_path / "package.py").read_text(encoding="utf-8")), "package.py", "exec"), names)
    assert len(calls) == 5
    tree = tmp_path / "tree"
    shutil.copytree(touched, tree)
    for path, sha256, when in calls:
        file = tmp_path / path
        assert (hashlib.sha256(file.read_bytes()).hexdigest(), when) == (sha256, f"@{PIN}")
        run(f"patch -s -p 1 -i {file} -d .", tree)
    assets.check(tree)


def test_aur(tmp_path: Path, assets: Assets, sdist: Path) -> None:
    need("makepkg", "bsdtar")
    home = tmp_path / "aur"
    home.mkdir()
    shutil.copyfile(RECIPES / "PKGBUILD", home / "PKGBUILD")
    shutil.copyfile(sdist, home / f"vllm-{PIN}.tar.gz")
    user = None
    if os.getuid() == 0:  # makepkg will not run as root
        user = pwd.getpwnam("nobody").pw_uid
        for folder in (home, *home.parents[:3], *(assets.folder / "x").parents[:5]):
            folder.chmod(folder.stat().st_mode | 0o055)
        run(f"chown -R {user} .", home)
    said = Section("AUR", home, assets).run({"PACMAN": "true", "HOME": str(home)}, user)
    assert said.count("... Passed") == 6
    assets.check(home / "src" / f"vllm-{PIN}")


def test_dockerfile(tmp_path: Path, assets: Assets, touched: Path) -> None:
    shutil.copytree(touched, tmp_path / f"vllm-{PIN}")
    said = Section("Dockerfile", tmp_path, assets).run()
    count = len(assets.promised)
    assert said.splitlines() == [
        f"vllm-{PIN}: {count} files patched, now {assets.manifest['version']}",
        f"vllm-{PIN}: all {count} files are patched already",
    ]
    assets.check(tmp_path / f"vllm-{PIN}")


def test_git_and_patch(tmp_path: Path, assets: Assets, touched: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(touched, tree)
    run("git config user.name a && git config user.email a@a.invalid", tree)
    section = Section("git, patch, one file", tree, assets)
    lines = commands(SECTIONS[section.name])
    assert sum(line.startswith("git reset") for line in lines) == 2
    for line in lines:
        run(line, tree, {"A": str(assets.folder)})
        if not line.startswith("git reset"):
            assets.check(tree)


def test_native_dependencies(tmp_path: Path, assets: Assets) -> None:
    said = Section("Native dependencies", tmp_path, assets).run()
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    variables = {
        "cutlass": "VLLM_CUTLASS_SRC_DIR",
        "vllm-flash-attn": "VLLM_FLASH_ATTN_SRC_DIR",
        "flashmla": "FLASH_MLA_SRC_DIR",
        "deepgemm": "DEEPGEMM_SRC_DIR",
        "qutlass": "QUTLASS_SRC_DIR",
        "triton_kernels": "TRITON_KERNELS_SRC_DIR",
        "oneDNN": "FETCHCONTENT_SOURCE_DIR_ONEDNN",
        "arm_compute": "ACL_ROOT_DIR",
    }
    assert {name: row[2] for name, row in rows.items()} == variables
    assert rows["cutlass"][:2] == ["https://github.com/nvidia/cutlass.git", "v4.4.2"]
    assert all(row[0].startswith("https://github.com/") and "$" not in row[1] for row in rows.values())


def make(line: str, cwd: Path, out: Path) -> str:
    """A command of the document that calls make: in this checkout, with its output elsewhere."""
    env = {**own_environment(), "DIST": str(out), "PWD": str(cwd)}
    if venv := os.environ.get("PACKAGING_VENV"):
        env["VENV"] = venv
    return run(line.replace("make ", f"make --directory={ROOT} "), cwd, env)


MAKE = {name: commands(body) for name, body in SECTIONS.items()}


def test_all_of_it_and_the_tarball(tmp_path: Path) -> None:
    """`make dist` for every release, then the tarball's own section on what it made."""
    first, second = MAKE[""]
    make(first, tmp_path, tmp_path / "dist")
    assert run(f"{second}; echo $A; ls $A", tmp_path).splitlines()[0] == str(tmp_path / "dist" / TOP / PIN)
    run("\n".join(MAKE["Tarball"]), tmp_path)
    with tarfile.open(tmp_path / "dist" / TOP / f"{TOP}.tar") as archive:
        assert {m.name.split("/")[1] for m in archive if m.name.count("/") > 1} == set(pins())


def pins() -> list[str]:
    from vllm_patches.series.catalog import open_catalog

    return [release.version for release in open_catalog().pins]


def test_statements_from_a_real_proof(tmp_path: Path) -> None:
    lines = MAKE["Statements for scanners"]
    make(lines[0].replace(">proof.json", f">{tmp_path}/proof.json"), tmp_path, tmp_path / "dist")
    said = make(lines[1].replace("PROOF=proof.json", f"PROOF={tmp_path}/proof.json"), tmp_path, tmp_path / "dist")
    assert "no statement for scanners: the proof run has no result for it" in said
    made = tmp_path / "dist" / f"{TOP}-{PIN}" / PIN
    assert '"VLLM-PATCHES-0003"' in (made / "openvex.json").read_text(encoding="utf-8")
    assert '"VLLM-PATCHES-0001"' not in (made / "openvex.json").read_text(encoding="utf-8")


def test_some_of_the_five(tmp_path: Path, touched: Path) -> None:
    (line,) = MAKE["Some of the five"]
    make(line, tmp_path, tmp_path / "dist")
    made = Assets(tmp_path / "dist" / f"{TOP}-{PIN}-only-0003-0005")
    names = (made.folder / "patches" / "series").read_text(encoding="utf-8").split()
    assert [name[:4] for name in names] == ["0003", "0005"]
    tree = tmp_path / "tree"
    shutil.copytree(touched, tree)
    run(f"cat {made.folder}/patches/*.patch | patch -p1 -F0", tree)
    made.check(tree)


def test_with_patches_of_your_own(tmp_path: Path, touched: Path) -> None:
    """A change of a line that one of ours moves; both ways through the script and `patch`."""
    own = tmp_path / "series-of-ours"
    own.mkdir()
    tree = tmp_path / "tree"
    shutil.copytree(touched, tree)
    path = tree / "vllm/v1/attention/backends/mla/indexer.py"
    text = path.read_bytes()
    path.write_bytes(text + b"\n# ours, at the end\n")
    (own / "ours.patch").write_text(run("git diff", tree), encoding="utf-8")
    (own / "series").write_text("ours.patch\n", encoding="utf-8")
    above, below = (line.replace("/path/to/series", str(own)) for line in MAKE["With patches of your own"])
    for line, position in ((above, "above"), (below, "below")):
        make(line, tmp_path, tmp_path / "dist")
        made = Assets(tmp_path / "dist" / f"{TOP}-{PIN}-{position}-series-of-ours")
        names = (made.folder / "patches" / "series").read_text(encoding="utf-8").split()
        assert names.index("ours.patch") == (0 if position == "below" else 5)
        run("git reset --quiet --hard pristine", tree)
        for name in names:
            run(f"patch -p1 -F0 -i {made.folder}/patches/{name}", tree)
        made.check(tree)
        run("git reset --quiet --hard pristine", tree)
        run(f"sh {made.folder}/vllm-{PIN}-patches.sh .", tree)
        made.check(tree)


def test_the_shim_is_the_library() -> None:
    """The command in tests/packaging/bin has to be the one that is called."""
    found = subprocess.run(["bash", "-c", "command -v rattler-build"], capture_output=True, text=True, check=False,
                           env={"PATH": f"{HERE / 'bin'}:{os.environ['PATH']}"})  # fmt: skip
    assert found.stdout.strip() == str(HERE / "bin" / "rattler-build")
    assert subprocess.run([sys.executable, "-c", "import rattler_build"], check=False).returncode == 0
