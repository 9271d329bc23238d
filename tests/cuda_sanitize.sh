#!/bin/sh
# Runs every kernel on small shapes under compute-sanitizer's four tools; any finding ends the run with its report. In an
# environment that has the package, torch and a GPU; a few minutes.
#
#   sh tests/cuda_sanitize.sh               all tools
#   sh tests/cuda_sanitize.sh racecheck     one of them
#
# initcheck watches torch's kernels too, as it must see them write what is read. Products that blocks share meet by marks in
# scratch, which holds anything before: those run with scratch that was written first. What decode does not take of fp32
# scales goes to what the rules choose, which may be shared: decode is not asked for there.
# racecheck does not see wgmma's kernels for 8-bit activations, nor for a table's codes those of 256 tokens and those that make
# nested absmax: it does not know that what a warp writes before __syncwarp is ordered by the one lane that then arrives on an
# mbarrier, and reports it.
# Nor does it see integers' of 16 tokens, whose sets of warps meet at a barrier where one of them only arrives, and those of 256,
# where what other blocks left of a tile comes by a bulk copy: it does not know that what was read before an arrival is ordered
# by it, nor that a bulk copy is by the mbarrier that it completes on.
# Products with 8-bit activations run on the kernels of GPUs without wgmma there.
# shellcheck disable=SC2086
set -eu
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
# Each tensor in an allocation of its own, so that a byte beyond it is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
exact="gptq2-g64 gptq3-g128 gptq4-g128 gptq4-g48-bf16 gptq4-order awq-g64 gptq2-g32 gptq3-g32 gptq4-g32"
wide="gptq4-g32-fp32"
bytes="gptq8-one gptq8-g128 gptq8-g32 eetq fp4-b32"
nested="nf4 nf4-b32"
sixteen="ql_wgmma_int?_*_16*"
parts="ql_wgmma_int?_*_256*"

# One of a tool's parts, which run side by side: its name, then what cuda_small.py takes.
part() {
    (
        name=$1
        shift
        compute-sanitizer --tool "$tool" $options --error-exitcode 1 --print-limit 20 \
            "${PYTHON:-python3}" cuda_small.py "$@" >"$reports/$name" 2>&1 || touch "$reports/failed"
    ) &
}

for tool in "$@"; do
    options="--kernel-name kns=ql_"
    case $tool in
    memcheck)
        part packed --subjects packed --formats $exact $wide
        part bytes --subjects packed --formats $bytes $nested
        part w8a8 --subjects w8a8
        part quantize --subjects quantize
        ;;
    racecheck)
        part packed --subjects packed --once --formats $exact $wide --skip "$sixteen" "$parts"
        part bytes --subjects packed --once --formats $bytes --skip "$sixteen" "$parts" "ql_wgmma_table4_*_256*"
        part nested --subjects packed --once --engines decode mma --formats $nested
        export QLINEAR_KERNELS=mma
        part w8a8 --subjects w8a8 --once --most 100000000
        unset QLINEAR_KERNELS
        part quantize --subjects quantize
        ;;
    initcheck)
        options=
        part packed --subjects packed --once --unchecked --unsplit --formats $exact
        part wide --subjects packed --once --unchecked --unsplit --engines wgmma mma --formats $wide
        part bytes --subjects packed --once --unchecked --unsplit --formats $bytes $nested
        part w8a8 --subjects w8a8 --once --unchecked --unsplit
        part quantize --subjects quantize
        part filled --subjects packed w8a8 --once --unchecked --filled --formats gptq4-g128 eetq nf4
        ;;
    synccheck)
        # Each stage of each block is a barrier to keep track of.
        options="$options --num-cuda-barriers 65536"
        part packed --subjects packed --once --formats $exact $wide
        part bytes --subjects packed --once --formats $bytes $nested
        part w8a8 --subjects w8a8 --once
        part quantize --subjects quantize
        ;;
    esac
    wait
    for report in "$reports"/*; do
        [ "$report" = "$reports/failed" ] || printf '%s %s: %s\n' "$tool" "${report##*/}" "$(tail -n 1 "$report")"
    done
    if [ -e "$reports/failed" ]; then
        cat "$reports"/*
        exit 1
    fi
    rm "$reports"/*
done
