"""Choose patches, stack them with a third party's, and make each apply at its stated lines: fuzz 0, offset 0.

Leaving out a patch of ours, or putting somebody else's below, moves lines; the line numbers and blob ids of what
stands above are then written anew, so that the strictest tool has nothing to object to. A hunk whose lines are another
patch's, or are mixed with its lines, cannot be moved: then the choice is refused, and both sides are named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from vllm_patches.dist.bundle import Bundle, Item
from vllm_patches.dist.lines import Tree
from vllm_patches.dist.place import Misfit, Placed, carry, locate
from vllm_patches.dist.stacking import Position, ThirdPatch, ThirdSeries
from vllm_patches.dist.unified import NO_BLOB, Kind, Section, bad_patch, parse_unified, rewrite, wrong_strip
from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import apply_hunks, apply_patch, blob_id
from vllm_patches.series.model import Disposition, FilePatch, Patch, Release, Series
from vllm_patches.series.patchfile import parse_patch

Read = Callable[[Iterable[str]], Mapping[str, bytes]]  # paths to those that the release has
THIRD_ABOVE, OURS_ABOVE = 1001, 1000  # added to the numbers of what comes second


@dataclass(frozen=True)
class Wish:
    """What was asked for: fix ids (empty: all), and another series with its position."""

    fixes: tuple[str, ...] = ()
    third: ThirdSeries | None = None
    position: Position = Position.ABOVE


def compose(release: Release, series: Series, wish: Wish, read: Read, tops: Collection[str] = ()) -> Bundle:
    """The bundle for *release*; raises `PatchesError` where the wish cannot be met without fuzz.

    *tops* are the release's top folders: a new file whose path starts with one of them was made for ``-p0``.
    """
    chosen = _choose(release, series, wish.fixes)
    third = wish.third.patches if wish.third else ()
    _no_common_names(chosen, third)
    wanted = {s.path for p in series.patches for s in parse_unified(p.name, p.raw)}
    wanted |= {path for patch in third for path in _candidates(patch)}
    before = read(sorted(wanted))
    _check_strip(third, before, tops)
    items, tree = _stack(release, series, chosen, third, wish.position, Tree.of(before))
    paths = tuple(dict.fromkeys(path for item in items for path in item.paths))
    bundle = Bundle(
        release=release,
        series=series.name,
        items=tuple(items),
        before={path: before.get(path) for path in paths},
        after={path: tree.data(path) for path in paths},
        modes=_modes(items),
        left_out=tuple(patch.number for patch in series.patches if patch not in chosen),
        third_party=wish.third.name if wish.third else "",
    )
    prove(bundle)
    return bundle


def _choose(release: Release, series: Series, fixes: tuple[str, ...]) -> tuple[Patch, ...]:
    """The patches of *fixes* in the order of the series; what they say they require has to be among them."""
    carried = {patch.number: patch for patch in series.patches}
    unknown = [fix for fix in fixes if fix not in carried and not _needs_none(release, fix)]
    if unknown or (fixes and not set(fixes) & set(carried)):
        raise PatchesError(
            "the series has no patch for a fix that was asked for",
            release=release.version,
            expected=f"some of {', '.join(carried)}",
            found=", ".join(unknown or fixes),
            next_command=f"vllm-patches dist --pin {release.version} --fixes '{' '.join(carried)}'",
        )
    chosen = tuple(patch for patch in series.patches if not fixes or patch.number in fixes)
    for patch in chosen:
        required = [word for word in patch.trailer("Requires").split(", ") if word in carried]
        if missing := [word for word in required if word not in {p.number for p in chosen}]:
            raise _not_closed(release, patch, missing, {p.number for p in chosen}, f"Requires: {', '.join(required)}")
    return chosen


def _needs_none(release: Release, fix: str) -> bool:
    """True where upstream's own code of that release is sound, or has nothing that could be wrong."""
    return fix in release.states and release.disposition(fix) in (Disposition.FIXED, Disposition.ABSENT)


def _not_closed(
    release: Release,
    patch: Patch,
    missing: Iterable[str],
    chosen: Iterable[str],
    found: str,
    file: str = "",
    hunk: int = 0,
) -> PatchesError:
    together = sorted({*missing, *chosen})
    return PatchesError(
        f"{patch.number} cannot be had without {', '.join(missing)}",
        release=release.version,
        patch=patch.name,
        file=file,
        hunk=hunk,
        expected=f"a choice with {', '.join(missing)} in it",
        found=found,
        next_command=f"vllm-patches dist --pin {release.version} --fixes '{' '.join(together)}'",
    )


def _no_common_names(ours: Iterable[Patch], theirs: Iterable[ThirdPatch]) -> None:
    names = {patch.name for patch in ours}
    for patch in theirs:
        if patch.name in names:
            raise bad_patch(
                patch.name, "a name that none of ours has", patch.name, command=f"quilt rename -P {patch.name} NEW"
            )


def _candidates(patch: ThirdPatch) -> set[str]:
    """The paths that the patch may mean: one folder stripped, and none or two, to tell a wrong strip level."""
    found: set[str] = set()
    for section in patch.sections:
        found |= {section.path, section.stated, section.path.partition("/")[2]}
    return found - {""}


def _check_strip(third: Iterable[ThirdPatch], files: Mapping[str, bytes], tops: Collection[str]) -> None:
    created: set[str] = set()
    for patch in third:
        for section in patch.sections:
            if section.kind is Kind.CREATE:
                if section.stated.partition("/")[0] in tops:
                    raise wrong_strip(patch.name, section.stated, f"as -p0 it would be {section.stated}")
                created.add(section.path)
            elif section.path not in files and section.path not in created:
                for level, path in ((0, section.stated), (2, section.path.partition("/")[2])):
                    if path in files:
                        raise wrong_strip(patch.name, section.stated, f"as -p{level} it would be {path}")


def _stack(
    release: Release,
    series: Series,
    chosen: tuple[Patch, ...],
    third: tuple[ThirdPatch, ...],
    position: Position,
    tree: Tree,
) -> tuple[list[Item], Tree]:
    """Every patch in its order into *tree*."""
    base = tree.copy()  # for theirs: the release without ours
    source = tree.copy()  # for ours: the release with the whole series and nothing else
    ours, theirs = position is Position.ABOVE, bool(third)
    items: list[Item] = []
    if not ours:
        items += [_third_item(release, patch, n, tree, base) for n, patch in enumerate(third, 1)]
    for patch in series.patches:
        if patch in chosen:
            item = _our_item(release, patch, source, tree, chosen)
            items.append(item if ours or not theirs else replace(item, number=item.number + OURS_ABOVE))
        else:
            carry(parse_unified(patch.name, patch.raw), source, source.copy(), patch.name)
    if ours:
        items += [_third_item(release, patch, n, tree, base) for n, patch in enumerate(third, THIRD_ABOVE)]
    return items, tree


def _our_item(release: Release, patch: Patch, source: Tree, tree: Tree, chosen: tuple[Patch, ...]) -> Item:
    sections = parse_unified(patch.name, patch.raw)
    try:
        placed = carry(sections, source, tree, patch.name)
    except Misfit as misfit:
        raise _our_conflict(release, patch, misfit, chosen) from None
    raw = _rewritten(patch.raw, sections, placed)
    changed = raw != patch.raw
    sections = parse_unified(patch.name, raw)
    return Item(patch.name, int(patch.number), patch.number, patch.subject, raw, sections, changed)


def _our_conflict(release: Release, patch: Patch, misfit: Misfit, chosen: tuple[Patch, ...]) -> PatchesError:
    obstacle = misfit.obstacle
    if obstacle is None:  # the file itself is gone
        raise _conflict(release, patch.name, misfit, ("the other series",))
    line = obstacle.line.text.decode("utf-8", "replace").rstrip("\n")
    if obstacle.missing:
        numbers = [name[:4] for name in obstacle.missing]
        found = f"lines of {', '.join(obstacle.missing)} in the hunk: {line}"
        chosen_numbers = {p.number for p in chosen}
        return _not_closed(release, patch, numbers, chosen_numbers, found, misfit.section.path, misfit.hunk)
    return _conflict(release, patch.name, misfit, obstacle.in_the_way)


def _conflict(release: Release, name: str, misfit: Misfit, others: tuple[str, ...]) -> PatchesError:
    """Two patches want the same lines."""
    line = misfit.obstacle.line.text.decode("utf-8", "replace").rstrip("\n") if misfit.obstacle else misfit.found
    return PatchesError(
        f"{name} conflicts with {', '.join(others)}",
        release=release.version,
        patch=f"{name} against {', '.join(others)}",
        file=misfit.section.path,
        hunk=misfit.hunk,
        expected="no line that both change, or that one changes and the other needs as context",
        found=line,
        next_command=f"make apply PIN={release.version}    "
        "# rebase the other series on what it makes, then quilt refresh",
    )


def _third_item(release: Release, patch: ThirdPatch, number: int, tree: Tree, base: Tree) -> Item:
    try:
        placed = locate(patch.sections, tree, base, patch.name)
    except Misfit as misfit:
        raise _third_conflict(release, patch, misfit) from None
    raw = _rewritten(patch.raw, patch.sections, placed)
    sections = parse_unified(patch.name, raw)
    return Item(patch.name, number, "", patch.subject, raw, sections, raw != patch.raw)


def _third_conflict(release: Release, patch: ThirdPatch, misfit: Misfit) -> PatchesError:
    if misfit.obstacle and (others := misfit.obstacle.in_the_way + misfit.obstacle.missing):
        return _conflict(release, patch.name, misfit, others)
    where = f"line {misfit.line}: " if misfit.line else ""
    error = bad_patch(patch.name, where + misfit.expected, where + misfit.found, misfit.section.path, misfit.hunk)
    error.what = "a hunk of the other series fits nowhere, neither on the release nor on our patches (fuzz 0)"
    error.release = release.version
    return error


def _rewritten(raw: bytes, sections: tuple[Section, ...], placed: list[Placed]) -> bytes:
    return rewrite(raw, sections, [(place.before, place.after, place.hunks) for place in placed])


def _modes(items: Iterable[Item]) -> dict[str, str]:
    modes: dict[str, str] = {}
    for item in items:
        for section in item.sections:
            modes[section.path] = section.mode or modes.get(section.path, "100644")
    return modes


def prove(bundle: Bundle) -> None:
    """Apply the very bytes that go out, at their stated lines, by the engine of `check`; the result must be *after*."""
    release = bundle.release.version
    files = dict(bundle.before)
    for item in bundle.items:
        if item.fix:  # its blob ids are checked as well
            there = {path: data for path, data in files.items() if data is not None}
            files |= apply_patch(parse_patch(item.name, item.raw), there, release=release)
            continue
        for section in item.sections:
            blob, data = _blob_and_data(files[section.path])
            file = FilePatch(section.path, blob, "", section.mode, section.hunks)
            after = apply_hunks(file, data, patch=item.name, release=release)
            files[section.path] = None if section.kind is Kind.DELETE else after
    if wrong := [path for path, data in bundle.after.items() if files[path] != data]:
        raise PatchesError(
            "the patches that would go out do not make what was composed; this is a defect of the tool",
            release=release,
            file=", ".join(wrong),
            next_command=f"vllm-patches check --pin {release}",
        )


def _blob_and_data(data: bytes | None) -> tuple[str, bytes]:
    return (NO_BLOB, b"") if data is None else (blob_id(data), data)
