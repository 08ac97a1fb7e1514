#!/usr/bin/env bash
# Record how large the downloads of each requirements file are, for the Makefile to say before it starts.
set -euo pipefail
cd "$(dirname "$0")"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for requirements in requirements-*.txt; do
    python3 -m pip download --quiet -c constraints.txt -r "$requirements" -d "$scratch/$requirements" >&2
    size=$(du -bs --apparent-size "$scratch/$requirements" | cut -f1)
    echo "$requirements $((size / 1000000)) MB in $(ls "$scratch/$requirements" | wc -l) files"
done >download-sizes.txt
cat download-sizes.txt
