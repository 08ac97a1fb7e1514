"""Upstream's own full build of a patched tree."""
