"""What upstream's own build reads from its surroundings, decided in one place: version, device, jobs, interpreter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release

GIB = 1 << 30
DEVICE_VARIABLE = "VLLM_TARGET_DEVICE"


class Device(Enum):
    """The values of ``VLLM_TARGET_DEVICE`` that are built for; *empty* is vLLM without any compiled code."""

    CUDA = "cuda"
    ROCM = "rocm"
    CPU = "cpu"
    EMPTY = "empty"

    @property
    def suffix(self) -> str:
        """What upstream's setup.py appends to the version, as a regular expression.

        For CUDA only where the toolkit is not the release's main one (``VLLM_MAIN_CUDA_VERSION``).
        """
        return {"cuda": r"(\.cu\d{2,3})?", "rocm": r"\.rocm\d{2,3}", "cpu": r"\.cpu", "empty": r"\.empty"}[self.value]

    @property
    def memory(self) -> int:
        """Bytes of memory that one compile job is given: a rule of thumb, kernels differ."""
        return (2 if self is Device.CPU else 4) * GIB


def device_named(name: str | None) -> Device:
    """The device of that name, else the one that the environment names as it does for upstream, else CUDA."""
    wanted = name or os.environ.get(DEVICE_VARIABLE, "").strip().lower() or Device.CUDA.value
    if wanted in {device.value for device in Device}:
        return Device(wanted)
    raise PatchesError(
        f"{DEVICE_VARIABLE} names a device that is not built for",
        expected=", ".join(device.value for device in Device),
        found=wanted,
        next_command=f"make build MODE=source {DEVICE_VARIABLE}={Device.CUDA.value}",
    )


# They would take the version, or compiled code, from somewhere else than the patched tree.
NOT_PASSED_ON = (
    "VLLM_VERSION_OVERRIDE",
    "VLLM_USE_PRECOMPILED",
    "VLLM_PRECOMPILED_WHEEL_LOCATION",
    "VLLM_PRECOMPILED_WHEEL_COMMIT",
    "VLLM_PRECOMPILED_WHEEL_VARIANT",
    "VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX",
    "VLLM_DOCKER_BUILD_CONTEXT",
)


def jobs(device: Device, environ: Mapping[str, str], cores: int, memory: int) -> int:
    """How many compile jobs: the user's ``MAX_JOBS``, else one per core as far as the free *memory* (bytes) reaches.

    ``NVCC_THREADS`` needs no thought: upstream divides the jobs by it.
    """
    if environ.get("MAX_JOBS", "").strip():
        return int(environ["MAX_JOBS"]) if environ["MAX_JOBS"].strip().isdecimal() else 0
    return max(1, min(cores, memory // device.memory))


def free_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that may still be used: what the machine has, and what the container's limit leaves."""
    text = proc.read_text(encoding="ascii", errors="replace") if proc.is_file() else ""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.M)
    free = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(cgroup / name) for name in ("memory.max", "memory.current")]
    return min(free, max(0, limits[0] - (limits[1] or 0))) if limits[0] else free


def _number(path: Path) -> int:
    """The number in a cgroup file; 0 where there is none, or no limit."""
    text = path.read_text(encoding="ascii", errors="replace").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else 0


def environment(
    release: Release, version: str, device: Device, job_count: int, python: Path, environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the build: the user's own, less what would falsify it, plus what upstream reads."""
    kept = {name: value for name, value in environ.items() if name not in NOT_PASSED_ON}
    here = Path(__file__).parents[2].resolve()  # where make has Python look for this tool
    paths = [path for path in kept.pop("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != here]
    kept |= {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    epoch = datetime.combine(release.date, datetime.min.time(), UTC)
    return kept | {
        "VLLM_TARGET_DEVICE": device.value,
        # Both names: setup.py asks without the package's name, the setuptools plugin with it.
        "SETUPTOOLS_SCM_PRETEND_VERSION": version,
        "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_VLLM": version,
        "MAX_JOBS": str(job_count),
        # No clock in the wheel: its members are dated by the release.
        "SOURCE_DATE_EPOCH": environ.get("SOURCE_DATE_EPOCH") or str(int(epoch.timestamp())),
        # Upstream calls cmake and ninja by name: those of the interpreter's environment first, as if it were active.
        "PATH": f"{python.parent}{os.pathsep}{environ.get('PATH', os.defpath)}",
    }


def compiler_cache(environ: Mapping[str, str]) -> str:
    """The compiler cache that upstream's setup.py will take by itself: sccache, ccache, or none."""
    disabled = environ.get("VLLM_DISABLE_SCCACHE", "0") not in ("", "0")
    for name in ("sccache", "ccache"):
        if shutil.which(name, path=environ.get("PATH")) and not (name == "sccache" and disabled):
            return name
    return "none"


@dataclass(frozen=True)
class Interpreter:
    """A Python that shall build without isolation: its versions; *cuda* and *hip* are those of its torch."""

    python: str
    torch: str
    cuda: str
    hip: str


_LOOK = """
import importlib.util, json, sys
names = json.loads(sys.argv[1])
missing = [name for name in names if importlib.util.find_spec(name) is None]
found = {"missing": missing, "python": sys.version.split()[0]}
if "torch" in names and "torch" not in missing:
    import torch
    found.update(torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip)
print("\\n" + json.dumps(found))
"""


def look_at(python: Path, device: Device, environ: Mapping[str, str], *, isolated: bool, again: str) -> Interpreter:
    """The interpreter, once it has all that the build needs of it; *again* is the command to type after the repair.

    With isolation that is pip alone: the rest pip installs itself, as upstream's pyproject.toml says.
    """
    modules = ["pip"] if isolated else ["pip", "packaging", "setuptools", "setuptools_scm", "torch"]
    modules += ["jinja2"] if device is Device.CUDA and not isolated else []
    done = _ask(python, modules, environ)
    missing = list(done["missing"])
    if device is not Device.EMPTY and not isolated and not shutil.which("cmake", path=environ.get("PATH")):
        missing.append("cmake")
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        install = f"{python} -m ensurepip" if "pip" in missing else f"{python} -m pip install {packages}"
        raise PatchesError(
            "the interpreter lacks what upstream's build needs",
            file=str(python),
            expected=", ".join([*modules, *(["cmake"] if "cmake" in missing else [])]),
            found=f"no {', '.join(missing)}",
            next_command=f"{install} && {again}",
        )
    found = Interpreter(done["python"], *(str(done.get(key) or "") for key in ("torch", "cuda", "hip")))
    if not isolated:
        _check_torch(found, device, python, again)
    return found


def _ask(python: Path, modules: list[str], environ: Mapping[str, str]) -> dict[str, str]:
    command = [str(python), "-c", _LOOK, json.dumps(modules)]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return answer
    except (OSError, ValueError, IndexError) as error:
        said = str(error) if isinstance(error, OSError) else done.stderr.strip()[-500:]
        raise PatchesError(
            "the interpreter cannot be asked what it has",
            file=str(python),
            expected="a Python that starts and imports its torch",
            found=said,
            next_command=f"{python} -c 'import torch'",
        ) from error


def _check_torch(found: Interpreter, device: Device, python: Path, again: str) -> None:
    """Upstream's setup.py decides by torch what it builds: for the wrong one it fails late, or builds another thing."""
    has = "ROCm" if found.hip else "CUDA" if found.cuda else "neither"
    wanted = {Device.CUDA: "CUDA", Device.ROCM: "ROCm"}.get(device, has)
    if has == wanted:
        return
    raise PatchesError(
        f"VLLM_TARGET_DEVICE={device.value} needs a torch of that kind, and this interpreter's is another",
        file=str(python),
        expected=f"a torch for {wanted}",
        found=f"torch {found.torch}, for {has}",
        next_command=f"BUILD_PYTHON=/path/to/python {again}    # or leave NO_ISOLATION out: pip then fetches torch",
    )


def pinned_torch(pyproject: str) -> str:
    """The torch that a release's pyproject.toml builds with; empty where it pins none."""
    found = re.search(r'^\s*"torch\s*==\s*([^"\s;]+)', pyproject, re.M)
    return found[1] if found else ""
