"""Put every original back: undoes an install, whole or interrupted, and can itself be interrupted and run again.

It needs no room on the disk: originals are moved, not copied.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vllm_patches import swap
from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256
from vllm_patches.installed import journal as journals
from vllm_patches.installed.installation import Installation, owners
from vllm_patches.installed.journal import Entry, Journal
from vllm_patches.wheels.record import copied


def restore(found: Installation, journal: Journal) -> None:
    """The package as it was before the install; refuses, with nothing touched, where a user's change would be lost."""
    check_restorable(found, journal)
    for entry in journal.files:
        _restore_file(found, entry)
    _restore_compiled(found, journal)
    for path in journal.created:
        swap.remove(found.site / path)
    _restore_record(found, journal)
    journals.discard(found, journal)


def check_restorable(found: Installation, journal: Journal) -> None:
    """Every file must be the original, what we made of it, or gone; and originals that are needed must be sound."""
    changed = [entry.path for entry in journal.files if swap.sha256(found.site / entry.path) not in _known(entry)]
    if changed:
        theirs = owners(found, changed)
        notes = [f"{path}: also listed by {', '.join(names)}" for path, names in theirs.items()]
        raise PatchesError(
            "files were changed after the patches went in; nothing was touched",
            release=found.version,
            file=", ".join(changed),
            expected="the patched file or the original",
            found="\n".join(["another content in each", *notes]),
            next_command=_move_away(found, changed),
        )
    for entry in journal.files:
        kept = journals.original(found, entry.path)
        if swap.sha256(found.site / entry.path) != entry.before and not _sound(kept, entry):
            raise PatchesError(
                "the kept original of a file is missing or damaged; nothing was touched",
                release=found.version,
                file=str(kept),
                expected=f"sha256 {entry.before}",
                found=f"sha256 {swap.sha256(kept)}" if kept.exists() else "none",
                next_command=f"pip install --force-reinstall --no-deps vllm=={found.version}",
            )


def _known(entry: Entry) -> tuple[str, ...]:
    return entry.before, entry.after, ""


def _sound(kept: Path, entry: Entry) -> bool:
    # A package file that was a link (uv's link mode) is kept as that link, which leads nowhere from here.
    return kept.is_symlink() or swap.sha256(kept) == entry.before


def _restore_file(found: Installation, entry: Entry) -> None:
    live = found.site / entry.path
    if swap.sha256(live) != entry.before:
        swap.rename(journals.original(found, entry.path), live)


def _restore_compiled(found: Installation, journal: Journal) -> None:
    """The .pyc files that were there come back, those that the patched modules have since got go."""
    for path in compiled_files(found, [entry.path for entry in journal.files]):
        if path not in journal.compiled:
            swap.remove(found.site / path)
    for path in journal.compiled:
        kept = journals.original(found, path)
        if os.path.lexists(kept):  # else it is back already, from a run that was interrupted
            swap.make_folder((found.site / path).parent)
            swap.rename(kept, found.site / path)
    for entry in journal.files:
        folder = (found.site / entry.path).parent / "__pycache__"
        if not any((found.site / path).parent == folder for path in journal.compiled):
            with contextlib.suppress(OSError):  # not there, or other modules' files are in it
                folder.rmdir()


def compiled_files(found: Installation, paths: list[str]) -> list[str]:
    """The .pyc files of the modules *paths*, of every Python and optimisation level."""
    caches = [(found.site / path) for path in paths if path.endswith(".py")]
    files = [pyc for module in caches for pyc in (module.parent / "__pycache__").glob(f"{module.stem}.*.pyc")]
    return sorted(found.inside(pyc) for pyc in files)


def _restore_record(found: Installation, journal: Journal) -> None:
    """The original RECORD, byte for byte; if somebody has edited it since, only our rows are taken back."""
    kept = journals.original(found, found.inside(found.record))
    if not kept.exists():
        return  # nothing was changed yet, or it is back already
    live = found.record.read_bytes()
    if sha256(live) == journal.record:
        swap.rename(kept, found.record)
    elif live != kept.read_bytes():
        paths = [*(entry.path for entry in journal.files), *journal.compiled]
        drop = [*journals.ours(found, journal), *journal.created]
        swap.write_file(found.record, copied(live, kept.read_bytes(), paths, drop))


def _move_away(found: Installation, changed: list[str]) -> str:
    """Keeps the user's files; a file that is missing can be put back."""
    moves = " && ".join(f"mv {found.site / path} {found.site / path}.mine" for path in changed)
    return f"{moves}    # then again; or: pip install --force-reinstall --no-deps vllm=={found.version}"
