"""`install` and `uninstall`: the series on an installed vLLM, in place, and every byte of it back.

The order is what makes a kill harmless: journal; originals kept under a second name; all new contents written beside;
then only renames: the files, ``patches.json``, RECORD, and last the journal's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from vllm_patches import __version__, swap
from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256
from vllm_patches.installed import journal as journals
from vllm_patches.installed.installation import Installation, default_site, find_installation, owners, release_of
from vllm_patches.installed.journal import Entry, Journal, Phase
from vllm_patches.installed.restore import check_restorable, compiled_files, restore
from vllm_patches.outcome import FixRow, Say, fix_rows
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import Disposition, Release
from vllm_patches.series.patchset import PatchSet, check_names, plan, refuse_native
from vllm_patches.trees.apply import series_hash
from vllm_patches.wheels.modifications import Modifications, modifications_text, patches_json
from vllm_patches.wheels.record import Row, edited, row_of


class InstallOutcome(Enum):
    """How an `install` or `uninstall` ended; anything else is a `PatchesError`."""

    INSTALLED = "patched"
    ALREADY = "already patched"  # this very patch set is in; nothing was changed
    NOTHING = "nothing to do"  # the release needs none of the five, or no patch set is in
    RESTORED = "as before"  # every byte is the original's again


@dataclass(frozen=True)
class Installed:
    """The result of `install` and `uninstall`; *files* are those that were replaced."""

    site: str
    version: str
    outcome: InstallOutcome
    rows: tuple[FixRow, ...] = ()
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def install(catalog: Catalog, folder: Path | None, without: Iterable[str], say: Say) -> Installed:
    """Patch the vLLM installed in *folder* (default: the current environment); on any error it is as it was."""
    found = find_installation(folder or default_site())
    release = release_of(catalog, found)
    series = catalog.series_of(release)
    if not series.patches:
        return _without_series(catalog, found, release)
    chosen = tuple(dict.fromkeys(without))
    check_names(release, series, chosen, "install")
    refuse_native(release, series, chosen)
    with (
        swap.site_errors(found.site, "the package is as it was before"),
        swap.locked(found.dist_info, lambda: say(f"waiting for another run on {found.site}")),
    ):
        if _is_current(found, series_hash(series), chosen):
            return _result(catalog, found, release, InstallOutcome.ALREADY, chosen)
        notes = _back_to_pristine(found)
        ways_out = f"pip install --force-reinstall --no-deps vllm=={release.version}"
        ways_out = f"vllm-patches verify {found.site}    # which fixes are in; or reinstall: {ways_out}"
        patch_set = plan(catalog, release, lambda path: _read(found.site / path), chosen, ways_out)
        _refuse_foreign(found, patch_set)
        _install(catalog, found, patch_set)
    files = tuple(change.path for change in patch_set.changes)
    return replace(_result(catalog, found, release, InstallOutcome.INSTALLED, chosen), files=files, notes=notes)


def uninstall(folder: Path | None, say: Say) -> Installed:
    """Put the originals back; refuses, with nothing touched, where a user's own change would be lost."""
    found = find_installation(folder or default_site())
    with (
        swap.site_errors(found.site, "what is left to do is recorded: run vllm-patches uninstall again"),
        swap.locked(found.dist_info, lambda: say(f"waiting for another run on {found.site}")),
    ):
        known = journals.load(found)
        notes = _back_to_pristine(found)
    if known is None:
        return Installed(str(found.site), found.version, InstallOutcome.NOTHING, notes=("no patch set is in",))
    files = tuple(entry.path for entry in known[1].files)
    return Installed(str(found.site), found.version, InstallOutcome.RESTORED, files=files, notes=notes)


def _without_series(catalog: Catalog, found: Installation, release: Release) -> Installed:
    """Nothing to do, or an error that says what is missing: never a quiet success."""
    missing = [fix_id for fix_id in catalog.fixes if release.disposition(fix_id) is Disposition.NO_SERIES]
    if not missing:
        return _result(catalog, found, release, InstallOutcome.NOTHING, ())
    raise PatchesError(
        f"there is no series for this release yet; it needs {', '.join(missing)}",
        release=release.version,
        file=str(found.site),
        expected=f"a release with a series: {', '.join(pin.version for pin in catalog.pins)}",
        found=found.version,
        next_command=f"vllm-patches verify {found.site}    # which of the five it has",
    )


def _result(
    catalog: Catalog, found: Installation, release: Release, outcome: InstallOutcome, without: tuple[str, ...]
) -> Installed:
    rows = fix_rows(release, catalog.fixes)
    for name in without:
        rows = tuple(
            replace(row, result=f"{row.result}, less {name}") if name.startswith(row.fix) else row for row in rows
        )
    return Installed(str(found.site), found.version, outcome, rows)


def _is_current(found: Installation, wanted: str, without: tuple[str, ...]) -> bool:
    """Whether this very patch set is in, every file of it."""
    known = journals.load(found)
    if known is None or known[0] is not Phase.INSTALLED or not found.manifest.is_file():
        return False
    journal = known[1]
    same = journal.series_sha256 == wanted and set(journal.without) == set(without)
    return same and all(swap.sha256(found.site / entry.path) == entry.after for entry in journal.files)


def _back_to_pristine(found: Installation) -> tuple[str, ...]:
    """Take out whatever a run of ours put in, whole or in part; says what that was."""
    known = journals.load(found)
    if known is None:
        if found.state.is_dir():  # killed before its journal was there: nothing had been changed
            journals.discard_unstarted(found)
        return ()
    phase, journal = known
    check_restorable(found, journal)
    if phase is Phase.INSTALLED:
        journals.move(found, Phase.INSTALLED, Phase.UNINSTALLING)
    restore(found, journal)
    if phase is Phase.INSTALLED:
        return (f"the patch set of {journal.tool} was taken out",)
    return (f"an interrupted run ({phase.value.partition('.')[0]}) was rolled back",)


def _refuse_foreign(found: Installation, patch_set: PatchSet) -> None:
    """Nothing of another package's, nothing outside the site folder, no patches.json that is not ours."""
    paths = [change.path for change in patch_set.changes]
    for path, names in owners(found, paths).items():
        raise _foreign(found, path, "a file of vLLM alone", f"also listed in the RECORD of {', '.join(names)}")
    for path in (*paths, found.inside(found.record)):
        if not (found.site / path).parent.resolve().is_relative_to(found.site):
            raise _foreign(found, path, "a folder in the site folder", "a link that leads out of it")
    if found.record.is_symlink():
        raise _foreign(found, found.inside(found.record), "a file", "a link")
    for live in (found.manifest, found.modifications):
        if live.exists():
            raise _foreign(found, found.inside(live), "none before an install", "one that install did not write")


def _foreign(found: Installation, path: str, expected: str, seen: str) -> PatchesError:
    return PatchesError(
        "a file of the package is not vLLM's alone to change; nothing was changed",
        release=found.version,
        file=str(found.site / path),
        expected=expected,
        found=seen,
        next_command=f"grep -l {path} {found.site}/*.dist-info/RECORD",
    )


def _install(catalog: Catalog, found: Installation, patch_set: PatchSet) -> None:
    mods = Modifications(patch_set, found.version, catalog.fixes)
    texts = {found.manifest: patches_json(mods), found.modifications: modifications_text(mods)}
    created = {found.inside(path): text for path, text in texts.items()}
    journal, record = _prepare(found, patch_set, created)
    new = {change.path: change.after for change in patch_set.changes} | created | {found.inside(found.record): record}
    try:
        journals.start(found, journal)
        _keep_originals(found, journal)
        for path, data in new.items():
            live = found.site / path
            swap.stage(live, data, live.stat() if live.exists() else None)
        _swap(found, journal)
    except BaseException as error:
        _roll_back(found, journal, error)
        raise


def _prepare(found: Installation, patch_set: PatchSet, created: dict[str, bytes]) -> tuple[Journal, bytes]:
    """The journal, and the RECORD as it will be: with every file that is then there."""
    entries = tuple(Entry(c.path, sha256(c.before), sha256(c.after)) for c in patch_set.changes)
    compiled = tuple(compiled_files(found, [change.path for change in patch_set.changes]))
    before = found.record.read_bytes()
    series = series_hash(patch_set.series)
    release, tool = patch_set.release.version, f"vllm-patches {__version__}"
    draft = Journal(release, tool, series, patch_set.without, entries, compiled, tuple(created), "")
    # The hash of RECORD stands in the journal, and the hash of the journal in RECORD: so RECORD gives none for it.
    put = {change.path: change.after for change in patch_set.changes} | created
    kept = {change.path: change.before for change in patch_set.changes} | {found.inside(found.record): before}
    kept |= {path: (found.site / path).read_bytes() for path in compiled}
    put |= {found.inside(journals.original(found, path)): data for path, data in kept.items()}
    rows = [*(row_of(path, data) for path, data in put.items()), Row(next(journals.ours(found, draft)))]
    record = edited(before, rows, compiled)
    return replace(draft, record=sha256(record)), record


def _keep_originals(found: Installation, journal: Journal) -> None:
    for path in (*(entry.path for entry in journal.files), *journal.compiled, found.inside(found.record)):
        swap.keep(found.site / path, journals.original(found, path))


def _swap(found: Installation, journal: Journal) -> None:
    """From the first rename to the last; each file is looked at once more before it goes."""
    for entry in journal.files:
        live = found.site / entry.path
        _expect(found, live, entry.before)
        swap.rename(swap.beside(live), live)
        _expect(found, live, entry.after)
    for path in compiled_files(found, [entry.path for entry in journal.files]):
        swap.remove(found.site / path)
    for live in (found.modifications, found.manifest, found.record):
        swap.rename(swap.beside(live), live)
    journals.move(found, Phase.INSTALLING, Phase.INSTALLED)


def _expect(found: Installation, live: Path, wanted: str) -> None:
    if (seen := swap.sha256(live)) != wanted:
        raise PatchesError(
            "a file changed while it was being patched",
            release=found.version,
            file=str(live),
            expected=f"sha256 {wanted}",
            found=f"sha256 {seen}",
            next_command=f"vllm-patches verify {found.site}",
        )


def _roll_back(found: Installation, journal: Journal, cause: BaseException) -> None:
    """Leave the package as it was; if even that is refused, the journal stays and says what is left to do."""
    try:
        if journals.load(found) is not None:
            restore(found, journal)
        elif found.state.is_dir():
            journals.discard_unstarted(found)
    except (OSError, PatchesError) as error:
        raise PatchesError(
            "the install failed, and so did taking it back; the originals are safe",
            release=found.version,
            file=str(journals.original(found, "")),
            found=f"{cause}\nthen: {error}",
            next_command=f"vllm-patches uninstall --site {found.site}",
        ) from cause


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
