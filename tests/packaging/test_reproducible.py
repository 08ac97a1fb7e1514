"""Real releases built twice under different circumstances: the same bytes, and nothing of the machine in them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from packkit import ROOT, own_environment, plain_environment

PINS = ("0.19.1", "0.20.2")  # one with a C++ part, one without
ODD = {"TZ": "Pacific/Chatham", "LC_ALL": "C", "LANG": "", "PYTHONHASHSEED": "3", "USER": "somebody"}


def build(out: Path, scripts: Path, env: dict[str, str], umask: int) -> dict[str, str]:
    """`dist` by the code in *scripts*, started in *out*'s parent; its result."""
    pins = [word for pin in PINS for word in ("--pin", pin)]
    command = [sys.executable, "-m", "vllm_patches", "dist", "--json", "--out", str(out), *pins]
    env = {**plain_environment(out.parent), **own_environment(), "PYTHONPATH": str(scripts), **env}
    done = subprocess.run(command, cwd=out.parent, env=env, umask=umask, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_built_twice(tmp_path: Path) -> None:
    """Another folder, zone, locale, user name, umask, and checkout with other times on its files."""
    other = tmp_path / "another" / "checkout"
    other.mkdir(parents=True)
    names = ["scripts", "patches", "LICENSE", "NOTICE", "pyproject.toml"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(other)], check=True)
    first = build(tmp_path / "one", ROOT / "scripts", {}, 0o022)
    second = build(tmp_path / "another" / "two", other / "scripts", ODD, 0o077)
    for key in ("tar_sha256", "gz_sha256", "files"):
        assert first[key] == second[key]
    folders = [Path(one["folder"]) for one in (first, second)]
    done = subprocess.run(["diff", "-r", *map(str, folders)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    names_of_the_machine = [str(tmp_path).encode(), str(ROOT).encode(), os.uname().nodename.encode()]
    tar = (folders[0] / first["tar"]).read_bytes()
    assert not [name for name in names_of_the_machine if len(name) > 4 and name in tar]
    assert gzip.decompress((folders[0] / first["gz"]).read_bytes()) == tar
    with tarfile.open(folders[0] / first["tar"]) as archive:
        assert {member.mode for member in archive} == {0o644, 0o755}
