#!/usr/bin/env bash
# All of benchmarks/gpu.py in under six minutes on one H100 or H200: benchmarks/gpu.sh [its arguments]
# Needs what is installed beside torch there, and no network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
