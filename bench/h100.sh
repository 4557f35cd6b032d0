#!/usr/bin/env bash
# Measures this engine on one H100 in under 8 minutes: Llama-3.1-8B's shape with random bfloat16 weights.
#
#     KVASIR_WHEELS=FOLDER bench/h100.sh [--out FOLDER] [--dry]
#
# It needs CUDA 13 with nvcc and ninja (FlashInfer compiles its kernels at first use), PyTorch 2.11 or newer, and no
# package registry: what `python3` lacks is installed from the wheels in KVASIR_WHEELS, without their requirements,
# into a folder of its own. To an image with what bench/gpu/image.txt names in it, flashinfer-python, apache-tvm-ffi
# and what bench/gpu/packages.txt names add enough; a test compares the two lists with what the engine imports.
#
# Without FlashInfer's wheel the torch backend is measured, and the table says so. --dry runs all of it on a CPU with a
# tiny model, to show that it works; its figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
if [ -n "${KVASIR_WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$KVASIR_WHEELS"/*.whl
fi
export PYTHONPATH="$site:$PWD/engine:$PWD/operator:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

"$python" -m bench.h100 "$@"
