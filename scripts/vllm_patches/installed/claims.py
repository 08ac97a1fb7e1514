"""What ``patches.json`` claims, held against the files that are there; and what an interrupted install left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vllm_patches.hashing import sha256
from vllm_patches.installed import journal as journals
from vllm_patches.installed.artifact import Artifact
from vllm_patches.installed.installation import base_version
from vllm_patches.installed.journal import Phase
from vllm_patches.installed.restore import compiled_files
from vllm_patches.wheels.modifications import PATCHES_JSON, SCHEMA
from vllm_patches.wheels.record import Row, listed_rows, row_of

Claims = dict[str, Any]
_UNCHECKED = 0b01  # a .pyc whose flags are this is loaded without a look at its source (PEP 552)


def read_claims(artifact: Artifact) -> tuple[Claims | None, list[str]]:
    """``patches.json``, where there is one, and what is wrong with its form."""
    raw = artifact.manifest
    if raw is None:
        return None, []
    try:
        claims = json.loads(raw)
        if claims["schema"] != SCHEMA:
            return None, [f"{PATCHES_JSON} is of schema {claims['schema']}, this tool knows {SCHEMA}"]
        native_blobs(claims)
        sound = all(entry[when]["sha256"] for entry in claims["files"].values() for when in ("before", "after"))
        return (claims, []) if sound and claims["release"] and claims["fixes"] else (None, [f"{PATCHES_JSON} is empty"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, [f"{PATCHES_JSON} cannot be read: {error!r}"]


def claim_problems(artifact: Artifact, claims: Claims) -> Iterator[str]:
    """Every way in which the files do not bear out the claims."""
    if claims["release"] != base_version(artifact.version):
        yield f"{PATCHES_JSON} is for vLLM {claims['release']}, but the package is {artifact.version}"
    elif claims.get("version", artifact.version) != artifact.version:
        yield f"{PATCHES_JSON} says version {claims['version']}, METADATA {artifact.version}"
    for path, entry in claims["files"].items():
        if problem := _file_problem(artifact, path, entry):
            yield problem
    yield from _addition_problems(artifact, claims)
    yield from _record_problems(artifact, list(claims["files"]))


def changed_files(artifact: Artifact, claims: Claims | None) -> set[str]:
    """The files of which patches.json promises another content."""
    files = claims["files"] if claims else {}
    return {path for path, entry in files.items() if _sha256(artifact.read(path)) != entry["after"]["sha256"]}


def state_problems(artifact: Artifact) -> Iterator[str]:
    """An install that did not end, remains of another one, and compiled files that hide a patched source."""
    for name in artifact.remains:
        yield f"{name} is left of a vLLM that is gone; a patch set was in it"
    found = artifact.installation
    if found is None:
        return
    known = journals.load(found)
    if known is not None and known[0] is not Phase.INSTALLED:
        verb = known[0].value.partition(".")[0]
        yield f"a run was interrupted while {verb}: run vllm-patches install or uninstall to finish"
    if known is not None and known[0] is Phase.INSTALLED and artifact.manifest is None:
        yield f"the journal says that patches are in, but {PATCHES_JSON} is gone"
    if known is None and found.state.is_dir():
        yield "a run was interrupted before it changed anything: run vllm-patches install or uninstall to clean up"


def hidden_problems(artifact: Artifact, paths: list[str]) -> Iterator[str]:
    """Compiled files of the modules *paths* that Python would run whatever the source says."""
    if artifact.installation is None:
        return
    for path in compiled_files(artifact.installation, paths):
        header = (artifact.read(path) or b"")[4:8]
        if int.from_bytes(header, "little") == _UNCHECKED:
            yield f"{path} is loaded without a look at its source: remove it"


def _file_problem(artifact: Artifact, path: str, entry: dict[str, Any]) -> str:
    found = _sha256(artifact.read(path))
    if found == entry["after"]["sha256"]:
        return ""
    if not found:
        return f"{PATCHES_JSON} claims that {path} is patched, but it is not there"
    what = "is pristine" if found == entry["before"]["sha256"] else "was changed since"
    return f"{PATCHES_JSON} claims that {path} is patched, but the file {what}"


def _addition_problems(artifact: Artifact, claims: Claims) -> Iterator[str]:
    """What a build added to the package: the rebuilt extension, the hook that loads it, the version files."""
    for path, wanted in _additions(claims).items():
        found = _sha256(artifact.read(path))
        if not found:
            yield f"{PATCHES_JSON} claims that {path} was added, but it is not there"
        elif wanted and found != wanted:
            yield f"{PATCHES_JSON} claims that {path} was added, but the file was changed since"


def native_blobs(claims: Claims | None) -> dict[str, str]:
    """The sources that compiled code of the package was made from, and their blobs; none without such code.

    A package that was built without any compiled code has no stale one either.
    """
    if not claims or not isinstance(claims.get("native"), dict):
        return {}
    if claims.get("target_device") != "empty" and not any(path.endswith(".so") for path in _additions(claims)):
        return {}
    return {path: entry["after"]["blob"] for path, entry in claims["native"].get("source", {}).items()}


def _additions(claims: Claims) -> dict[str, str]:
    """Every file that is not of the series, and its sha256 as far as patches.json gives it."""
    native = claims.get("native")
    files = native.get("files") if isinstance(native, dict) else None
    listed = (
        {path: entry for path, entry in files.items() if isinstance(entry, dict)} if isinstance(files, dict) else {}
    )
    listed |= {entry["path"]: entry for entry in claims.get("not_of_the_series", ()) if "path" in entry}
    return {path: str(entry.get("sha256", "")) for path, entry in listed.items()}


def _record_problems(artifact: Artifact, paths: list[str]) -> Iterator[str]:
    listed = listed_rows(artifact.read(f"{artifact.dist_info}/RECORD") or b"")
    for path in paths:
        data = artifact.read(path)
        row, wanted = listed.get(path, Row(path)), row_of(path, data or b"")
        if data is not None and (row.algorithm, row.digest) != (wanted.algorithm, wanted.digest):
            yield f"RECORD does not have the hash of {path}"


def _sha256(data: bytes | None) -> str:
    return "" if data is None else sha256(data)
