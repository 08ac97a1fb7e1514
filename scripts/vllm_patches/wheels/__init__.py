"""Patched wheels from official ones: the container, its RECORD, what a wheel says of itself, the compiled part."""
