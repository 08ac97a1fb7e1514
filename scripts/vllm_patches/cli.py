"""The command line: parse, call, print. Exit status: 0 done, 1 drift or error, 2 wrong usage, 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vllm_patches import __version__, render
from vllm_patches.errors import PatchesError
from vllm_patches.installed.install import install, uninstall
from vllm_patches.installed.verify import verify
from vllm_patches.outcome import Applied
from vllm_patches.render import DownloadBar, say
from vllm_patches.series.catalog import DEFAULT_PIN, Catalog, open_catalog
from vllm_patches.series.model import Artifact, Release
from vllm_patches.sourcebuilds.buildenv import DEVICE_VARIABLE, Device, device_named
from vllm_patches.sources.sdist import verified
from vllm_patches.sources.store import FindSdist
from vllm_patches.trees.apply import apply_release, states_only
from vllm_patches.trees.checkout import apply_checkout
from vllm_patches.trees.treecheck import check_tree
from vllm_patches.upkeep.check import check_catalog
from vllm_patches.upkeep.maintain import export_series, record_pins
from vllm_patches.upkeep.matrix import readme_path, render_matrix, replace_matrix


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what cleans up after Ctrl-C does so after `kill`, `timeout` and a job scheduler."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors are printed as text, or as JSON where it was asked for."""
    options = _parser().parse_args(argv)
    try:
        verb: Callable[[Catalog, argparse.Namespace], int] = options.verb
        with _sigterm_as_interrupt():
            status = verb(open_catalog(), options)
        print(end="", flush=True)  # here, not in the interpreter's last breath, shows what cannot be written
        return status
    except PatchesError as error:
        return _report(error, options)
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        return _report(PatchesError(str(error), next_command=f"ls -ld {error.filename or '.'}"), options)
    except KeyboardInterrupt as signalled:
        print("interrupted; nothing half-made is left, run it again", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(signalled, _Terminated) else signal.SIGINT)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Only the main thread can, and a handler that somebody else has set stays theirs."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminated(number: int, frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _report(error: PatchesError, options: argparse.Namespace) -> int:
    """Print an error, as JSON too where that was asked for; standard output may be what has failed."""
    print(f"error: {error}", file=sys.stderr)
    try:
        if options.json:
            print(json.dumps({"error": error.as_dict()}, indent=1))
        print(end="", flush=True)
    except OSError:
        _drop_output()
    return 1


def _drop_output() -> None:
    """Let what is still buffered go nowhere, or the interpreter would complain about it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    parser = argparse.ArgumentParser(prog="vllm-patches", description="Patch series on pinned vLLM releases.")
    parser.add_argument("--version", action="version", version=f"vllm-patches {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Callable[[Catalog, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(verb=function, name=name)
        return added

    one = verb("apply", _apply, "make a patched tree of a release, or patch a git checkout on a new branch")
    one.add_argument("--pin", help=f"release, or 'all' (default: {DEFAULT_PIN}; with --src: told by its blobs)")
    one.add_argument("--src", type=Path, help="a git checkout of your own")
    one.add_argument("--sdist", type=Path, help="the release's sdist, for a machine with no network")
    one.add_argument(
        "--build", type=Path, default=Path("build/src"), help="where trees are made (default: %(default)s)"
    )
    one = verb("build", _build, "make a patched wheel from the official one")
    one.add_argument("--pin", help=f"release (default: told by --wheel, else {DEFAULT_PIN})")
    one.add_argument("--wheel", type=Path, help="the official wheel, for a machine with no network")
    one.add_argument("--arch", default="", help="x86_64 or aarch64 (default: this machine's)")
    one.add_argument("--out", type=Path, default=Path("dist"), help="where the wheel is put (default: %(default)s)")
    one.add_argument("--without", action="append", default=[], help="leave out a compiled part, such as 0001-native")
    one.add_argument("--cuda-archs", default="", help="such as '8.0 9.0' (default: those of the official wheel)")
    one.add_argument("--torch", type=Path, help="the torch package whose headers are used (default: this Python's)")
    one.add_argument("--sdist", type=Path, help="the release's sdist, for a compiled part on a machine with no network")
    one.add_argument("--thorough", action="store_true", help="inflate every copied file too and compare with RECORD")
    _add_source_options(one)
    one = verb("check", _check, "do the patches still apply? to every pin, or to a tree of yours")
    one.add_argument("--pin", action="append", help="only this release (repeatable)")
    one.add_argument("--sdist", type=Path, help="the sdist of the one --pin, for a machine with no network")
    one.add_argument("--tree", type=Path, help="your own checkout, fork or unpacked sdist; it is only read")
    one.add_argument("--strict", action="store_true", help="with --tree: an offset is a failure too")
    one = verb("install", _install, "patch an installed vLLM in place; all of it or nothing")
    one.add_argument("--site", type=Path, help="its site folder or environment (default: the current environment)")
    one.add_argument("--without", action="append", default=[], metavar="PART", help="give up a part: 0001-native")
    one = verb("uninstall", _uninstall, "put back every byte that install changed")
    one.add_argument("--site", type=Path, help="the site folder or environment (default: the current environment)")
    _dist_options(verb("dist", _dist, "release assets for packagers: quilt, RPM, Nix, conda, Spack, AUR, Dockerfiles"))
    one = verb("verify", _verify, "which of the five an installed package, wheel, sdist or source tree has")
    one.add_argument("path", type=Path, nargs="?", help="default: the current environment")
    one.add_argument("--without", action="append", default=[], metavar="PART", help="accept that a part is left out")
    one = verb("watch", _watch, "what upstream's newest release has of the five fixes, by its code")
    one.add_argument("--version", default="", help="a release, or 'all' that are recorded (default: the newest)")
    one = verb("new-pin", _new_pin, "take a release into the tables, and say what is left to do")
    one.add_argument("release")
    one.add_argument("--build", type=Path, default=Path("build/src"))
    one = verb("matrix", _matrix, "print the matrix release x fix")
    one.add_argument("--write", action="store_true", help="write it into the README")
    one = verb(
        "export",
        _export,
        "write a tree's commits to the patch files of its series (import and export are a round trip)",
    )
    one.add_argument("--pin", required=True)
    one.add_argument("--tree", type=Path, help="default: build/src/vllm-PIN")
    verb("record", _record, "write HEAD and the touched files' blobs of every pin to releases.toml")
    return parser


def _dist_options(one: argparse.ArgumentParser) -> None:
    which = one.add_mutually_exclusive_group()
    which.add_argument("--pin", action="append", help="only this release (repeatable)")
    which.add_argument("--all", action="store_true", help="every release with a series (the default)")
    one.add_argument("--fixes", default="", metavar="LIST", help="only these, such as '0003 0005' (default: all)")
    one.add_argument("--channel", action="append", default=[], help="only this one (repeatable; a wrong one lists all)")
    one.add_argument("--with-series", type=Path, metavar="DIR", help="a quilt series of your own to go along")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--above", action="store_true", help="yours after ours (the default)")
    where.add_argument("--below", action="store_true", help="yours before ours")
    one.add_argument("--proof", type=Path, metavar="FILE", help="what make prove JSON=1 printed; without it no VEX")
    one.add_argument("--base-url", default="", metavar="URL", help="where the folder made here will be found")
    one.add_argument("--sdist-url", default="", metavar="URL", help="the sdist's address, with {version} in it")
    one.add_argument("--sdist", type=Path, help="the sdist of the one --pin, for a machine with no network")
    one.add_argument("--out", type=Path, default=Path("dist"), help="where the folder is made (default: %(default)s)")


def _add_source_options(one: argparse.ArgumentParser) -> None:
    """What `build --mode source` alone takes."""
    devices = [device.value for device in Device]
    one.add_argument("--mode", choices=("wheel", "source"), default="wheel", help="source: upstream's own full build")
    one.add_argument("--target-device", choices=devices, help=f"source: default ${DEVICE_VARIABLE}, else cuda")
    one.add_argument("--no-build-isolation", action="store_true", help="source: build with the interpreter's packages")
    one.add_argument("--python", help="source: the interpreter to build with (default: this one)")
    one.add_argument("--work", type=Path, default=Path("build/source"), help="source: where (default: %(default)s)")


def _finder(sdist: Path | None) -> FindSdist:
    """Where sdists come from: the given file, else the cache and the index."""
    if sdist is not None:
        return lambda release: verified(sdist, release)

    def fetch(release: Release) -> Path:
        from vllm_patches.sources.index import fetch_sdist  # the network's own library is needed from here on only

        return fetch_sdist(release, lambda total: DownloadBar(release.sdist, total or release.size, sys.stderr))

    return fetch


def _apply(catalog: Catalog, options: argparse.Namespace) -> int:
    if options.src is not None:
        _need_no_sdist(options, "--src")
        release = catalog.release(options.pin) if options.pin else None
        results = [apply_checkout(catalog, options.src, release)]
    elif options.pin == "all":
        _need_one_pin(options)
        results = [_apply_or_state(catalog, release, options) for release in catalog.releases.values()]
    else:
        release = catalog.release(options.pin or DEFAULT_PIN)
        results = [apply_release(catalog, release, _finder(options.sdist), options.build, say)]
    _print(options, results, "\n\n".join(map(render.applied_text, results)))
    return 0


def _build(catalog: Catalog, options: argparse.Namespace) -> int:
    if options.mode == "source":
        return _build_source(catalog, options)
    _refuse(options, ("target_device", "no_build_isolation", "python"), "--mode wheel")
    from vllm_patches.wheels.native import NativeOptions
    from vllm_patches.wheels.wheel import build_wheel, release_of

    def find(wanted: Artifact) -> Path:
        from vllm_patches.sources.index import fetch_wheel

        return fetch_wheel(wanted, lambda total: DownloadBar(wanted.name, total or wanted.size, sys.stderr))

    release = release_of(catalog, options.pin, options.wheel)
    built = build_wheel(
        catalog, release, find, options.out, say,
        given=options.wheel, arch=options.arch, without=tuple(options.without), thorough=options.thorough,
        find_sdist=_finder(options.sdist), native=NativeOptions(options.cuda_archs, options.torch),
    )  # fmt: skip
    _print(options, built, render.built_text(built))
    return 0


def _build_source(catalog: Catalog, options: argparse.Namespace) -> int:
    from vllm_patches.sourcebuilds.sourcebuild import SourceOptions, build_source

    _refuse(options, ("wheel", "arch", "without", "cuda_archs", "torch", "thorough"), "--mode source")
    chosen = SourceOptions(
        device_named(options.target_device),
        Path(shutil.which(options.python) or options.python).absolute() if options.python else Path(sys.executable),
        not options.no_build_isolation,
    )
    release = catalog.release(options.pin or DEFAULT_PIN)
    built = build_source(catalog, release, _finder(options.sdist), options.work, options.out, say, chosen)
    _print(options, built, render.source_built_text(built))
    return 0


def _refuse(options: argparse.Namespace, names: Sequence[str], mode: str) -> None:
    """Options of the other mode would be passed over in silence."""
    if given := [name for name in names if getattr(options, name)]:
        flag = "--" + given[0].replace("_", "-")
        raise PatchesError(
            f"{flag} is of no use with {mode}",
            expected="options of one mode",
            found=f"{flag} {getattr(options, given[0])}",
            next_command=f"vllm-patches build {mode}"
            + ("    # architectures: TORCH_CUDA_ARCH_LIST, which upstream reads" if flag == "--cuda-archs" else ""),
        )


def _need_one_pin(options: argparse.Namespace) -> None:
    """A file is the sdist of one release, so it cannot serve several."""
    if options.sdist is not None and (options.pin == "all" or len(options.pin or []) != 1):
        raise PatchesError(
            "--sdist needs the one release that the file is the sdist of",
            file=str(options.sdist),
            expected="one --pin",
            found=str(options.pin or "none"),
            next_command=f"vllm-patches {options.name} --pin {DEFAULT_PIN} --sdist {options.sdist}",
        )


def _need_no_sdist(options: argparse.Namespace, other: str) -> None:
    """A checkout has its own files; an option that would be passed over in silence is refused."""
    if options.sdist is not None:
        raise PatchesError(
            f"--sdist is of no use with {other}",
            file=str(options.sdist),
            expected="one of the two",
            found="both",
            next_command=f"vllm-patches apply --pin {DEFAULT_PIN} --sdist {options.sdist}",
        )


def _need_at_most_one_pin(options: argparse.Namespace) -> None:
    if len(options.pin or []) > 1:
        raise PatchesError(
            "--tree needs the one release that it is held against",
            file=str(options.tree),
            expected="one --pin, or none",
            found=", ".join(options.pin),
            next_command=f"vllm-patches check --tree {options.tree} --pin {options.pin[0]}",
        )


def _apply_or_state(catalog: Catalog, release: Release, options: argparse.Namespace) -> Applied:
    if not release.series:
        return states_only(catalog, release)
    return apply_release(catalog, release, _finder(options.sdist), options.build, say)


def _check(catalog: Catalog, options: argparse.Namespace) -> int:
    pins = [catalog.release(pin) for pin in options.pin or []]
    if options.tree is not None:
        _need_no_sdist(options, "--tree")
        _need_at_most_one_pin(options)
        report = check_tree(catalog, options.tree, pins[0] if pins else None)
        _print(options, report, render.tree_text(report))
        return 0 if (report.exact if options.strict else report.ok) else 1
    _need_one_pin(options)
    checked = check_catalog(catalog, pins or catalog.pins, _finder(options.sdist))
    _print(options, checked, render.check_text(checked))
    return 0 if checked.ok else 1


def _install(catalog: Catalog, options: argparse.Namespace) -> int:
    result = install(catalog, options.site, options.without, say)
    _print(options, result, render.installed_text(result))
    return 0


def _uninstall(catalog: Catalog, options: argparse.Namespace) -> int:
    result = uninstall(options.site, say)
    _print(options, result, render.installed_text(result))
    return 0


def _dist(catalog: Catalog, options: argparse.Namespace) -> int:
    from vllm_patches.dist.compose import Wish
    from vllm_patches.dist.links import Links
    from vllm_patches.dist.make import Order, make_dist
    from vllm_patches.dist.proofs import read_proofs
    from vllm_patches.dist.stacking import Position, read_third

    _need_one_pin(options)
    third = read_third(options.with_series) if options.with_series else None
    _need_series_for_position(options)
    fixes = tuple(dict.fromkeys(options.fixes.replace(",", " ").split()))
    order = Order(
        wish=Wish(fixes, third, Position.BELOW if options.below else Position.ABOVE),
        channels=tuple(dict.fromkeys(options.channel)),
        links=Links(options.base_url, options.sdist_url),
        proofs=read_proofs(options.proof) if options.proof else None,
        all_releases=not options.pin,
    )
    releases = [catalog.release(pin) for pin in dict.fromkeys(options.pin or [])] or list(catalog.pins)
    made = make_dist(catalog, releases, _finder(options.sdist), options.out, order, say)
    _print(options, made, render.dist_text(made))
    return 0


def _need_series_for_position(options: argparse.Namespace) -> None:
    """A position without a series would be passed over in silence."""
    if options.with_series is None and (options.above or options.below):
        raise PatchesError(
            "--above and --below say where the series of --with-series goes",
            expected="--with-series DIR",
            found="none",
            next_command="vllm-patches dist --with-series DIR --below",
        )


def _verify(catalog: Catalog, options: argparse.Namespace) -> int:
    report = verify(catalog, options.path, options.without)
    _print(options, report, render.verified_text(report))
    return 0 if report.ok else 1


def _watch(catalog: Catalog, options: argparse.Namespace) -> int:
    from vllm_patches.upkeep.watch import watch

    report = watch(catalog, options.version, _finder(None))
    _print(options, report, render.watch_text(report))
    return 0 if report.ok else 1


def _new_pin(catalog: Catalog, options: argparse.Namespace) -> int:
    from vllm_patches.upkeep.newpin import new_pin

    added = new_pin(catalog, options.release, _finder(None), options.build, say)
    _print(options, added, render.new_pin_text(added))
    return 0


def _matrix(catalog: Catalog, options: argparse.Namespace) -> int:
    if options.write:
        path = readme_path(catalog)
        path.write_text(replace_matrix(path.read_text(encoding="utf-8"), catalog), encoding="utf-8")
    _print(options, list(catalog.releases.values()), render_matrix(catalog).rstrip())
    return 0


def _export(catalog: Catalog, options: argparse.Namespace) -> int:
    release = catalog.release(options.pin)
    changed = export_series(catalog, release, options.tree or Path("build/src") / f"vllm-{release.version}")
    _print(options, changed, _changes(changed))
    return 0


def _record(catalog: Catalog, options: argparse.Namespace) -> int:
    changed = record_pins(catalog, _finder(None))
    _print(options, changed, _changes(changed))
    return 0


def _changes(changed: dict[str, bool]) -> str:
    return "\n".join(f"{'changed' if flag else 'same':<8} {name}" for name, flag in changed.items())


def _print(options: argparse.Namespace, value: object, text: str) -> None:
    print(json.dumps(render.jsonable(value), indent=1) if options.json else text)
