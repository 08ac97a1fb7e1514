"""Upstream's native dependencies, which its build fetches unless it is given a copy: read from its own CMake files.

Commands are read, nothing is run: `FetchContent_Declare` and `FetchContent_Populate` with a GIT_REPOSITORY, the strings
that `set` gives to variables, and the `if` and `else` around them, which say when a dependency counts and which
variable takes a copy instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from vllm_patches.dist.bundle import Asset
from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release

ROOT_FILE = "CMakeLists.txt"
_TOKEN = re.compile(
    r"(?P<comment>#\[(?P<eq>=*)\[.*?\](?P=eq)\]|#[^\n]*)"
    r'|(?P<quoted>"(?:[^"\\]|\\.)*")'
    r"|(?P<bracket>\[(?P<eq2>=*)\[.*?\](?P=eq2)\])"
    r"|(?P<paren>[()])"
    r"|(?P<word>(?:[^\s()#\"\\]|\\.)+)"
    r"|(?P<space>\s+)",
    re.S,
)
_KINDS = ("comment", "quoted", "bracket", "paren", "word", "space")
_KEYS = ("GIT_REPOSITORY", "GIT_TAG", "SOURCE_DIR", "SOURCE_SUBDIR", "GIT_SUBMODULES")
_FETCHES = ("fetchcontent_declare", "fetchcontent_populate")


@dataclass(frozen=True)
class Command:
    """One CMake command; *conditions* are the ``if`` arguments around it, ``NOT (…)`` for an ``else``."""

    name: str
    arguments: tuple[str, ...]
    file: str
    line: int
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Dependency:
    """One repository that the build fetches; *variable* names a local copy, and *how* it is given."""

    name: str
    repository: str
    revision: str
    submodules: tuple[str, ...]
    subdirectory: str
    variable: str
    how: str
    declared: str  # file:line
    when: tuple[str, ...]


def is_cmake(path: str) -> bool:
    """True for the files of a release that are read here."""
    return path == ROOT_FILE or (path.startswith("cmake/") and path.endswith(".cmake"))


def read_dependencies(files: Mapping[str, str], release: str = "") -> tuple[Dependency, ...]:
    """Every dependency in the CMake *files* (path to text), in the order of the files."""
    commands = [command for path in sorted(files) for command in parse(path, files[path], release)]
    values = _values(commands)
    fetches = [command for command in commands if command.name in _FETCHES]
    found = [_dependency(c, fetches, values, commands) for c in fetches if "GIT_REPOSITORY" in c.arguments]
    if not found:
        raise PatchesError(
            "no native dependency was found in upstream's CMake files; has their form changed?",
            release=release,
            file=", ".join(sorted(files)) or ROOT_FILE,
            expected="FetchContent_Declare(… GIT_REPOSITORY … GIT_TAG …)",
            found="none",
            next_command=f"make apply PIN={release}    # look at cmake/ in it",
        )
    return tuple(found)


def parse(path: str, text: str, release: str = "") -> Iterator[Command]:
    """The commands of one CMake file, with the conditions that they stand under."""
    around: list[list[str]] = []
    for name, arguments, line in _commands(path, text, release):
        if name == "if":
            around.append([" ".join(arguments)])
        elif name in ("elseif", "else") and around:
            around[-1][-1] = f"NOT ({around[-1][-1]})"
            if name == "elseif":
                around[-1].append(" ".join(arguments))
        elif name == "endif" and around:
            around.pop()
        else:
            yield Command(name, arguments, path, line, tuple(one for group in around for one in group))


def _commands(path: str, text: str, release: str) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Name, arguments and line of each command; parentheses inside the arguments are arguments."""
    name, started, depth = "", 1, 0
    arguments: list[str] = []
    for kind, value, line in _tokens(path, text, release):
        if kind == "word" and depth == 0:
            name, started = value.lower(), line
            continue
        depth += {"(": 1, ")": -1}.get(value, 0) if kind == "paren" else 0
        if depth == 0:
            yield name, tuple(arguments), started
            arguments = []
        elif kind != "paren" or depth > 1 or value == ")":
            arguments.append(value[1:-1] if kind == "quoted" else value)


def _tokens(path: str, text: str, release: str) -> Iterator[tuple[str, str, int]]:
    """Words, strings and parentheses with their lines; blanks and comments are left out."""
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _unreadable(path, line, text[at : at + 40].partition("\n")[0], release)
        kind = next(kind for kind in _KINDS if match[kind] is not None)
        if kind not in ("comment", "space"):
            yield kind, match[0], line
        line += match[0].count("\n")
        at = match.end()


def _unreadable(path: str, line: int, found: str, release: str) -> PatchesError:
    return PatchesError(
        "upstream's CMake file cannot be read",
        release=release,
        file=f"{path}:{line}",
        expected="a CMake command",
        found=found,
        next_command=f"make apply PIN={release}    # look at the file",
    )


def _values(commands: Iterable[Command]) -> dict[str, str]:
    """Variables that are set to one plain string; a variable that is set to several is none of them."""
    seen: dict[str, set[str]] = {}
    for command in commands:
        if command.name == "set" and len(command.arguments) == 2:
            seen.setdefault(command.arguments[0], set()).add(command.arguments[1])
    return {name: next(iter(values)) for name, values in seen.items() if len(values) == 1}


def _dependency(
    command: Command, fetches: list[Command], values: Mapping[str, str], commands: Iterable[Command]
) -> Dependency:
    words = _keyed(command.arguments)
    name = command.arguments[0]
    variable = _copy_variable(command, [c for c in fetches if c.arguments[0] == name])
    return Dependency(
        name=name,
        repository=_expand(words["GIT_REPOSITORY"][0], values),
        revision=_expand(words["GIT_TAG"][0], values),
        submodules=tuple(words.get("GIT_SUBMODULES", ())),
        subdirectory="".join(words.get("SOURCE_SUBDIR", ())),
        variable=variable,
        how="environment" if any(_reads(c, variable) for c in commands) else "cmake -D, or CMAKE_ARGS",
        declared=f"{command.file}:{command.line}",
        when=tuple(one for one in command.conditions if variable not in one),
    )


def _reads(command: Command, variable: str) -> bool:
    """True where the command takes the environment's *variable*."""
    return any(f"ENV{{{variable}}}" in word for word in (*command.arguments, *command.conditions))


def _keyed(arguments: tuple[str, ...]) -> dict[str, list[str]]:
    """The words after each keyword; keywords are words of capitals."""
    found: dict[str, list[str]] = {}
    key = ""
    for word in arguments[1:]:
        if re.fullmatch(r"[A-Z][A-Z_]+", word):
            key = word
        elif key in _KEYS:
            found.setdefault(key, []).append(word)
    return found


def _expand(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def _copy_variable(command: Command, same: Iterable[Command]) -> str:
    """The variable for a local copy: where another declaration has its SOURCE_DIR from, else what stands in the way.

    A dependency that knows neither is given by CMake's own FETCHCONTENT_SOURCE_DIR_<NAME>.
    """
    for other in same:
        folder = "".join(_keyed(other.arguments).get("SOURCE_DIR", ())) if other is not command else ""
        if match := re.fullmatch(r"\$(?:ENV)?\{(\w+)\}", folder):
            return match[1]
    for condition in reversed(command.conditions):
        if match := re.match(r"NOT \(DEFINED ENV\{(\w+)\}", condition):
            return match[1]
    return f"FETCHCONTENT_SOURCE_DIR_{command.arguments[0].upper()}"


def asset(release: Release, files: Mapping[str, str]) -> Asset:
    """``native-dependencies.json``."""
    record = {
        "release": release.version,
        "sdist": {"file": release.sdist, "sha256": release.sha256},
        "dependencies": [
            {
                "name": one.name,
                "repository": one.repository,
                "revision": one.revision,
                **({"submodules": list(one.submodules)} if one.submodules else {}),
                **({"subdirectory": one.subdirectory} if one.subdirectory else {}),
                "local_copy": {"variable": one.variable, "given_by": one.how},
                "declared": one.declared,
                "when": list(one.when),
            }
            for one in read_dependencies(files, release.version)
        ],
    }
    return Asset("native-dependencies.json", (json.dumps(record, indent=1) + "\n").encode())
