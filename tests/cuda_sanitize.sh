#!/bin/sh
# Runs every kernel on small shapes under compute-sanitizer's four tools; any finding ends the run with its report.
#
#   sh tests/cuda_sanitize.sh               in an environment that has the package, torch and a GPU
#   sh tests/cuda_sanitize.sh racecheck     one tool
set -eu
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
# Each tensor in an allocation of its own, so that a byte beyond it is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "$@"; do
    echo "$tool"
    compute-sanitizer --tool "$tool" --kernel-regex kns=ql_ --error-exitcode 1 --print-limit 20 \
        "${PYTHON:-python3}" cuda_small.py
done
