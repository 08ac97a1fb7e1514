"""From the kept runs of both sides to the table of pairs, the JSON and the plot."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from gsm8k.answers import FILTERS, Answer, pair_up, read_answers
from gsm8k.runs import Mode, Outcome, Ran
from gsm8k.stats import CONFIDENCE, Comparison, Share, Verdict, compare, share

COLUMNS = ("question", "filter", "answer", "stock", "patched", "stock_right", "patched_right", "same_text")
JUDGED_BY = "strict-match"  # the filter whose verdict is the run's


@dataclass(frozen=True)
class ModeReport:
    """Both sides in one mode; *metrics* is empty unless both finished."""

    mode: Mode
    stock: Ran
    patched: Ran
    metrics: dict[str, Comparison]
    identical: int  # questions with the same text of the answer
    verdict: Verdict
    alone: dict[str, dict[str, Share]] = field(default_factory=dict)  # of the side that finished, where one crashed


def report_mode(mode: Mode, stock: Ran, patched: Ran, margin: float, out: Path) -> ModeReport:
    """Compare both sides, and write the table of pairs."""
    if (crashed := _crashed(stock, patched)) is not None:
        finished = {ran.folder.name: _shares(ran) for ran in (stock, patched) if ran.outcome is Outcome.FINISHED}
        return ModeReport(mode, stock, patched, {}, 0, crashed, finished)
    answers = read_answers(stock.folder), read_answers(patched.folder)
    pairs = {name: pair_up(answers[0][name], answers[1][name]) for name in FILTERS}
    write_pairs(out / f"pairs-{mode.value}.tsv", pairs)
    metrics = {name: compare(((a.right, b.right) for a, b in found), margin) for name, found in pairs.items()}
    identical = sum(a.text == b.text for a, b in pairs[JUDGED_BY])
    return ModeReport(mode, stock, patched, metrics, identical, metrics[JUDGED_BY].verdict)


def _shares(ran: Ran) -> dict[str, Share]:
    """The accuracy of one side by itself, by filter."""
    answers = read_answers(ran.folder)
    return {name: share(sum(a.right for a in found.values()), len(found)) for name, found in answers.items()}


def _crashed(stock: Ran, patched: Ran) -> Verdict | None:
    broken = (stock.outcome is not Outcome.FINISHED, patched.outcome is not Outcome.FINISHED)
    said = {(True, False): Verdict.STOCK_CRASHED, (False, True): Verdict.PATCHED_CRASHED}
    return Verdict.BOTH_CRASHED if all(broken) else said.get(broken)


def write_pairs(file: Path, pairs: dict[str, list[tuple[Answer, Answer]]]) -> None:
    """One line per question and filter: the right answer, both extracted answers, both marks, and whether the texts
    are the same."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        table = csv.writer(opened, delimiter="\t", lineterminator="\n")
        table.writerow(COLUMNS)
        for name, found in pairs.items():
            for a, b in found:
                marks = (int(a.right), int(b.right), int(a.text == b.text))
                table.writerow([a.question, name, a.target, a.extracted, b.extracted, *marks])


def as_json(
    job: dict[str, Any], margin: float, modes: Iterable[ModeReport], about: dict[str, Any], hidden: dict[str, str]
) -> dict[str, Any]:
    """The whole report; *hidden* maps paths of this machine to the names that stand for them."""
    said = {
        "what": "gsm8k: stock against patched",
        "judged_by": JUDGED_BY,
        "margin": margin,
        "confidence": CONFIDENCE,
        "intervals": "Wilson (accuracy), Tango's score interval (paired difference); exact McNemar",
        "job": job,
        **about,
        "modes": {report.mode.value: _mode(report) for report in modes},
    }
    return json.loads(_without_paths(json.dumps(said), hidden))  # type: ignore[no-any-return]


def _mode(report: ModeReport) -> dict[str, Any]:
    return {
        "verdict": report.verdict.value,
        "stock": _ran(report.stock),
        "patched": _ran(report.patched),
        "same_text": report.identical,
        "metrics": {name: _comparison(found) for name, found in report.metrics.items()},
        "alone": {side: {name: _share(s) for name, s in shares.items()} for side, shares in report.alone.items()},
    }


def _ran(ran: Ran) -> dict[str, Any]:
    said = {"outcome": ran.outcome.value, "seconds": ran.seconds, "command": " ".join(ran.command)}
    return said | ({"sign": ran.sign[:300]} if ran.sign else {})


def _comparison(found: Comparison) -> dict[str, Any]:
    said = _plain(asdict(found))
    said |= {"stock": _share(found.stock), "patched": _share(found.patched)}
    return _rounded(said)  # type: ignore[no-any-return]


def _share(found: Share) -> dict[str, Any]:
    return _rounded(asdict(found) | {"accuracy": found.value})  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _without_paths(text: str, hidden: dict[str, str]) -> str:
    """Name the known folders, and keep only the last part of every other absolute path."""
    for path, name in sorted(hidden.items(), key=lambda item: -len(item[0])):
        text = text.replace(path, name)
    return re.sub(r"(?<![\w.:/-])/(?:[\w.+-]+/)+([\w.+-]+)", r"\1", text)


def table(modes: Iterable[ModeReport], margin: float) -> str:
    """The report for people."""
    lines = [f"margin {margin:.3f}, intervals of {CONFIDENCE:.0%}, judged by {JUDGED_BY}"]
    for report in modes:
        lines.append(f"{report.mode.value}: {report.verdict.value}")
        for ran, name in ((report.stock, "stock"), (report.patched, "patched")):
            kept = ", kept from an earlier run" if ran.kept else ""
            lines.append(f"  {name:<8} {ran.outcome.value} in {ran.seconds:.0f} s{kept}{_sign(ran)}")
        for metric, found in report.metrics.items():
            lines += _metric_lines(metric, found)
        for side, shares in report.alone.items():
            lines += [f"  {metric}: {side} {_told(found)}" for metric, found in shares.items()]
        if report.metrics:
            lines.append(f"  {report.identical} of {found.stock.count} answers have the same text")
    return "\n".join(lines)


def _sign(ran: Ran) -> str:
    return f": {ran.sign[:160]}" if ran.sign else ""


def _metric_lines(metric: str, found: Comparison) -> list[str]:
    return [
        f"  {metric}: stock {_told(found.stock)}; patched {_told(found.patched)}",
        f"    difference {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}], right on one side only: "
        f"stock {found.only_stock}, patched {found.only_patched}; McNemar p {found.p_value:.4g}: {found.verdict.value}",
    ]


def _told(found: Share) -> str:
    return f"{found.right}/{found.count} = {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def plot(modes: Iterable[ModeReport], margin: float, title: str, file: Path) -> None:
    """Accuracies with their intervals, and the paired difference against the margin, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "gsm8k", "svg.fonttype": "none"}
    from matplotlib import pyplot

    rows = [(r, name, r.metrics.get(name)) for r in modes for name in FILTERS]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 1.2 + 0.55 * len(rows)), sharey=True)
    for place, (report, name, found) in enumerate(rows):
        for shift, side, colour in ((-0.12, "stock", "tab:gray"), (0.12, "patched", "tab:blue")):
            s = getattr(found, side) if found is not None else report.alone.get(side, {}).get(name)
            if s is None:
                ended = f"{side}: {getattr(report, side).outcome.value}"
                left.text(0.5, place + shift, ended, color=colour, va="center")
                continue
            bars = [[s.value - s.low], [s.high - s.value]]
            left.errorbar(s.value, place + shift, xerr=bars, fmt="o", color=colour, label=side, capsize=3)
        if found is not None:
            bars = [[found.difference - found.low], [found.high - found.difference]]
            right.errorbar(found.difference, place, xerr=bars, fmt="o", color="black", capsize=3)
        right.text(1.02, place, report.verdict.value, transform=right.get_yaxis_transform(), va="center")
    right.axvspan(-margin, margin, color="tab:green", alpha=0.15, label="margin")
    right.axvline(0, color="gray", linewidth=0.8)
    left.set_yticks(range(len(rows)), [f"{r.mode.value}\n{name}" for r, name, _ in rows])
    left.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="accuracy", title=title)
    right.set(xlabel="patched minus stock")
    right.locator_params(axis="x", nbins=5)
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    if handles:
        left.legend(handles.values(), handles.keys(), loc="lower left")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
