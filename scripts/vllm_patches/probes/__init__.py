"""What a vLLM source tree holds of each fix, hunk by hunk, read from its code.

One module per fix. `probe` answers for a tree; `PATHS` are the only files it may ask for, so a caller can
pull just these out of an sdist. No probe guesses: code in a form that it does not know is a `ProbeError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import dsa_mtp_ima, gdn_null_block_guard, mla_flat_buffer, mrv2_wake_up, rocm_kv_strides
from .base import STATES, Finding, ProbeError, ReadFile, Site, agrees

__all__ = [
    "PARTS",
    "PATHS",
    "PROBES",
    "STATES",
    "Finding",
    "ProbeError",
    "ReadFile",
    "Site",
    "agrees",
    "probe",
]

_MODULES = (dsa_mtp_ima, gdn_null_block_guard, mla_flat_buffer, rocm_kv_strides, mrv2_wake_up)

# One probe per fix: a caller that wants the other fixes in spite of a ProbeError calls these one by one.
PROBES: Mapping[str, Callable[[ReadFile], tuple[Site, ...]]] = {module.FIX: module.probe for module in _MODULES}
PARTS: Mapping[str, tuple[str, ...]] = {module.FIX: module.PARTS for module in _MODULES}
PATHS: tuple[str, ...] = tuple(dict.fromkeys(path for module in _MODULES for path in module.PATHS))


def probe(read: ReadFile) -> tuple[Site, ...]:
    """The sites of all fixes in the tree that *read* reads, in the order of `PARTS`."""
    return tuple(site for one in PROBES.values() for site in one(read))
