"""Addresses that only the publisher of the assets knows."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_patches import __version__
from vllm_patches.dist.bundle import Bundle, Item
from vllm_patches.errors import PatchesError


@dataclass(frozen=True)
class Links:
    """Where the assets and the sdists can be fetched; empty: they lie beside the recipe.

    *base* is the address of the assets' top folder, *sdist* a template with ``{version}`` in it.
    """

    base: str = ""
    sdist: str = ""

    def __post_init__(self) -> None:
        for option, value in (("--base-url", self.base), ("--sdist-url", self.sdist)):
            if value and ("://" not in value or any(c.isspace() or c in "'\"`$\\" for c in value)):
                raise PatchesError(
                    "not an address that every channel can carry",
                    expected=f"{option} SCHEME://HOST/PATH without blanks, quotes and dollar signs",
                    found=value,
                    next_command=f"vllm-patches dist {option} https://example.invalid/vllm-patches",
                )

    def patch(self, bundle: Bundle, item: Item) -> str:
        """The address of a patch; empty where there is none."""
        return f"{self.base.rstrip('/')}/{bundle.release.version}/patches/{item.name}" if self.base else ""

    def source(self, bundle: Bundle) -> str:
        """The address of the sdist; empty where there is none."""
        return self.sdist.replace("{version}", bundle.release.version)


def banner(bundle: Bundle) -> str:
    """The one line that says what a file belongs to."""
    return f"vLLM {bundle.release.version} + vllm-patches {__version__} = {bundle.version}"
