"""``patches/releases.toml`` and ``patches/fixes.toml``: read into the model, and written back in one form."""

from __future__ import annotations

import datetime
import json
import tomllib
from pathlib import Path
from typing import Any

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import FIX_IDS, Fix, FixState, Release, State, Wheel

HEADER = """\
# Every vLLM release from 0.16.0 on, oldest first, and the state of each of the five defects in it.
#
# date      upload date of the sdist; for 0.24.0, 0.25.0, 0.27.0 and 0.30.0 to 0.32.0 the date of its newest file
# series    the directory here whose patches are exact for the release; no such line, no series
# head      the commit that `apply` ends in; like [release.blobs] written by `make record`, never by hand
# state     live     the engine of the release reaches the defect
#           latent   the code is unsafe, nothing in the release triggers it
#           broken   dead for another reason, which the fix cannot mend
#           fixed    every part of the fix is in the code
#           absent   the code that the defect needs is not there
#           It is the worst state of the fix's parts (fixes.toml), in the order of the lines above.
# evidence  the line of the release's source that decides it
# note      the parts that differ; "by reading" marks what was concluded from the code and not run
# blobs     the pristine git blob ids of the files that the series touches
# revision  how many heads were recorded for the release: the N of a patched wheel's version, VERSION+patches.N
# wheels    every official wheel by sha256; where there are several for a machine, pip takes the highest build number
"""


def load_fixes(path: Path) -> dict[str, Fix]:
    """The five fixes by id, in order."""
    fixes = [_fix(row, path) for row in _load(path).get("fix", [])]
    return {fix.id: fix for fix in fixes}


def load_releases(path: Path) -> dict[str, Release]:
    """All releases by version, in the order of the file."""
    rows = _load(path).get("release", [])
    releases: dict[str, Release] = {}
    for row in rows:
        release = _release(row, path)
        if release.version in releases:
            raise _bad(path, f"one block for {release.version}", "two")
        releases[release.version] = release
    return releases


def dump_releases(releases: dict[str, Release]) -> str:
    """The canonical text of ``releases.toml``; `make check` wants the committed file to equal it."""
    return HEADER + "".join("\n" + _dump_release(release) for release in releases.values())


def _dump_release(release: Release) -> str:
    lines = [
        "[[release]]",
        f'version = "{release.version}"',
        f"date = {release.date.isoformat()}",
        f'sdist = "{release.sdist}"',
        f'sha256 = "{release.sha256}"',
        f"size = {release.size}",
    ]
    lines += [f'{key} = "{value}"' for key in ("series", "head") if (value := getattr(release, key))]
    lines += [f"revision = {release.revision}"] if release.revision else []
    lines += _dump_wheels(release.wheels)
    lines.append("[release.state]")
    for fix_id, state in release.states.items():
        note = f', note = "{_escape(state.note)}"' if state.note else ""
        lines.append(f'{fix_id} = {{ state = "{state.state.value}", evidence = "{_escape(state.evidence)}"{note} }}')
    if release.blobs:
        lines.append("[release.blobs]")
        lines += [f'"{path}" = "{blob}"' for path, blob in sorted(release.blobs.items())]
    return "\n".join(lines) + "\n"


def _dump_wheels(wheels: tuple[Wheel, ...]) -> list[str]:
    if not wheels:
        return []
    rows = [
        f'    {{ file = "{w.file}", size = {w.size}, sha256 = "{w.sha256}" }},'
        for w in sorted(wheels, key=lambda wheel: wheel.file)
    ]
    return ["wheels = [", *rows, "]"]


def _escape(text: str) -> str:
    """The inside of a TOML basic string; JSON's escapes are TOML's, but for DEL, which only TOML forbids."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PatchesError(
            "cannot read a table", file=str(path), found=str(error), next_command=f"git diff -- {path}"
        ) from error


def _fix(row: dict[str, Any], path: Path) -> Fix:
    try:
        return Fix(
            id=row["id"],
            slug=row["slug"],
            title=row["title"],
            defect=row["defect"],
            symptom=row["symptom"],
            upstream_pr=tuple(row["upstream_pr"]),
            introduced_by=row["introduced_by"],
            first_fixed=row["first_fixed"],
            severity=row["severity"],
            removal=row["removal"],
            parts=tuple(row["parts"]),
            upstream_commit=row.get("upstream_commit", ""),
        )
    except (KeyError, TypeError) as error:
        raise _bad(path, f"a complete block for fix {row.get('id', '?')}", f"{error!r}") from error


def _release(row: dict[str, Any], path: Path) -> Release:
    try:
        states = {key: _state(value) for key, value in row["state"].items()}
        if tuple(states) != FIX_IDS:
            raise _bad(path, f"release {row['version']} to state {', '.join(FIX_IDS)}", ", ".join(states))
        return Release(
            version=row["version"],
            date=_date(row["date"]),
            sdist=row["sdist"],
            sha256=row["sha256"],
            size=row["size"],
            states=states,
            series=row.get("series", ""),
            head=row.get("head", ""),
            blobs=dict(row.get("blobs", {})),
            revision=row.get("revision", 0),
            wheels=tuple(Wheel(w["file"], w["sha256"], w["size"]) for w in row.get("wheels", [])),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise _bad(path, f"a complete block for {row.get('version', '?')}", f"{error!r}") from error


def _state(row: dict[str, str]) -> FixState:
    return FixState(State(row["state"]), row["evidence"], row.get("note", ""))


def _date(value: object) -> datetime.date:
    if not isinstance(value, datetime.date):
        raise ValueError(f"date = {value!r}: a TOML date has no quotes")
    return value


def _bad(path: Path, expected: str, found: str) -> PatchesError:
    return PatchesError(
        "a table is wrong", file=path.name, expected=expected, found=found, next_command=f"git diff -- {path}"
    )
