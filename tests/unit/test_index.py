"""Finding and fetching an sdist, from real indexes on the loopback and in folders, through pip's configuration."""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.render import DownloadBar
from vllm_patches.sources import cache
from vllm_patches.sources.index import fetch_sdist, list_offers, without_credentials
from webindex import Answer, WebIndex
from world import World, scratch_left

NAME = "vllm-0.20.2.tar.gz"
SECRET = "s3cret"


@pytest.fixture
def index(world: World) -> Iterator[WebIndex]:
    """An index that offers the sdist; the cache has none."""
    shutil.rmtree(world.cache)
    with WebIndex() as index:
        index.add(NAME, world.sdist().read_bytes())
        yield index


class Config:
    """pip's configuration file of this test."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
        monkeypatch.setenv("NO_PROXY", "*")

    def write(self, **values: str) -> None:
        lines = [f"{key.replace('_', '-')} = {value}" for key, value in values.items()]
        self.path.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    return Config(tmp_path / "pip.conf", monkeypatch)


def _closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fetch(world: World) -> Path:
    return fetch_sdist(world.release())


def _error(world: World) -> PatchesError:
    """The error of a fetch that must fail, and leave nothing half-made."""
    with pytest.raises(PatchesError) as caught:
        _fetch(world)
    assert scratch_left(world.cache) == []
    assert not cache.sdist_path(world.release().sha256, NAME).exists()
    assert caught.value.next_command
    return caught.value


def test_an_sdist_is_fetched_once(world: World, index: WebIndex, config: Config) -> None:
    config.write(index_url=index.url)
    path = _fetch(world)
    assert path == cache.sdist_path(world.release().sha256, NAME)
    assert path.read_bytes() == world.sdist().read_bytes()
    assert index.asked == ["/simple/vllm/", f"/files/{NAME}"]
    assert _fetch(world) == path
    assert len(index.asked) == 2
    assert scratch_left(world.cache) == []


@pytest.mark.parametrize("damage", [b"", b"half of it", None])
def test_a_damaged_one_in_the_cache_is_fetched_again(
    world: World, index: WebIndex, config: Config, damage: bytes | None
) -> None:
    config.write(index_url=index.url)
    path = _fetch(world)
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert _fetch(world).read_bytes() == world.sdist().read_bytes()


def test_the_environment_names_the_index(
    world: World, index: WebIndex, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write(index_url=f"http://127.0.0.1:{_closed_port()}/simple")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    assert _fetch(world).is_file()


def test_the_second_index_has_it(world: World, index: WebIndex, config: Config) -> None:
    with WebIndex() as first:
        first.add("vllm-0.1.0.tar.gz", b"another")
        config.write(index_url=first.url, extra_index_url=index.url)
        assert _fetch(world).is_file()
        assert first.asked == ["/simple/vllm/"]


def test_an_index_that_does_not_know_the_project_offers_nothing(world: World, index: WebIndex, config: Config) -> None:
    with WebIndex() as first:
        config.write(index_url=first.url, extra_index_url=index.url)
        assert _fetch(world).is_file()


def test_a_folder_of_files(world: World, config: Config) -> None:
    shutil.rmtree(world.cache)
    config.write(no_index="true", find_links=str(world.sdist().parent))
    assert _fetch(world).read_bytes() == world.sdist().read_bytes()


@pytest.mark.parametrize("key", ["index_url", "extra_index_url"])
def test_an_index_that_is_a_folder(world: World, config: Config, index: WebIndex, key: str) -> None:
    simple = world.root / "my simple" / "vllm"
    simple.mkdir(parents=True)
    shutil.copyfile(world.sdist(), simple / NAME)
    url = simple.parent.as_uri()
    assert "%20" in url
    config.write(**{"index_url": index.url, key: url})
    assert _fetch(world).is_file()
    assert index.asked == [], "a folder is asked before the network"


def test_nothing_offers_it(world: World, index: WebIndex, config: Config) -> None:
    index.answers.clear()
    config.write(index_url=index.url, find_links="/nowhere")
    error = _error(world)
    assert error.what == "no configured package index offers the sdist"
    assert (error.release, error.expected) == ("0.20.2", NAME)
    assert error.found == "nothing of that name at: 127.0.0.1, /nowhere"
    assert "SDIST=FILE" in error.next_command


def test_a_project_page_without_that_file(world: World, index: WebIndex, config: Config) -> None:
    index.answers.clear()
    index.add("vllm-0.20.1.tar.gz", b"x")
    config.write(index_url=index.url)
    assert _error(world).what == "no configured package index offers the sdist"


def test_no_index_asks_nobody(world: World, index: WebIndex, config: Config) -> None:
    config.write(index_url=index.url, no_index="1")
    assert _error(world).found.endswith("nowhere (pip's no-index is set)")
    assert index.asked == []


def test_another_file_of_that_name_is_kept_aside(world: World, index: WebIndex, config: Config) -> None:
    data = world.sdist("0.20.1").read_bytes() + bytes(1000)
    index.add(NAME, data)
    config.write(index_url=index.url)
    error = _error(world)
    assert error.what == "the sdist is not the recorded file: its sha256 is wrong"
    assert error.expected.startswith(world.release().sha256)
    assert error.found == f"{hashlib.sha256(data).hexdigest()} ({len(data)} bytes)"
    assert Path(error.file).name == f"{NAME}.rejected-{hashlib.sha256(data).hexdigest()[:12]}"
    assert Path(error.file).read_bytes() == data
    index.add(NAME, world.sdist().read_bytes())
    assert _fetch(world).is_file(), "the next run fetches it again"


def test_a_wrong_file_in_a_folder_is_named_too(world: World, config: Config) -> None:
    shutil.rmtree(world.cache)
    world.sdist().write_bytes(b"short")
    config.write(no_index="true", find_links=str(world.sdist().parent))
    assert _error(world).what == "the sdist is truncated: its sha256 is wrong"


def test_a_body_that_ends_early(world: World, index: WebIndex, config: Config) -> None:
    index.add(NAME, world.sdist().read_bytes(), cut=100)
    config.write(index_url=index.url)
    error = _error(world)
    assert error.what == "the package index cannot be reached"
    assert error.file == "127.0.0.1"
    assert "100 more expected" in error.found


def test_a_body_that_ends_early_without_a_promised_length(world: World, index: WebIndex, config: Config) -> None:
    index.add(NAME, world.sdist().read_bytes(), cut=100, length=False)
    config.write(index_url=index.url)
    assert _error(world).what == "the sdist is truncated: its sha256 is wrong"


def test_connection_refused(world: World, config: Config) -> None:
    shutil.rmtree(world.cache)
    config.write(index_url=f"http://127.0.0.1:{_closed_port()}/simple")
    error = _error(world)
    assert error.what == "the package index cannot be reached"
    assert "Connection refused" in error.found
    assert "SDIST=FILE" in error.next_command


@pytest.mark.parametrize("path", ["/simple/vllm/", f"/files/{NAME}"])
def test_an_index_that_fails(world: World, index: WebIndex, config: Config, path: str) -> None:
    index.answers[path] = Answer(b"broken", status=500)
    config.write(index_url=index.url)
    error = _error(world)
    assert error.what == "the package index cannot be reached"
    assert "500" in error.found


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_a_page_that_is_no_index(world: World, index: WebIndex, config: Config, kind: str) -> None:
    """A login page, a captive portal, a wrong path."""
    index.answers["/simple/vllm/"] = Answer(b"welcome", kind)
    config.write(index_url=index.url)
    error = _error(world)
    assert error.what == "the package index does not answer as one"
    assert (error.file, kind in error.found) == ("127.0.0.1", True)


def test_an_index_of_another_version_of_the_protocol(world: World, index: WebIndex, config: Config) -> None:
    page = b'<!DOCTYPE html><html><head><meta name="pypi:repository-version" content="9.0"></head></html>'
    index.answers["/simple/vllm/"] = Answer(page)
    config.write(index_url=index.url)
    assert _error(world).what == "the package index does not answer as one"


def test_an_index_that_does_not_answer_in_time(world: World, config: Config) -> None:
    shutil.rmtree(world.cache)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config.write(index_url=f"http://127.0.0.1:{silent.getsockname()[1]}/simple", timeout="0.3")
        error = _error(world)
    assert "timed out" in error.found


def test_a_login_is_used(world: World, index: WebIndex, config: Config) -> None:
    index.login = f"user:{SECRET}"
    config.write(index_url=index.url)
    assert _fetch(world).is_file()


def _config_with_login(case: str, index: WebIndex, config: Config) -> None:
    """Every way to fail with a password in the index's address."""
    index.login = f"user:{SECRET}"
    url = index.url
    if case == "wrong password":
        index.login = "user:other"
    elif case == "refused":
        url = url.replace(str(index.port), str(_closed_port()))
    elif case == "no project":
        index.answers.clear()
    elif case == "page fails":
        index.answers["/simple/vllm/"] = Answer(b"", status=503)
    elif case == "file fails":
        index.answers[f"/files/{NAME}"] = Answer(b"", status=403)
    elif case == "no index":
        index.answers["/simple/vllm/"] = Answer(b"welcome", "text/plain")
    elif case == "wrong file":
        index.add(NAME, b"other")
    elif case == "cut short":
        index.add(NAME, b"other", cut=2)
    proxy = f"http://user:{SECRET}@127.0.0.1:{_closed_port()}"
    config.write(index_url=url, extra_index_url=f"{url}more/", **({"proxy": proxy} if case == "proxy" else {}))


FAILURES = [
    "wrong password",
    "refused",
    "no project",
    "page fails",
    "file fails",
    "no index",
    "wrong file",
    "cut short",
]


@pytest.mark.parametrize("case", FAILURES)
def test_no_error_shows_a_password(world: World, index: WebIndex, config: Config, case: str) -> None:
    _config_with_login(case, index, config)
    error = _error(world)
    assert SECRET not in str(error)
    assert SECRET not in repr(error.as_dict())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("for url: http://user:pass@host/simple/", "for url: http://host/simple/"),
        ("https://token@host and https://u:p%40ss@other/x", "https://host and https://other/x"),
        ("https://user:p@ss@host/", "https://host/"),
        ("mail me@host at https://host/a@b", "mail me@host at https://host/a@b"),
    ],
)
def test_urls_lose_their_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


@pytest.mark.parametrize("case", ["none", "wrong password", "page fails"])
def test_no_command_line_shows_a_password(world: World, index: WebIndex, config: Config, case: str) -> None:
    _config_with_login(case, index, config)
    ran = world.apply("--json", env={"PIP_CONFIG_FILE": str(config.path), "PIP_NO_INDEX": "0"})
    assert ran.status == (0 if case == "none" else 1)
    assert SECRET not in ran.out + ran.err
    assert case != "none" or ran.says(f"{NAME}: 100 %", "making")


def test_the_bar_is_told_of_every_byte(world: World, index: WebIndex, config: Config) -> None:
    config.write(index_url=index.url)
    shown = io.StringIO()
    fetch_sdist(world.release(), lambda total: DownloadBar(NAME, total, shown))
    assert shown.getvalue().splitlines()[-1].startswith(f"{NAME}: 100 %")


def test_every_sdist_that_the_indexes_offer(world: World, index: WebIndex, config: Config) -> None:
    page = (
        '<a href="/files/vllm-0.20.2.tar.gz">vllm-0.20.2.tar.gz</a>'
        '<a href="/files/vllm-0.20.2-cp38-abi3-linux_x86_64.whl">vllm-0.20.2-cp38-abi3-linux_x86_64.whl</a>'
        '<a href="/files/vllm-0.9.0.tar.gz" data-yanked="bad">vllm-0.9.0.tar.gz</a>'
    )
    index.answers["/simple/vllm/"] = Answer(f"<!DOCTYPE html><html><body>{page}</body></html>".encode())
    with WebIndex() as other:
        other.add("vllm-0.21.0.tar.gz", b"x")
        other.add("vllm-0.20.2.tar.gz", b"y")
        config.write(index_url=index.url, extra_index_url=other.url)
        found = list_offers()
    assert sorted(found) == ["0.20.2", "0.21.0"]
    assert found["0.20.2"].sha256 == "", "the first index wins: it gives no hash, the second would"


def test_pre_releases_and_post_releases_are_not_offered(world: World, index: WebIndex, config: Config) -> None:
    for version in ("0.30.0rc1", "0.30.0.post1", "0.30.0.dev3"):
        index.add(f"vllm-{version}.tar.gz", b"x")
    config.write(index_url=index.url)
    assert list(list_offers()) == ["0.20.2"]
