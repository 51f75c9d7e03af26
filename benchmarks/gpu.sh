#!/bin/sh
# What one GPU can tell in under nine minutes: benchmarks/gpu.sh OUT [--parts NAME ...]
# OUT gets a JSON file for each part as it ends, and summary.md at the end.
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: benchmarks/gpu.sh OUT [--size tiny] [--parts NAME ...]}
shift
PYTHONPATH=. exec "${PYTHON:-python3}" benchmarks/gpu.py "$out" "$@"
