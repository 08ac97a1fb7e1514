"""conda: the ``source:`` block of a ``recipe.yaml``; paths are relative to the recipe."""

from __future__ import annotations

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import Links, banner


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``conda/source.yaml``; without `links.sdist` the sdist lies beside the recipe."""
    url = links.source(bundle)
    lines = [
        f"# {banner(bundle)}",
        "source:",
        f"  - url: {url}" if url else f"  - path: {bundle.release.sdist}",
        f"    sha256: {bundle.release.sha256}",
        "    patches:",
        *(f"      - patches/{item.name}" for item in bundle.items),
    ]
    return [Asset("conda/source.yaml", ("\n".join(lines) + "\n").encode())]
