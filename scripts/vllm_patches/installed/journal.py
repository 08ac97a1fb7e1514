"""What an install in place is about to do, or did: written before the first file changes, closed after the last.

Its content never changes. The phase is its *name*, so that closing it, and opening it again to undo, is one rename:
atomic, and possible on a full disk. RECORD can list it with its hash for the same reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from vllm_patches import swap
from vllm_patches.errors import PatchesError
from vllm_patches.installed.installation import STATE, Installation

SCHEMA = 1
ORIGINAL = "original"


class Phase(Enum):
    """The name of the journal; with none of them, no file of the package was changed."""

    INSTALLING = "installing.json"
    INSTALLED = "installed.json"
    UNINSTALLING = "uninstalling.json"


@dataclass(frozen=True)
class Entry:
    """One file that is replaced; hashes are sha256."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class Journal:
    """All paths are relative to the site folder."""

    release: str
    tool: str
    series_sha256: str
    without: tuple[str, ...]
    files: tuple[Entry, ...]
    compiled: tuple[str, ...]  # .pyc files of the pristine modules, kept with the originals
    created: tuple[str, ...]
    record: str

    def to_bytes(self) -> bytes:
        """The journal's one form on disk."""
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n").encode()


def load(found: Installation) -> tuple[Phase, Journal] | None:
    """The journal of the installation, if there is one."""
    for phase in Phase:
        try:
            raw = json.loads((found.state / phase.value).read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise _unreadable(found, phase, str(error)) from error
        return phase, _parse(found, phase, raw)
    return None


def start(found: Installation, journal: Journal) -> None:
    """Make our folder with the journal in it; from here on a kill is recognised."""
    swap.make_folder(found.state)
    swap.write_file(found.state / Phase.INSTALLING.value, journal.to_bytes())


def move(found: Installation, before: Phase, after: Phase) -> None:
    """Go from one phase to the next, durably."""
    swap.rename(found.state / before.value, found.state / after.value)


def original(found: Installation, path: str) -> Path:
    """Where the original of the site-relative *path* is kept."""
    return found.state / ORIGINAL / path


def ours(found: Installation, journal: Journal) -> Iterator[str]:
    """The files in our own folder once the install is done, as RECORD spells them."""
    state = f"{found.dist_info.name}/{STATE}"
    yield f"{state}/{Phase.INSTALLED.value}"
    for path in (*(entry.path for entry in journal.files), *journal.compiled, f"{found.dist_info.name}/RECORD"):
        yield f"{state}/{ORIGINAL}/{path}"


def staged(found: Installation, journal: Journal) -> Iterator[Path]:
    """Where new contents wait beside the files that they will replace."""
    for path in (*(entry.path for entry in journal.files), *journal.created, found.inside(found.record)):
        yield swap.beside(found.site / path)


def discard(found: Installation, journal: Journal) -> None:
    """Remove our folder: the journal last, so that until then a kill is still recognised."""
    for path in staged(found, journal):
        swap.remove(path)
    swap.remove_tree(found.state / ORIGINAL)
    swap.sync_folder(found.state)
    discard_unstarted(found)


def discard_unstarted(found: Installation) -> None:
    """Remove our folder where it holds no originals; files that are not ours stay, and the folder with them."""
    for name in (*(phase.value for phase in Phase), swap.beside(Path(Phase.INSTALLING.value)).name):
        (found.state / name).unlink(missing_ok=True)
    if not any(found.state.iterdir()):
        found.state.rmdir()
    swap.sync_folder(found.dist_info)


def _parse(found: Installation, phase: Phase, raw: object) -> Journal:
    try:
        if not isinstance(raw, dict) or raw.pop("schema") != SCHEMA:
            raise ValueError("another form: it is of another version of this tool, or not ours")
        files = tuple(Entry(**entry) for entry in raw.pop("files"))
        for key in ("without", "compiled", "created"):
            raw[key] = tuple(raw[key])
        journal = Journal(files=files, **raw)
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(found, phase, repr(error)) from error
    _check_inside(found, phase, journal)
    return journal


def _check_inside(found: Installation, phase: Phase, journal: Journal) -> None:
    """A journal only ever names files below the site folder."""
    for path in (*(entry.path for entry in journal.files), *journal.compiled, *journal.created):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise _unreadable(found, phase, f"a path that leaves the site folder: {path}")


def _unreadable(found: Installation, phase: Phase, why: str) -> PatchesError:
    return PatchesError(
        "the journal of the patch set cannot be read; nothing was changed",
        release=found.version,
        file=str(found.state / phase.value),
        found=why,
        next_command=f"pip install --force-reinstall --no-deps vllm=={found.version}    # the originals are in "
        f"{found.state / ORIGINAL}",
    )
