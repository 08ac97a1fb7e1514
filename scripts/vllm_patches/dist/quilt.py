"""The patch files and their series: a quilt folder, ready to be ``debian/patches``; the other channels refer to it."""

from __future__ import annotations

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import Links

FOLDER = "patches"


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``patches/series`` and the patches (`links` plays no part)."""
    series = "".join(f"{item.name}\n" for item in bundle.items).encode()
    return [Asset(f"{FOLDER}/series", series), *(Asset(f"{FOLDER}/{item.name}", item.raw) for item in bundle.items)]
