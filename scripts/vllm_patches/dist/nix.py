"""Nix: the patches as a list of paths, and as a list of fetches with SRI hashes.

fetchurl and not fetchpatch: fetchpatch rewrites what it fetched with its own version of patchutils before it compares
the hash, so its hash depends on that version. Our patches' bytes never move, which is what fetchurl is for.
"""

from __future__ import annotations

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import Links, banner
from vllm_patches.hashing import sri


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``nix/patches.nix`` and ``nix/fetched.nix``."""
    local = [f"  ../patches/{item.name}" for item in bundle.items]
    default = f' ? "{links.base.rstrip("/")}"' if links.base else ""
    fetched = [line for item in bundle.items for line in _fetch(bundle, item.name, item.raw)]
    return [
        Asset("nix/patches.nix", _text([f"# {banner(bundle)}", "[", *local, "]"])),
        Asset(
            "nix/fetched.nix", _text([f"# {banner(bundle)}", f"{{ fetchurl, baseUrl{default} }}:", "[", *fetched, "]"])
        ),
    ]


def _fetch(bundle: Bundle, name: str, raw: bytes) -> list[str]:
    return [
        "  (fetchurl {",
        f'    name = "{name}";',
        f'    url = "${{baseUrl}}/{bundle.release.version}/patches/{name}";',
        f'    hash = "{sri(raw)}";',
        "  })",
    ]


def _text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()
