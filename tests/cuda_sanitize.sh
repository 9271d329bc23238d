#!/bin/sh
# Runs every kernel on small shapes under compute-sanitizer's four tools; any finding ends the run with its report. In an
# environment that has the package, torch and a GPU; about four minutes.
#
#   sh tests/cuda_sanitize.sh               all tools
#   sh tests/cuda_sanitize.sh racecheck     one of them
#
# initcheck sees no product that blocks share: they meet by marks in scratch, which holds anything before. It watches
# torch's kernels too, as it must see them write what is read.
# racecheck does not see wgmma's kernels and decode: it does not know that what a warp writes before __syncwarp is ordered
# by the one lane that then arrives on an mbarrier, and reports it.
# synccheck does not see decode and wgmma's kernels for 8-bit activations: it takes a barrier for wrong that warps come to
# by different instructions, which PTX allows.
set -eu
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
# Each tensor in an allocation of its own, so that a byte beyond it is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "$@"; do
    echo "$tool"
    kernels="--kernel-name kns=ql_"
    own=
    case $tool in
    racecheck) own="--engines mma --rows 8" ;;
    initcheck) kernels= own=--unsplit ;;
    # Each stage of each block is a barrier to keep track of.
    synccheck) kernels="$kernels --num-cuda-barriers 65536" own="--engines wgmma mma --rows 8" ;;
    esac
    # shellcheck disable=SC2086
    compute-sanitizer --tool "$tool" $kernels --error-exitcode 1 --print-limit 20 \
        "${PYTHON:-python3}" cuda_small.py $own
done
