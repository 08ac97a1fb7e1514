"""The two sides of a run: how stock and patched vLLM are started, and the proof that each is what its name says."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gpurun import copies
from vllm_patches import api

CODE = Path(__file__).resolve().parents[1]
ROOT = CODE.parent


class RunError(Exception):
    """The run itself cannot go on; unlike a crash of an engine this is no result."""


@dataclass(frozen=True)
class Side:
    """An interpreter, and the folders in front of its own packages."""

    name: str  # stock or patched
    python: str
    folders: tuple[Path, ...] = ()

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        """The environment variables of its processes."""
        path = [str(CODE), *map(str, self.folders), *filter(None, [os.environ.get("PYTHONPATH")])]
        return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"} | extra


def side_of(name: str, given: str, python: str) -> Side:
    """A side from the command line: an interpreter, or a folder that holds a `vllm` package."""
    if not given:
        return Side(name, python)
    path = Path(given).absolute()  # not resolved: an environment's python is a link, and the link is what matters
    if (path / "vllm").is_dir():
        return Side(name, python, (path,))
    if path.is_file() and os.access(path, os.X_OK):
        return Side(name, str(path))
    raise RunError(f"--{name} {given}: neither an interpreter nor a folder with vllm/ in it")


def site_of(side: Side) -> Path:
    """The folder that the side imports vLLM from, without importing it."""
    code = "import importlib.util as u; s = u.find_spec('vllm'); print(s.submodule_search_locations[0] if s else '')"
    done = subprocess.run(
        [side.python, "-c", code], capture_output=True, text=True, env=side.environment({}), check=False
    )
    if done.returncode or not done.stdout.strip():
        raise RunError(f"{side.name}: {side.python} finds no vllm\n{done.stderr.strip()}")
    return Path(done.stdout.strip()).parent


def fixes_of(side: Side) -> dict[str, str]:
    """Fix to what `verify` says of it; raises unless a stock side has none of ours and a patched side is whole."""
    report = api.verify(site_of(side))
    found = {fix.fix: fix.status.value for fix in report.fixes}
    if side.name == "patched" and not report.ok:
        raise RunError(f"patched is not patched: {found}, {report.problems}\n  next:     vllm-patches install")
    if side.name == "stock" and "present" in found.values():
        raise RunError(f"stock is not stock: {found}\n  next:     vllm-patches uninstall")
    return {"vllm": report.version} | found


def patched_copy(stock: Side, folder: Path) -> Side:
    """The stock side's own vLLM again in *folder*, hard-linked, with the patches installed in it."""
    site = site_of(stock)
    copies.patched_copy([site / "vllm", *site.glob("vllm-*.dist-info")], folder, api.install)
    return Side("patched", stock.python, (folder, *stock.folders))
