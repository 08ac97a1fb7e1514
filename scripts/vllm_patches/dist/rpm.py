"""RPM: ``Patch`` lines to be included in a spec file. Numbers ascend in the order of application."""

from __future__ import annotations

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import Links, banner


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``rpm/vllm-patches.inc``, for ``%include``; with `links.base` the patches' names are their addresses."""
    lines = [f"# {banner(bundle)}"]
    if not bundle.mails:
        lines.append("# not for -S git_am: a patch of the other series has no mail header")
    lines += [f"Patch{item.number:04}: {links.patch(bundle, item) or item.name}" for item in bundle.items]
    return [Asset("rpm/vllm-patches.inc", ("\n".join(lines) + "\n").encode())]
