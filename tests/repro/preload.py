"""Which modules of a case can be imported before a mutant is forked off: those that its file cannot change.

A recorded run of the case says who imports whom. A module is left to the forks when it is the mutated file, or imports
(at any distance, while it is loaded or later) a module that is. Told from what was imported, never guessed: after the
rest is loaded, `load` looks whether the mutated file is in ``sys.modules``.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Imports = dict[str, set[str]]  # importing module -> imported ones


@contextmanager
def recorded() -> Iterator[Imports]:
    """Who imports whom in the block, by statement or by `importlib.import_module`."""
    imports: Imports = {}
    plain, by_name = builtins.__import__, importlib.import_module

    def note(importer: str, name: str) -> None:
        parts = name.split(".")
        imports.setdefault(importer, set()).update(".".join(parts[: n + 1]) for n in range(len(parts)))

    def statement(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        module = plain(name, globals, locals, fromlist, level)
        importer = (globals or {}).get("__name__", "?")
        full = importlib.util.resolve_name("." * level + name, _package(globals)) if level else name
        note(importer, full)
        for part in fromlist or ():
            note(importer, f"{full}.{part}")  # an attribute's name is no module's: harmless
        return module

    def call(name: str, package: str | None = None) -> Any:
        note(sys._getframe(1).f_globals.get("__name__", "?"), importlib.util.resolve_name(name, package))
        return by_name(name, package)

    builtins.__import__, importlib.import_module = statement, call
    try:
        yield imports
    finally:
        builtins.__import__, importlib.import_module = plain, by_name


def _package(globals: dict[str, Any]) -> str:
    name: str = globals["__name__"]
    return globals.get("__package__") or (name if "__path__" in globals else _parent(name))


def files_of(names: set[str]) -> dict[str, str]:
    """The source file of each module that an import by name gives again."""
    found = {}
    for name in names:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if spec is not None and spec.name == name and spec.has_location:
            found[name] = spec.origin
    return found


def untouched(files: dict[str, str], imports: Imports, mutated: Path, own: Path) -> list[str]:
    """Of the modules in *files*, those that neither are nor import the file *mutated* or anything in folder *own*."""
    wrong = {name for name, file in files.items() if file == str(mutated) or file.startswith(f"{own}{os.sep}")}
    while more := {name for name in files.keys() - wrong if wrong & imports.get(name, set()) or _parent(name) in wrong}:
        wrong |= more
    return [name for name in files if name not in wrong]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def load(names: list[str], mutated: Path) -> None:
    """Import *names*; an error if that brought in *mutated*, or left a thread that a fork would lose."""
    for name in names:
        importlib.import_module(name)
    read = [name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) == str(mutated)]
    if read:
        raise RuntimeError(f"{read[0]} is the mutated file: importing the others has read it")
    if threads := _lasting_threads():
        raise RuntimeError(f"threads before the fork: {' '.join(threads)}")


def _lasting_threads(seconds: float = 10.0) -> list[str]:
    """The names of the threads beside this one, once those that only just end have had the time to."""
    until = time.monotonic() + seconds
    while (others := _threads()) and time.monotonic() < until:
        time.sleep(0.05)
    return others


def _threads() -> list[str]:
    """All but jemalloc's own (pandas brings one where pyarrow is installed): its fork handlers know of it."""
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # ended meanwhile
            found.append((task / "comm").read_text(encoding="utf-8").strip())
    found.remove(Path("/proc/self/comm").read_text(encoding="utf-8").strip())
    return [name for name in found if name != "jemalloc_bg_thd"]
