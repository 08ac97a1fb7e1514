"""pip's own configuration, as pip itself tells it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.sources.pipconf import PipSettings, parse_settings, read_settings


def test_nothing_set_is_the_default_index() -> None:
    assert parse_settings("") == PipSettings(indexes=("",), find_links=())


def test_every_setting() -> None:
    listing = """\
global.index-url='https://one/simple'
global.extra-index-url='https://two/simple\\nhttps://three/simple'
global.find-links='/wheels file:///more'
global.cert='/ca.pem'
global.client-cert='/client.pem'
global.proxy='http://proxy:1'
global.trusted-host='one two:8080'
global.timeout='3'
"""
    assert parse_settings(listing) == PipSettings(
        indexes=("https://one/simple", "https://two/simple", "https://three/simple"),
        find_links=("/wheels", "file:///more"),
        cert="/ca.pem",
        client_cert="/client.pem",
        proxy="http://proxy:1",
        trusted_hosts=("one", "two:8080"),
        timeout=3.0,
    )


def test_the_more_specific_section_wins() -> None:
    sections = [("global", "g"), ("install", "i"), ("download", "d"), (":env:", "e")]
    listing = ""
    for section, value in sections:
        listing += f"{section}.index-url='{value}'\n"
        assert parse_settings(listing).indexes == (value,)
    assert parse_settings("wheel.index-url='w'\n").indexes == ("",)


@pytest.mark.parametrize("value", ["1", "true", "Yes", "on"])
def test_no_index(value: str) -> None:
    settings = parse_settings(f"global.no-index='{value}'\nglobal.index-url='https://one'\nglobal.find-links='/w'\n")
    assert (settings.indexes, settings.find_links) == ((), ("/w",))


@pytest.mark.parametrize("value", ["0", "false", "no", "off"])
def test_no_index_switched_off(value: str) -> None:
    assert parse_settings(f"global.no-index='{value}'\n").indexes == ("",)


def test_the_default_timeout_has_another_name_in_the_environment() -> None:
    assert parse_settings(":env:.default-timeout='180'\n").timeout == 180.0


def test_folders_and_the_network_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-a-user")
    settings = PipSettings(("", "https://one/simple", "file:///local/with%20blank"), ("~/wheels", "http://page/list"))
    assert settings.local_folders == (Path("/local/with blank"), Path("/home/of-a-user/wheels"))
    assert settings.remote_indexes == ("", "https://one/simple")


def _config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "pip.conf").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)


def test_pip_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config(
        tmp_path,
        monkeypatch,
        "[global]\nindex-url = https://file/simple\nextra-index-url =\n  https://a\n  https://b\n",
    )
    assert read_settings().indexes == ("https://file/simple", "https://a", "https://b")
    monkeypatch.setenv("PIP_INDEX_URL", "https://env/simple")
    assert read_settings().indexes == ("https://env/simple", "https://a", "https://b")


def test_the_users_own_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_CONFIG_FILE")
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    path = Path(os.environ["HOME"]) / ".config" / "pip" / "pip.conf"
    path.parent.mkdir(parents=True)
    path.write_text("[download]\nindex-url = https://user/simple\n", encoding="utf-8")
    assert read_settings().indexes[0] == "https://user/simple"


@pytest.mark.parametrize(("key", "times"), [("quiet", 1), ("quiet", 3), ("verbose", 2)])
def test_a_quiet_or_talkative_pip_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, times: int
) -> None:
    _config(tmp_path, monkeypatch, f"[global]\nindex-url = https://file/simple\n{key} = {times}\n")
    assert read_settings().indexes == ("https://file/simple",)
    monkeypatch.setenv(f"PIP_{key.upper()}", str(times))
    assert read_settings().indexes == ("https://file/simple",)


def test_a_broken_configuration_is_pips_own_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config(tmp_path, monkeypatch, "index-url without a section\n")
    with pytest.raises(PatchesError) as caught:
        read_settings()
    assert caught.value.what == "cannot read pip's configuration"
    assert "pip.conf" in caught.value.found
    assert "SDIST=FILE" in caught.value.next_command


def test_a_timeout_that_is_no_number_is_named() -> None:
    with pytest.raises(PatchesError) as caught:
        parse_settings("global.timeout='soon'\n")
    assert "soon" in caught.value.found
