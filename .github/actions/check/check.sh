#!/usr/bin/env bash
# What the composite action runs: the report as text for the log, as JSON for the output, and its exit status.
set -euo pipefail
PYTHONPATH=$(cd "$(dirname "$0")/../../.." && pwd)/scripts
export PYTHONPATH

options=(--tree "$TREE")
[ -z "${PIN:-}" ] || options+=(--pin "$PIN")
[ "${STRICT:-false}" != true ] || options+=(--strict)

status=0
"${PYTHON:-python3}" -m vllm_patches check "${options[@]}" || status=$?
if [ -n "${GITHUB_OUTPUT:-}" ]; then
    {
        echo "report<<END_OF_REPORT"
        "${PYTHON:-python3}" -m vllm_patches check "${options[@]}" --json || true
        echo "END_OF_REPORT"
    } >>"$GITHUB_OUTPUT"
fi
exit "$status"
