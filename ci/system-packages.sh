#!/usr/bin/env bash
# Install what the tests need and pip cannot give: the words of ci/system-packages.txt that are not there yet.
set -euo pipefail
cd "$(dirname "$0")"

missing=()
while read -r package; do
    command -v "$package" >/dev/null || missing+=("$package")
done <system-packages.txt
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
echo "installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq "${missing[@]}" >/dev/null
