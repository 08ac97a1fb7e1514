"""The one error of this package that a user sees: what, where, expected, found, and the next command."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class PatchesError(Exception):
    """A verb could not do what was asked; every field that is known is filled in.

    *hunk* counts from 1 within *file*; *next_command* is something to type, never prose.
    """

    what: str
    release: str = ""
    patch: str = ""
    file: str = ""
    hunk: int = 0
    expected: str = ""
    found: str = ""
    next_command: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        for label in ("release", "patch", "file", "hunk", "expected", "found"):
            value = getattr(self, label)
            if value:
                lines.append(f"  {label + ':':<10}{_indented(str(value))}")
        if self.next_command:
            lines.append(f"  next:     {self.next_command}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The filled-in fields, for ``--json``."""
        return {key: value for key, value in asdict(self).items() if value}


def _indented(text: str) -> str:
    """Continue a value of several lines under its first line."""
    return text.rstrip("\n").replace("\n", "\n" + " " * 12)
