"""Arch's PKGBUILD: ``source`` and ``sha256sums``, and a ``prepare()`` that applies the patches."""

from __future__ import annotations

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import Links, banner
from vllm_patches.hashing import sha256


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``aur/PKGBUILD.part``; a file that has an address is renamed by makepkg's ``NAME::ADDRESS``."""
    release = bundle.release
    sources = [_source(release.sdist, links.source(bundle))]
    sources += [_source(item.name, links.patch(bundle, item)) for item in bundle.items]
    sums = [release.sha256, *(sha256(item.raw) for item in bundle.items)]
    text = f"""\
# {banner(bundle)}
source=({_array(sources)})
sha256sums=({_array(sums)})

prepare() {{
  cd "vllm-{release.version}"
  local name
  for name in {" ".join(item.name for item in bundle.items)}; do
    patch -Np1 -F0 -i "$srcdir/$name"
  done
}}
"""
    return [Asset("aur/PKGBUILD.part", text.encode())]


def _source(name: str, address: str) -> str:
    return f"{name}::{address}" if address else name


def _array(words: list[str]) -> str:
    return "\n        ".join(f"'{word}'" for word in words)
