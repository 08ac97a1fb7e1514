"""`verify`: every form of vLLM, every state of a fix, and every broken claim."""

from __future__ import annotations

import hashlib
import io
import json
import py_compile
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from installs import (
    CUDA,
    ENGINE,
    KERNEL,
    WORKER,
    Files,
    make_catalog,
    patched,
    put_in,
    record_hash,
    snapshot,
    sources,
)
from test_probes import TREE
from vllm_patches import cli
from vllm_patches.errors import PatchesError
from vllm_patches.installed import install as installing
from vllm_patches.installed.install import uninstall
from vllm_patches.installed.verify import Status, Verified, require_fixed, verify
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.hunks import blob_id

INFO = "vllm-0.20.2.dist-info"
PATCHED = {"0001": Status.PRESENT, "0003": Status.PRESENT, "0005": Status.PRESENT}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return make_catalog(tmp_path / "patches")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    put_in(tmp_path / "site", "0.20.2")
    return tmp_path / "site"


def install(catalog: Catalog, site: Path, without: tuple[str, ...] = ()) -> None:
    installing.install(catalog, site, without, lambda line: None)


def carried(report: Verified) -> dict[str, Status]:
    """The fixes that the series of 0.20.2 carries; upstream has fixed the other two."""
    assert all(fix.status is Status.FIXED for fix in report.fixes if fix.fix in ("0002", "0004"))
    return {fix.fix: fix.status for fix in report.fixes if fix.fix in PATCHED}


def write_tree(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_sdist(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"vllm-x/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_wheel(path: Path, site: Path) -> Path:
    """The site folder zipped, as a wheel is."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(site.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                archive.write(file, file.relative_to(site).as_posix())
    return path


def test_stock_and_patched_packages(catalog: Catalog, site: Path) -> None:
    stock = verify(catalog, site)
    assert carried(stock) == dict.fromkeys(PATCHED, Status.MISSING) and not stock.ok and not stock.problems
    install(catalog, site)
    report = verify(catalog, site)
    assert carried(report) == PATCHED and report.ok
    assert (report.kind, report.version, report.release) == ("installed package", "0.20.2", "0.20.2")
    assert {fix.by for fix in report.fixes if fix.fix in PATCHED} == {"hash"}
    uninstall(site, lambda line: None)
    assert verify(catalog, site) == stock


def test_it_writes_nothing(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    before = snapshot(site)
    verify(catalog, site)
    assert snapshot(site) == before


def test_trees_and_sdists(catalog: Catalog, tmp_path: Path) -> None:
    stock, done = sources("0.20.2"), patched("v0.20.2", sources("0.20.2"))
    for number, (files, ok) in enumerate(((stock, False), (done, True))):
        tree = verify(catalog, write_tree(tmp_path / f"tree{number}", files))
        sdist = verify(catalog, write_sdist(tmp_path / f"{number}.tar.gz", files))
        assert (tree.ok, sdist.ok) == (ok, ok)
        assert (tree.kind, sdist.kind, tree.version, sdist.version) == ("source tree", "sdist", "0.20.2", "0.20.2")
        assert carried(tree) == carried(sdist)


def test_a_tree_without_a_version_is_known_by_its_files(catalog: Catalog, tmp_path: Path) -> None:
    files = patched("v0.20.2", sources("0.20.2"))
    del files["PKG-INFO"], files["vllm/_version.py"]
    report = verify(catalog, write_tree(tmp_path / "tree", files))
    assert (report.version, report.release, report.ok) == ("", "0.20.2", True)


def test_native_sources_count_in_a_tree(catalog: Catalog, tmp_path: Path) -> None:
    files = patched("v0.19.1", sources("0.19.1"))
    assert verify(catalog, write_tree(tmp_path / "tree", files)).ok
    half = verify(catalog, write_tree(tmp_path / "tree", {CUDA: sources("0.19.1")[CUDA]}))
    assert half.fixes[0].status is Status.PARTLY and CUDA in half.fixes[0].detail and not half.ok


def test_native_code_that_was_left_out_fails_unless_it_is_accepted(catalog: Catalog, tmp_path: Path) -> None:
    put_in(tmp_path / "s", "0.19.1")
    assert verify(catalog, tmp_path / "s", ("0001-native",)).fixes[0].status is Status.MISSING
    install(catalog, tmp_path / "s", ("0001-native",))
    strict = verify(catalog, tmp_path / "s")
    assert strict.fixes[0].status is Status.PARTLY and CUDA in strict.fixes[0].detail and not strict.ok
    accepted = verify(catalog, tmp_path / "s", ("0001-native",))
    assert accepted.fixes[0].status is Status.LEFT_OUT and accepted.ok


def test_a_rebuilt_extension_stands_for_the_native_part(catalog: Catalog, tmp_path: Path) -> None:
    info = put_in(tmp_path / "s", "0.19.1")
    install(catalog, tmp_path / "s", ("0001-native",))
    path = info / "patches.json"
    claims = json.loads(path.read_text())
    (tmp_path / "s" / "vllm" / "_override.so").write_bytes(b"elf")
    built = patched("v0.19.1", sources("0.19.1"))[CUDA]
    claims["native"] = {
        "source": {CUDA: {"after": {"blob": blob_id(built)}}},
        "files": {"vllm/_override.so": {"sha256": "0" * 64}},
    }
    path.write_text(json.dumps(claims))
    assert any(
        "vllm/_override.so was added, but the file was changed" in problem
        for problem in verify(catalog, tmp_path / "s").problems
    )
    claims["native"]["files"]["vllm/_override.so"]["sha256"] = hashlib.sha256(b"elf").hexdigest()
    path.write_text(json.dumps(claims))
    assert verify(catalog, tmp_path / "s").ok
    claims["native"]["source"][CUDA]["after"]["blob"] = blob_id(sources("0.19.1")[CUDA])
    path.write_text(json.dumps(claims))
    assert verify(catalog, tmp_path / "s").fixes[0].status is Status.PARTLY  # built from the unpatched source
    claims["native"]["source"][CUDA]["after"]["blob"] = blob_id(built)
    path.write_text(json.dumps(claims))
    (tmp_path / "s" / "vllm" / "_override.so").unlink()
    assert any("_override.so was added, but it is not there" in p for p in verify(catalog, tmp_path / "s").problems)
    claims["native"]["files"] = {}
    path.write_text(json.dumps(claims))
    assert verify(catalog, tmp_path / "s").fixes[0].status is Status.PARTLY  # a claim without a file is none


def test_files_that_a_build_added(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    path = site / INFO / "patches.json"
    claims = json.loads(path.read_text())
    version = site / "vllm" / "_version.py"
    claims["not_of_the_series"] = [
        {"path": "vllm/_version.py", "why": "x", "sha256": hashlib.sha256(version.read_bytes()).hexdigest()},
        {"path": "vllm/hook.py", "why": "x"},
    ]
    path.write_text(json.dumps(claims))
    assert verify(catalog, site).problems == ("patches.json claims that vllm/hook.py was added, but it is not there",)
    (site / "vllm" / "hook.py").write_text("")
    assert verify(catalog, site).ok
    version.write_text("x")
    assert "_version.py was added, but the file was changed since" in verify(catalog, site).problems[0]


def test_wheels(catalog: Catalog, site: Path, tmp_path: Path) -> None:
    assert not verify(catalog, write_wheel(tmp_path / "vllm-0.20.2-py3-none-any.whl", site)).ok
    install(catalog, site)
    report = verify(catalog, write_wheel(tmp_path / "vllm-0.20.2-py3-none-any.whl", site))
    assert report.ok and report.kind == "wheel" and carried(report) == PATCHED


def test_a_patched_wheel_with_its_own_version(catalog: Catalog, tmp_path: Path) -> None:
    """As `build` makes it: local version, patches.json, no journal."""
    site, name = tmp_path / "s", "vllm-0.20.2+patches.1.dist-info"
    put_in(tmp_path / "donor", "0.20.2")
    install(catalog, tmp_path / "donor")
    claims = json.loads((tmp_path / "donor" / INFO / "patches.json").read_text()) | {"version": "0.20.2+patches.1"}
    put_in(site, "0.20.2+patches.1", files=patched("v0.20.2", sources("0.20.2")))
    (site / name / "patches.json").write_text(json.dumps(claims))
    for path in (site, write_wheel(tmp_path / "x.whl", site)):
        report = verify(catalog, path)
        assert report.ok and report.version == "0.20.2+patches.1", report
    (site / name / "patches.json").write_text(json.dumps(claims | {"version": "0.20.2+patches.2"}))
    assert any("says version" in problem for problem in verify(catalog, site).problems)


def test_partly_applied(catalog: Catalog, site: Path) -> None:
    done = patched("v0.20.2", sources("0.20.2"))
    (site / ENGINE).write_bytes(done[ENGINE])
    report = verify(catalog, site)
    assert carried(report) == {"0001": Status.PRESENT, "0003": Status.PARTLY, "0005": Status.MISSING}
    assert KERNEL in report.fixes[2].detail and not report.ok


def test_a_step_of_the_series_counts_as_far_as_it_goes(catalog: Catalog, site: Path) -> None:
    first = sources("0.20.2")[ENGINE].replace(b"step20 = 20\n", b"step20 = 20\nstep20b = 0\n")
    (site / ENGINE).write_bytes(first)
    assert carried(verify(catalog, site)) == {
        "0001": Status.PRESENT,
        "0003": Status.MISSING,
        "0005": Status.MISSING,
    }


def test_a_file_changed_after_patching(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    (site / KERNEL).write_bytes(b"mine\n")
    report = verify(catalog, site)
    assert carried(report) == PATCHED | {"0003": Status.MODIFIED} and not report.ok
    assert f"patches.json claims that {KERNEL} is patched, but the file was changed since" in report.problems


def test_claims_over_pristine_and_missing_files(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    (site / KERNEL).write_bytes(sources("0.20.2")[KERNEL])
    (site / WORKER).unlink()
    report = verify(catalog, site)
    assert carried(report) == {"0001": Status.PRESENT, "0003": Status.PARTLY, "0005": Status.MODIFIED}
    assert f"patches.json claims that {KERNEL} is patched, but the file is pristine" in report.problems
    assert f"patches.json claims that {WORKER} is patched, but it is not there" in report.problems


def test_record_must_have_the_hash_of_what_is_there(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    record = site / INFO / "RECORD"
    record.write_text(record.read_text().replace(record_hash((site / WORKER).read_bytes()), "sha256=AAAA"))
    report = verify(catalog, site)
    assert report.problems == (f"RECORD does not have the hash of {WORKER}",) and not report.ok


def test_another_version_over_the_patches(catalog: Catalog, site: Path) -> None:
    """What an installer leaves that copies a release over another one."""
    install(catalog, site)
    put_in(site, "0.20.1")
    with pytest.raises(PatchesError) as caught:
        verify(catalog, site)
    assert "several versions" in str(caught.value) and f"a patch set is in {INFO}" in str(caught.value)
    (site / INFO / "METADATA").unlink()
    report = verify(catalog, site)
    assert f"{INFO} is left of a vLLM that is gone; a patch set was in it" in report.problems and not report.ok
    shutil.rmtree(site / "vllm-0.20.1.dist-info")
    with pytest.raises(PatchesError, match="a patch set is left over"):
        verify(catalog, site)


def test_an_upgrade_that_keeps_patches_json(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    kept = (site / INFO / "patches.json").read_bytes()
    shutil.rmtree(site)
    info = put_in(site, "0.20.1")
    (info / "patches.json").write_bytes(kept)
    report = verify(catalog, site)
    assert "patches.json is for vLLM 0.20.2, but the package is 0.20.1" in report.problems and not report.ok


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": 1}', "cannot be read"),
        ('{"schema": 1, "release": "", "fixes": {}, "files": {}}', "empty"),
        (
            '{"schema": 1, "release": "0.20.2", "fixes": {"0001": {}}, "files": {}, "not_of_the_series": '
            '[{"path": "x.so"}], "native": {"source": {"x.cu": {}}}}',
            "cannot be read",
        ),
    ],
)
def test_a_patches_json_that_says_nothing(catalog: Catalog, site: Path, text: str, words: str) -> None:
    (site / INFO / "patches.json").write_text(text)
    report = verify(catalog, site)
    assert words in report.problems[0] and not report.ok


def test_a_lost_patches_json(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    (site / INFO / "patches.json").unlink()
    report = verify(catalog, site)
    assert "is gone" in report.problems[0] and carried(report) == PATCHED and not report.ok


def test_a_compiled_file_that_hides_the_source(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    py_compile.compile(str(site / WORKER), doraise=True)
    assert verify(catalog, site).ok
    py_compile.compile(
        str(site / WORKER), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, doraise=True
    )
    report = verify(catalog, site)
    assert "without a look at its source" in report.problems[0] and not report.ok


def test_code_of_an_unknown_hash_is_judged_by_the_probes(catalog: Catalog, tmp_path: Path) -> None:
    """A fork: the files of the probes' own tests hold every fix, and no series knows their hashes."""
    fork = write_tree(tmp_path / "fork", {name: text.encode() for name, text in TREE.items()})
    (fork / "PKG-INFO").write_text("Name: vllm\nVersion: 0.21.0.dev1+mine\n")
    report = verify(catalog, fork)
    assert report.release == "" and report.ok, report
    assert {fix.by for fix in report.fixes} == {"code"} and {fix.status for fix in report.fixes} == {Status.PRESENT}
    worker = next(name for name in TREE if name.endswith("lightning_attn.py"))
    (fork / worker).write_text(TREE[worker].replace("NULL_BLOCK_ID", "PAD_SLOT_ID"))
    spoilt = verify(catalog, fork)
    assert not spoilt.ok and not spoilt.fixes[1].status.fine


def test_the_code_overrules_the_table(catalog: Catalog, tmp_path: Path) -> None:
    """0.22.0 is recorded as fixed throughout."""
    tree = write_tree(tmp_path / "tree", {name: text.encode() for name, text in TREE.items()})
    (tree / "PKG-INFO").write_text("Name: vllm\nVersion: 0.22.0\n")
    assert verify(catalog, tree).ok
    name = next(name for name in TREE if name.endswith("lightning_attn.py"))
    (tree / name).write_text(TREE[name].replace("NULL_BLOCK_ID", "PAD_SLOT_ID"))
    report = verify(catalog, tree)
    assert not report.ok and "recorded as fixed upstream" in report.fixes[1].detail


def test_code_that_no_probe_knows_is_never_a_pass(catalog: Catalog, site: Path) -> None:
    (site / WORKER).write_bytes(b"rewritten = True\n")
    report = verify(catalog, site)
    assert report.fixes[4].status is Status.MODIFIED and report.fixes[4].by == "code" and not report.ok


def test_a_release_without_a_series(catalog: Catalog, tmp_path: Path) -> None:
    put_in(tmp_path / "s", "0.21.0")
    report = verify(catalog, tmp_path / "s")
    assert not report.ok and "no series for this release" in report.fixes[0].detail


@pytest.mark.parametrize("name", ["x.whl", "x.tar.gz", "x.txt", "empty", "none"])
def test_what_is_no_vllm(catalog: Catalog, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name != "none":
        path.write_bytes(b"no archive")
    with pytest.raises(PatchesError) as caught:
        verify(catalog, path)
    assert caught.value.file == str(path) and caught.value.next_command


def test_a_wheel_cut_short_or_damaged(catalog: Catalog, site: Path, tmp_path: Path) -> None:
    whole = write_wheel(tmp_path / "whole.whl", site).read_bytes()
    (tmp_path / "short.whl").write_bytes(whole[:-100])
    with pytest.raises(PatchesError, match="damaged or cut short"):
        verify(catalog, tmp_path / "short.whl")
    at = whole.index(KERNEL.encode()) + 60  # inside the member's data
    (tmp_path / "flipped.whl").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    with pytest.raises(PatchesError, match="damaged or cut short"):
        verify(catalog, tmp_path / "flipped.whl")


def test_require_fixed(catalog: Catalog, site: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        require_fixed(verify(catalog, site))
    assert "0001 missing" in caught.value.found
    install(catalog, site)
    require_fixed(verify(catalog, site))


def test_the_command(
    catalog: Catalog, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PATCHES_DIR", str(catalog.folder))
    assert cli.main(["verify", str(site)]) == 1
    assert "NOT VERIFIED: 0001, 0003, 0005" in capsys.readouterr().out
    assert cli.main(["install", "--site", str(site)]) == 0
    assert KERNEL in capsys.readouterr().out
    assert cli.main(["verify", str(site), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["release"] == "0.20.2" and told["fixes"][0]["status"] == "present" and told["problems"] == []
    assert cli.main(["uninstall", "--site", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "as before"
    assert cli.main(["uninstall", "--site", str(site)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main(["install", "--site", str(site / "vllm"), "--json"]) == 1
    assert "no vLLM is installed there" in json.loads(capsys.readouterr().out)["error"]["what"]
