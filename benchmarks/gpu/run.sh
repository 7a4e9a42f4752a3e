#!/usr/bin/env bash
# Kernel tests, then all benchmarks, on a machine with a GPU; needs no network.
#
#     benchmarks/gpu/run.sh [FOLDER]      # writes gpu.json, report.md and plots to FOLDER (default: gpu-results)
#
# Needs torch with triton and transformers 5.17 or newer, and installs nothing into the environment. Wheels in a folder
# `wheels` beside this script (mamba-ssm, causal-conv1d, einops, a newer transformers) go to a temporary folder.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
ln -s "$(cd "$here/../.." && pwd)" "$site/mmmamba"
if compgen -G "$here/wheels/*.whl" > /dev/null; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$here"/wheels/*.whl
fi
PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" python3 -m mmmamba.benchmarks.gpu.run "$@"
