"""Spack: ``patch`` directives for the body of a package's class, in the order in which Spack applies them."""

from __future__ import annotations

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import Links, banner
from vllm_patches.hashing import sha256


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``spack/patches.py``; without `links.base` the files lie below the package, so that releases do not collide."""
    version = bundle.release.version
    lines = [f"    # {banner(bundle)}"]
    for item in bundle.items:
        lines += [
            "    patch(",
            f'        "{links.patch(bundle, item) or f"vllm-patches/{version}/{item.name}"}",',
            f'        sha256="{sha256(item.raw)}",',
            f'        when="@{version}",',
            "    )",
        ]
    return [Asset("spack/patches.py", ("\n".join(lines) + "\n").encode())]
