"""Results as plain text for a person; the JSON for a machine comes from the same values."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Sequence
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from vllm_patches.errors import PatchesError
from vllm_patches.installed.install import Installed, InstallOutcome
from vllm_patches.installed.verify import FixStatus, Verified
from vllm_patches.outcome import Applied, ApplyOutcome
from vllm_patches.trees.treecheck import Fit, TreeReport
from vllm_patches.upkeep.check import CheckReport

if TYPE_CHECKING:
    from vllm_patches.dist.make import Dist
    from vllm_patches.sourcebuilds.sourcebuild import SourceBuilt
    from vllm_patches.upkeep.newpin import NewPin
    from vllm_patches.upkeep.watch import WatchReport
    from vllm_patches.wheels.wheel import Built


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two blanks apart; the last column runs free."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def applied_text(result: Applied) -> str:
    """The table of five, and where the tree and its HEAD are."""
    lines = [f"vLLM {result.release}: {result.outcome.value}"]
    lines.append(table([("fix", "name", "result", "why"), *((r.fix, r.name, r.result, r.reason) for r in result.rows)]))
    if result.tree:
        lines.append(f"tree: {result.tree}")
        lines.append(f"HEAD: {result.head}")
    if result.outcome is ApplyOutcome.ALREADY:
        lines.append("nothing was changed")
    lines += result.notes
    return "\n".join(lines)


def built_text(built: Built) -> str:
    """The table of five, the files that changed, and the wheel to install."""
    lines = [f"vLLM {built.release}: built {built.version} from {built.from_wheel}"]
    lines.append(
        table([("fix", "name", "result", "where"), *((r.fix, r.name, r.result, r.reason) for r in built.rows)])
    )
    lines += [f"{len(built.files)} files changed, {built.copied} copied as they were compressed"]
    lines += [*built.notes, f"wheel:  {built.wheel}", f"sha256: {built.sha256} ({built.size} bytes)"]
    return "\n".join(lines)


def source_built_text(built: SourceBuilt) -> str:
    """What the wheel has of the five, how it was built, and the wheel to install."""
    lines = [f"vLLM {built.release}: built {built.version} from source for {built.device}"]
    lines.append(table([("fix", "name", "status", "told by"), *_fix_rows(built.fixes)]))
    torch = f"torch {built.torch}" if built.torch else "pip's own environment"
    lines.append(
        f"Python {built.python}, {torch}, {built.jobs} jobs, compiler cache: {built.compiler_cache}; "
        f"{built.seconds} s in upstream's build"
    )
    lines += [*(f"note: {note}" for note in built.notes), f"log:    {built.log}", f"wheel:  {built.wheel}"]
    return "\n".join([*lines, f"sha256: {built.sha256} ({built.size} bytes)"])


def _fix_rows(fixes: Sequence[FixStatus]) -> list[tuple[str, str, str, str]]:
    return [(fix.fix, fix.name, fix.status.value, fix.by) for fix in fixes]


def check_text(report: CheckReport) -> str:
    """A line per pin, then every error and every problem in full."""
    rows = [("pin", "series", "patches", "files", "hunks", "fuzz 0, offset 0")]
    for pin in report.pins:
        verdict = "in and out again" if pin.error is None else "DRIFT"
        rows.append((pin.release, pin.series, str(pin.patches), str(pin.files), str(pin.hunks), verdict))
    lines = [table(rows)]
    lines += [f"\nerror: {pin.error}" for pin in report.pins if pin.error]
    lines += [f"\nproblem: {problem}" for problem in report.problems]
    lines.append("\nall patches apply" if report.ok else f"\n{_count(report)} found")
    return "\n".join(lines)


def _count(report: CheckReport) -> str:
    errors, problems = sum(pin.error is not None for pin in report.pins), len(report.problems)
    return f"{errors} patch error(s) and {problems} problem(s)"


def tree_text(report: TreeReport) -> str:
    """How each patch stands to the tree, and each hunk that is not simply at its place."""
    lines = [f"{report.tree}: series of vLLM {report.release} ({report.chosen_by})"]
    for patch in report.patches:
        lines.append(f"{patch.patch}  {patch.fit.value}")
        for hunk in patch.hunks:
            place = f"  {hunk.file} hunk {hunk.hunk}"
            if hunk.fit is Fit.CONFLICT:
                lines.append(f"{place}: conflict at line {hunk.line}")
                lines += [f"    expected: {hunk.expected}", f"    found:    {hunk.found}"]
            elif hunk.fit is Fit.OFFSET:
                lines.append(f"{place}: at line {hunk.line}, {hunk.offset:+d} lines")
            elif hunk.fit is Fit.IN and patch.fit is Fit.PARTLY:
                lines.append(f"{place}: already in, at line {hunk.line}")
    return "\n".join(lines)


def installed_text(result: Installed) -> str:
    """What became of the package, fix by fix, and how to see or undo it."""
    lines = [f"vLLM {result.version} in {result.site}: {result.outcome.value}", *result.notes]
    if result.rows:
        lines.append(
            table([("fix", "name", "result", "why"), *((r.fix, r.name, r.result, r.reason) for r in result.rows)])
        )
    lines += [f"  {path}" for path in result.files]
    if result.outcome is InstallOutcome.INSTALLED:
        lines.append("see it: vllm-patches verify; take it back: vllm-patches uninstall")
    return "\n".join(lines)


def verified_text(report: Verified) -> str:
    """A line per fix, every broken claim, and the verdict."""
    lines = [f"{report.where}: {report.kind}, vLLM {report.version or report.release or 'of unknown version'}"]
    lines += [report.origin] if report.origin else []
    rows = [("fix", "name", "status", "told by", "")]
    rows += [(fix.fix, fix.name, fix.status.value, fix.by, fix.detail) for fix in report.fixes]
    lines.append(table(rows))
    lines += [f"problem: {problem}" for problem in report.problems]
    wrong = [fix.fix for fix in report.fixes if not fix.status.fine]
    lines.append(
        "all fixes that this vLLM needs are in" if report.ok else f"NOT VERIFIED: {', '.join(wrong) or 'see above'}"
    )
    return "\n".join(lines)


def watch_text(report: WatchReport) -> str:
    """Per release and fix the verdict, and each code site behind one that is not simply there."""
    lines = [f"newest release: {report.newest}"]
    for release in report.releases:
        lines.append(f"\nvLLM {release.release}" + ("" if release.known else " (not in releases.toml)"))
        for fix in release.fixes:
            recorded = f"  [recorded: {fix.recorded}]" if fix.recorded else ""
            lines.append(f"{fix.fix} {fix.verdict}{recorded}")
            lines += [f"  {s.finding.value:<8} {s.part}  {s.path}:{s.line}  {s.note}".rstrip() for s in fix.sites]
            if fix.contradiction:
                lines.append(f"  error: {fix.contradiction}")
    lines += [f"\nerror: releases.toml does not know {v}\n  next:     make new-pin VERSION={v}" for v in report.unknown]
    return "\n".join(lines)


def dist_text(made: Dist) -> str:
    """`dist`: what was made, which patches were refreshed, and what scanners are not told."""
    rows = [["release", "version", "patches", "refreshed", "statements"]]
    for one in made.releases:
        rows.append([one.release, one.version, str(len(one.patches)), str(len(one.refreshed)), str(len(one.stated))])
    reasons = dict.fromkeys(why for one in made.releases for why in one.withheld.values())
    notes = [f"no statement for scanners: {why}" for why in reasons]
    sums = [f"{made.tar_sha256}  {made.tar}", f"{made.gz_sha256}  {made.gz}"]
    return "\n".join([table(rows), "", *notes, *sums, f"{made.files} files in {made.folder}"])


def new_pin_text(added: NewPin) -> str:
    """The proposed states, how the nearest series stands, and what is left to do."""
    lines = [f"vLLM {added.release.version}: added to patches/releases.toml, pristine tree in {added.tree}"]
    lines += [f"{i} {s.state.value} ({s.evidence}); {s.note}" for i, s in added.release.states.items()]
    lines += [f"\nseries {added.nearest} on it:", *(f"  {fit.patch}  {fit.fit.value}" for fit in added.patches)]
    lines += ["\nleft to do:", *(f"  {number}. {step}" for number, step in enumerate(added.todo, 1))]
    return "\n".join(lines)


def jsonable(value: object) -> object:
    """Dataclasses, enums, dates and our errors as what `json` takes."""
    if isinstance(value, PatchesError):
        return value.as_dict()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime.date):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


class DownloadBar:
    """Progress of one download: a bar on a terminal, a line per quarter elsewhere. pypi-simple's tracker protocol."""

    def __init__(self, name: str, total: int | None, out: TextIO) -> None:
        self._name, self._total, self._out = name, total or 0, out
        self._done = 0
        self._shown = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out.isatty():
            self._out.write("\n")

    def update(self, increment: int) -> None:
        """*increment* more bytes have arrived."""
        self._done += increment
        percent = 100 * self._done // self._total if self._total else 0
        step = percent if self._out.isatty() else percent // 25 * 25
        if step != self._shown:
            self._shown = step
            start, end = ("\r", "") if self._out.isatty() else ("", "\n")
            self._out.write(f"{start}{self._name}: {step:3d} % of {self._total / 1e6:.1f} MB{end}")
            self._out.flush()


def say(text: str) -> None:
    """One line of progress, on standard error so that ``--json`` output stays clean."""
    print(text, file=sys.stderr, flush=True)
