"""The two ways in which packagers write a sha256."""

from __future__ import annotations

import base64
import hashlib


def sha256(data: bytes) -> str:
    """64 hex digits, as in SHA256SUMS, conda, Spack and PKGBUILD."""
    return hashlib.sha256(data).hexdigest()


def sri(data: bytes) -> str:
    """``sha256-`` and base64, as Nix and browsers write it (W3C Subresource Integrity)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(data).digest()).decode()
