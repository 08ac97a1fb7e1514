"""Upstream's files: the package index, the cache, sdists, and the pristine contents of what series touch."""
