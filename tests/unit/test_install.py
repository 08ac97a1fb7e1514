"""`install` and `uninstall` on real site folders: what changes, what comes back, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installs import (
    ENGINE,
    KERNEL,
    ODD,
    WORKER,
    make_catalog,
    patched,
    put_in,
    record_hash,
    record_rows,
    snapshot,
    sources,
)
from vllm_patches.errors import PatchesError
from vllm_patches.installed import install as installing
from vllm_patches.installed.install import Installed, InstallOutcome, uninstall
from vllm_patches.installed.verify import verify
from vllm_patches.series.catalog import Catalog

TOUCHED = (ENGINE, KERNEL, WORKER)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return make_catalog(tmp_path / "patches")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    put_in(folder, "0.20.2")
    return folder


def install(catalog: Catalog, site: Path, without: tuple[str, ...] = ()) -> Installed:
    return installing.install(catalog, site, without, lambda line: None)


def restore(site: Path) -> Installed:
    return uninstall(site, lambda line: None)


def refused(catalog: Catalog, site: Path, *words: str, without: tuple[str, ...] = ()) -> PatchesError:
    """`install` refuses with all of *words* in its message, says what to type, and changes nothing."""
    before = snapshot(site)
    with pytest.raises(PatchesError) as caught:
        install(catalog, site, without)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.next_command
    assert snapshot(site) == before
    return caught.value


def test_the_files_are_those_of_the_series(catalog: Catalog, site: Path) -> None:
    result = install(catalog, site)
    assert result.outcome is InstallOutcome.INSTALLED and set(result.files) == set(TOUCHED)
    wanted = patched("v0.20.2", sources("0.20.2"))
    for name in wanted:
        if name.startswith("vllm/"):
            assert (site / name).read_bytes() == wanted[name], name


def test_modes_stay(catalog: Catalog, site: Path) -> None:
    (site / KERNEL).chmod(0o755)
    install(catalog, site)
    assert (site / ENGINE).stat().st_mode & 0o777 == 0o640
    assert (site / KERNEL).stat().st_mode & 0o777 == 0o755


def test_everything_is_readable_whatever_the_umask(catalog: Catalog, site: Path) -> None:
    old = os.umask(0o077)
    try:
        install(catalog, site)
    finally:
        os.umask(old)
    info = site / "vllm-0.20.2.dist-info"
    assert (info / "patches.json").stat().st_mode & 0o777 == 0o644
    assert (info / "vllm-patches").stat().st_mode & 0o777 == 0o755
    assert (info / "vllm-patches" / "installed.json").stat().st_mode & 0o777 == 0o644


def test_record_lists_every_file_that_is_there_and_no_other(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    rows = record_rows(site)
    assert set(rows) == {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    for name, (digest, size) in rows.items():
        if digest:
            data = (site / name).read_bytes()
            assert (digest, size) == (record_hash(data), str(len(data))), name
    assert rows[ENGINE][0] and rows["vllm-0.20.2.dist-info/patches.json"][0] and rows[ODD][0]


def test_patches_json(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    claims = json.loads((site / "vllm-0.20.2.dist-info" / "patches.json").read_text())
    assert (claims["schema"], claims["release"], claims["version"], claims["series"]) == (
        1,
        "0.20.2",
        "0.20.2",
        "v0.20.2",
    )
    assert {fix: entry["result"] for fix, entry in claims["fixes"].items()} == {
        "0001": "applied",
        "0002": "fixed upstream",
        "0003": "applied",
        "0004": "fixed upstream",
        "0005": "applied",
    }
    patch = catalog.folder / "v0.20.2" / claims["fixes"]["0003"]["patch"]
    assert claims["fixes"]["0003"]["patch_sha256"] == hashlib.sha256(patch.read_bytes()).hexdigest()
    wanted = patched("v0.20.2", sources("0.20.2"))
    assert set(claims["files"]) == set(TOUCHED)
    for name, entry in claims["files"].items():
        assert entry["before"]["sha256"] == hashlib.sha256(sources("0.20.2")[name]).hexdigest()
        assert entry["after"]["sha256"] == hashlib.sha256(wanted[name]).hexdigest()
    assert claims["files"][ENGINE]["patches"] == ["0001-dsa-mtp-ima.patch", "0003-mla-flat-buffer.patch"]
    assert claims["not_of_the_series"] == []


def test_the_notice_of_change_names_every_file(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    text = (site / "vllm-0.20.2.dist-info" / "MODIFICATIONS").read_text()
    assert (
        all(name in text for name in TOUCHED)
        and "0003-mla-flat-buffer.patch" in text
        and "vllm/pull/1\n" in text
        and "not affiliated" in text
    )


def test_uninstall_restores_every_byte_mode_and_time(catalog: Catalog, site: Path) -> None:
    before = snapshot(site)
    install(catalog, site)
    assert snapshot(site) != before
    assert restore(site).outcome is InstallOutcome.RESTORED
    assert snapshot(site) == before


def test_uninstall_without_an_install_changes_nothing(site: Path) -> None:
    before = snapshot(site)
    assert restore(site).outcome is InstallOutcome.NOTHING
    assert snapshot(site) == before


def test_a_second_install_changes_nothing(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    before = snapshot(site)
    assert install(catalog, site).outcome is InstallOutcome.ALREADY
    assert snapshot(site) == before


def test_another_patch_set_replaces_the_first(catalog: Catalog, site: Path) -> None:
    pristine = snapshot(site)
    install(catalog, site)
    folder = catalog.folder / "v0.20.2"
    (folder / "series").write_text("0001-dsa-mtp-ima.patch\n0003-mla-flat-buffer.patch\n")
    shorter = Catalog(catalog.folder)
    text = (catalog.folder / "releases.toml").read_text()
    (catalog.folder / "releases.toml").write_text(text.replace('0005 = { state = "live"', '0005 = { state = "fixed"'))
    result = install(shorter, site)
    assert result.outcome is InstallOutcome.INSTALLED and "taken out" in result.notes[0]
    assert (site / WORKER).read_bytes() == sources("0.20.2")[WORKER]
    assert (site / KERNEL).read_bytes() == patched("v0.20.2", sources("0.20.2"))[KERNEL]
    restore(site)
    assert snapshot(site) == pristine


def test_stale_compiled_modules_cannot_hide_the_patch(catalog: Catalog, site: Path) -> None:
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(site / WORKER), invalidation_mode=unchecked, doraise=True)
    show = [sys.executable, "-c", "import vllm.worker; print(vllm.worker.last)"]
    assert subprocess.run(show, cwd=site, capture_output=True, text=True, check=True).stdout == "True\n"
    before = snapshot(site)
    install(catalog, site)
    assert subprocess.run(show, cwd=site, capture_output=True, text=True, check=True).stdout == "False\n"
    restore(site)
    assert subprocess.run(show, cwd=site, capture_output=True, text=True, check=True).stdout == "True\n"
    assert snapshot(site) == before  # the compiled file of before is back, and the one of the patched module is gone


def test_a_folder_of_compiled_files_that_was_not_there_goes_again(catalog: Catalog, site: Path) -> None:
    before = snapshot(site)
    install(catalog, site)
    py_compile.compile(str(site / KERNEL), doraise=True)
    restore(site)
    assert snapshot(site) == before


def test_a_wrong_wish_does_not_take_out_what_is_in(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    refused(catalog, site, "nothing of that name", without=("0001-native",))


def test_a_hard_link_from_a_cache_is_not_written_through(catalog: Catalog, site: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cached-engine.py"
    os.link(site / ENGINE, cached)
    pristine = cached.read_bytes()
    before = snapshot(site)
    install(catalog, site)
    assert cached.read_bytes() == pristine and not cached.samefile(site / ENGINE)
    restore(site)
    assert cached.read_bytes() == pristine
    assert snapshot(site) == before


def test_a_file_that_is_a_link_into_a_cache_comes_back_as_that_link(
    catalog: Catalog, site: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    cached = tmp_path / "cache" / "engine.py"
    (site / ENGINE).rename(cached)
    (site / ENGINE).symlink_to("../../cache/engine.py")
    before = snapshot(site)
    install(catalog, site)
    assert not (site / ENGINE).is_symlink()
    assert cached.read_bytes() == sources("0.20.2")[ENGINE]
    restore(site)
    assert snapshot(site) == before and cached.read_bytes() == sources("0.20.2")[ENGINE]


def test_a_site_folder_reached_through_a_link(catalog: Catalog, site: Path, tmp_path: Path) -> None:
    before = snapshot(site)
    (tmp_path / "link").symlink_to(site)
    install(catalog, tmp_path / "link")
    assert (site / WORKER).read_bytes().endswith(b"False")
    restore(tmp_path / "link")
    assert snapshot(site) == before


def test_an_environment_stands_for_its_site_folder(catalog: Catalog, tmp_path: Path) -> None:
    site = tmp_path / "env" / "lib" / "python3.12" / "site-packages"
    put_in(site, "0.20.2")
    (tmp_path / "env" / "lib64").symlink_to("lib")
    assert install(catalog, tmp_path / "env").site == str(site)


def test_a_local_version_of_an_official_build_is_judged_by_its_files(catalog: Catalog, tmp_path: Path) -> None:
    put_in(tmp_path / "s", "0.20.2+cu129", files=sources("0.20.2"))
    assert install(catalog, tmp_path / "s").outcome is InstallOutcome.INSTALLED


def test_native_code_is_refused_or_left_out_by_name(catalog: Catalog, tmp_path: Path) -> None:
    site = tmp_path / "old"
    info = put_in(site, "0.19.1")
    before = snapshot(site)
    refused(catalog, site, "C++", "make build PIN=0.19.1", "--without 0001-native")
    result = install(catalog, site, ("0001-native",))
    assert result.rows[0].result == "applied, less 0001-native"
    claims = json.loads((info / "patches.json").read_text())
    assert claims["without"] == ["0001-native"]
    assert claims["fixes"]["0001"]["left_out"] == ["csrc/kernel.cu"] and claims["fixes"]["0001"]["result"] == "applied"
    assert (site / ENGINE).read_bytes() == patched("v0.19.1", sources("0.19.1"))[ENGINE]
    assert install(catalog, site, ("0001-native",)).outcome is InstallOutcome.ALREADY
    restore(site)
    assert snapshot(site) == before


def test_nothing_can_be_left_out_that_is_not_there(catalog: Catalog, site: Path) -> None:
    refused(catalog, site, "nothing of that name", "0001-native", without=("0001-native",))


def test_a_release_that_needs_nothing(catalog: Catalog, tmp_path: Path) -> None:
    put_in(tmp_path / "s", "0.22.0")
    before = snapshot(tmp_path / "s")
    assert install(catalog, tmp_path / "s").outcome is InstallOutcome.NOTHING
    assert snapshot(tmp_path / "s") == before


def test_a_release_without_a_series_is_an_error(catalog: Catalog, tmp_path: Path) -> None:
    put_in(tmp_path / "s", "0.21.0")
    refused(catalog, tmp_path / "s", "no series", "0001, 0002, 0003, 0004, 0005")


@pytest.mark.parametrize(
    ("version", "words"),
    [("0.20.2+patches.1", "patched already"), ("0.99.0", "no release of this version"), ("0.20.2rc1", "no release")],
)
def test_versions_that_are_refused(catalog: Catalog, tmp_path: Path, version: str, words: str) -> None:
    put_in(tmp_path / "s", version)
    refused(catalog, tmp_path / "s", words)


def test_an_editable_install_is_refused(catalog: Catalog, site: Path, tmp_path: Path) -> None:
    info = site / "vllm-0.20.2.dist-info"
    (info / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    refused(catalog, site, "editable")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "vllm.egg-link").write_text("x")
    refused(catalog, tmp_path / "dev", "editable")


def test_no_vllm(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    put_in(tmp_path / "s" / "x", "0.20.2")
    refused(catalog, tmp_path / "s", "no vLLM is installed there")


def test_two_dist_infos_are_refused(catalog: Catalog, site: Path) -> None:
    put_in(site, "0.20.1")
    refused(catalog, site, "several versions", "vllm-0.20.1.dist-info", "vllm-0.20.2.dist-info")


def test_a_dist_info_of_another_name_is_refused(catalog: Catalog, site: Path) -> None:
    (site / "vllm-0.20.2.dist-info").rename(site / "vllm-0.20.1.dist-info")
    refused(catalog, site, "disagree")


def test_without_a_record_nothing_is_done(catalog: Catalog, site: Path) -> None:
    (site / "vllm-0.20.2.dist-info" / "RECORD").unlink()
    refused(catalog, site, "no RECORD")


def test_a_changed_file_is_refused_and_all_are_named(catalog: Catalog, site: Path) -> None:
    (site / KERNEL).write_bytes(b"mine\n")
    (site / WORKER).unlink()
    refused(catalog, site, f"{KERNEL}: changed by somebody", f"{WORKER}: not there")


def test_files_patched_by_hand_are_refused(catalog: Catalog, site: Path) -> None:
    (site / WORKER).write_bytes(patched("v0.20.2", sources("0.20.2"))[WORKER])
    refused(catalog, site, f"{WORKER}: patched already")


def test_a_file_that_another_package_owns_is_refused(catalog: Catalog, site: Path) -> None:
    other = site / "vllm_overlay-1.0.dist-info"
    other.mkdir()
    (other / "RECORD").write_text(f"{KERNEL},,\n")
    refused(catalog, site, "vllm_overlay-1.0", KERNEL)
    (other / "RECORD").write_text(f"{KERNEL}.bak,,\n")
    assert install(catalog, site).outcome is InstallOutcome.INSTALLED


def test_another_package_that_has_put_its_file_over_a_patched_one(catalog: Catalog, site: Path) -> None:
    """Told by `verify`, and never undone: the file is theirs."""
    pristine = snapshot(site)
    install(catalog, site)
    (site / KERNEL).unlink()
    (site / KERNEL).write_bytes(b"theirs\n")
    other = site / "vllm_overlay-1.0.dist-info"
    other.mkdir()
    (other / "RECORD").write_text(f"{KERNEL},,\n")
    before = snapshot(site)
    assert any(KERNEL in problem for problem in verify(catalog, site).problems)
    for action in (lambda: restore(site), lambda: install(catalog, site)):
        with pytest.raises(PatchesError, match="changed after the patches went in") as caught:
            action()
        assert f"{KERNEL}: also listed by vllm_overlay-1.0" in caught.value.found
        assert snapshot(site) == before
    subprocess.run(caught.value.next_command.partition("#")[0], shell=True, check=True)
    shutil.rmtree(other)
    restore(site)
    assert (site / f"{KERNEL}.mine").read_bytes() == b"theirs\n"
    (site / f"{KERNEL}.mine").unlink()
    assert snapshot(site) == pristine


def test_a_folder_that_leads_out_of_the_site_is_refused(catalog: Catalog, site: Path, tmp_path: Path) -> None:
    (site / "vllm" / "ops").rename(tmp_path / "elsewhere")
    (site / "vllm" / "ops").symlink_to(tmp_path / "elsewhere")
    elsewhere = snapshot(tmp_path / "elsewhere")
    refused(catalog, site, "leads out of it")
    assert snapshot(tmp_path / "elsewhere") == elsewhere


def test_a_patches_json_of_somebody_else_is_not_overwritten(catalog: Catalog, site: Path) -> None:
    (site / "vllm-0.20.2.dist-info" / "patches.json").write_text("{}")
    refused(catalog, site, "did not write")


def test_uninstall_never_loses_a_users_change(catalog: Catalog, site: Path) -> None:
    pristine = snapshot(site)
    install(catalog, site)
    (site / KERNEL).write_bytes(b"mine\n")
    before = snapshot(site)
    with pytest.raises(PatchesError) as caught:
        restore(site)
    assert KERNEL in caught.value.file and ENGINE not in caught.value.file
    assert snapshot(site) == before
    with pytest.raises(PatchesError, match="changed after the patches went in"):
        install(catalog, site)
    assert snapshot(site) == before
    command = caught.value.next_command.partition("#")[0]  # what the message says must work as it is
    subprocess.run(command, shell=True, check=True)
    restore(site)
    assert (site / f"{KERNEL}.mine").read_bytes() == b"mine\n"
    (site / f"{KERNEL}.mine").unlink()
    assert snapshot(site) == pristine


def test_a_damaged_original_is_noticed_before_anything_is_touched(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    kept = site / "vllm-0.20.2.dist-info" / "vllm-patches" / "original" / WORKER
    kept.write_bytes(b"damaged")
    before = snapshot(site)
    with pytest.raises(PatchesError, match="missing or damaged"):
        restore(site)
    assert snapshot(site) == before


def test_rows_that_others_added_to_record_stay(catalog: Catalog, site: Path) -> None:
    record = site / "vllm-0.20.2.dist-info" / "RECORD"
    pristine = record.read_bytes()
    install(catalog, site)
    record.write_bytes(record.read_bytes() + b"../../../bin/extra,,\n")
    restore(site)
    rows = record_rows(site)
    assert rows.pop("../../../bin/extra") == ("", "")
    record.write_bytes(record.read_bytes().replace(b"../../../bin/extra,,\n", b""))
    assert sorted(record.read_bytes().splitlines()) == sorted(pristine.splitlines())


def test_a_reinstall_over_the_patches(catalog: Catalog, site: Path) -> None:
    """`pip install --ignore-installed` of the same version puts pristine files and RECORD over ours."""
    pristine = snapshot(site, times=False)
    install(catalog, site)
    put_in(site, "0.20.2")
    assert install(catalog, site).outcome is InstallOutcome.INSTALLED
    put_in(site, "0.20.2")
    restore(site)
    assert snapshot(site, times=False) == pristine


def test_what_an_older_kill_left_beside_a_file_is_no_obstacle(catalog: Catalog, site: Path) -> None:
    """Killed, then uninstalled and installed again by pip, which does not know of such files."""
    clean = site.parent / "clean"
    put_in(clean, "0.20.2")
    install(catalog, clean)
    for name in (WORKER, "vllm-0.20.2.dist-info/RECORD"):
        path = site / name
        path.with_name(f".{path.name}.vllm-patches-new").write_bytes(b"left")
    assert install(catalog, site).outcome is InstallOutcome.INSTALLED
    assert snapshot(site, times=False).keys() == snapshot(clean, times=False).keys()


def test_what_pip_uninstalls_is_everything(catalog: Catalog, site: Path) -> None:
    install(catalog, site)
    for name in record_rows(site):
        (site / name).unlink()
    assert not [path for path in site.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: {**raw, "created": ["../outside"]},
        lambda raw: {**raw, "compiled": ["/etc/x"]},
        lambda raw: {**raw, "schema": 2},
        lambda raw: {key: value for key, value in raw.items() if key != "files"},
        lambda raw: [],
    ],
)
def test_a_journal_that_is_not_ours_is_not_followed(catalog: Catalog, site: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    (site.parent / "outside").write_text("x")
    install(catalog, site)
    path = site / "vllm-0.20.2.dist-info" / "vllm-patches" / "installed.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    before = snapshot(site)
    with pytest.raises(PatchesError, match="journal"):
        restore(site)
    assert snapshot(site) == before and (site.parent / "outside").exists()
