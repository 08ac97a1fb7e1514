"""The user's own pip configuration: which index, which certificates, which proxy. pip is asked, not re-implemented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vllm_patches.errors import PatchesError

_SETTING = re.compile(r"""(?P<name>\S+)=(?P<value>'.*'|".*")""")
# Most specific first, as pip itself resolves them; `pip config list` has merged the files already.
_SECTIONS = (":env:", "download", "install", "global")


@dataclass(frozen=True)
class PipSettings:
    """What pip would use. An empty *indexes* entry stands for the library's own default index."""

    indexes: tuple[str, ...]
    find_links: tuple[str, ...]
    cert: str = ""
    client_cert: str = ""
    proxy: str = ""
    trusted_hosts: tuple[str, ...] = ()
    timeout: float = 15.0

    @property
    def local_folders(self) -> tuple[Path, ...]:
        """Folders of this machine among the indexes and find-links."""
        return tuple(path for place in (*self.indexes, *self.find_links) if (path := _as_folder(place)))

    @property
    def remote_indexes(self) -> tuple[str, ...]:
        """The indexes that are asked over the network."""
        return tuple(index for index in self.indexes if _as_folder(index) is None)


def read_settings() -> PipSettings:
    """Ask ``pip config list`` of this interpreter; raises `PatchesError` where pip is missing."""
    # Three times verbose makes up for a user's `quiet`, under which pip would list nothing at all.
    command = [sys.executable, "-m", "pip", "-vvv", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PatchesError(
            "cannot read pip's configuration",
            found=done.stderr.strip(),
            next_command=f"{sys.executable} -m ensurepip    # or give the sdist: make apply SDIST=FILE",
        )
    return parse_settings(done.stdout)


def parse_settings(listing: str) -> PipSettings:
    """The settings in the output of ``pip config list`` (``section.key='value'`` lines; others are pip's chatter)."""
    matches = filter(None, map(_SETTING.fullmatch, listing.splitlines()))
    values = {match["name"]: str(ast.literal_eval(match["value"])) for match in matches}

    def get(key: str) -> str:
        return next((values[f"{s}.{key}"] for s in _SECTIONS if f"{s}.{key}" in values), "")

    no_index = get("no-index").lower() in ("1", "true", "yes", "on")
    indexes = () if no_index else (get("index-url").strip(), *get("extra-index-url").split())
    return PipSettings(
        indexes=indexes,
        find_links=tuple(get("find-links").split()),
        cert=get("cert"),
        client_cert=get("client-cert"),
        proxy=get("proxy"),
        trusted_hosts=tuple(get("trusted-host").split()),
        timeout=_seconds(get("timeout") or get("default-timeout") or "15"),
    )


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise PatchesError(
            "pip's timeout is not a number", expected="seconds", found=text, next_command="pip config debug"
        ) from error


def _as_folder(place: str) -> Path | None:
    """The folder that a path or ``file:`` URL names; None for anything that needs a network."""
    if place.startswith("file:"):
        return Path(unquote(urlsplit(place).path))
    return Path(place).expanduser() if place and "://" not in place else None
