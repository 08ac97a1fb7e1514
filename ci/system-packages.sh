#!/usr/bin/env bash
# Install what the tests need and pip cannot give, as far as it is not there yet: ci/system-packages.txt, or the list
# ci/system-packages-NAME.txt. A line is a command, and the package that has it where that is called otherwise.
set -euo pipefail
cd "$(dirname "$0")"

missing=()
while read -r command package; do
    command -v "$command" >/dev/null || missing+=("${package:-$command}")
done <"system-packages${1:+-$1}.txt"
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
echo "installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends "${missing[@]}" >/dev/null
