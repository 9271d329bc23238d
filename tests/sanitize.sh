#!/bin/sh
# Runs tests on the extension built with AddressSanitizer and UndefinedBehaviorSanitizer: memory errors and undefined
# behaviour of the host's C end the run with a report. Arguments go to pytest; without any, all tests that are not slow.
#
#   sh tests/sanitize.sh                          from the repository's root, in an environment that has the test extra
#   sh tests/sanitize.sh tests/test_tensors.py -x
#   UBSAN_OPTIONS=halt_on_error=0 sh tests/sanitize.sh     goes on after undefined behaviour, to see all of it
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/sanitize
python=$(command -v python)

# NumPy's and Python's headers are those of this environment.
cmake -S "$root" -B "$build" -DPython_EXECUTABLE="$python" -DQLINEAR_SANITIZE=ON \
    -DQLINEAR_WERROR=ON -DQLINEAR_CUDA=off >/dev/null
cmake --build "$build" --parallel "${QLINEAR_JOBS:-2}"

# A package of this extension and the tree's Python files, before any installed one on the path.
rm -rf "$build/site"
mkdir -p "$build/site"
cp -r "$root/python/qlinear" "$build/site/"
cp "$build/_qlinear.abi3.so" "$build/site/qlinear/"

# The runtime must be the first library of the process, which is an interpreter that was built without it. Python's
# allocator would hide overflows inside its arenas. Leaks are another test's subject: the interpreter itself leaks.
# Freed memory stays in quarantine here, so tests that measure memory say nothing; the engine's C test has a sanitized
# build of its own. What compiles, trains adapters, runs transformers or starts processes would take minutes and reaches
# no C of its own.
[ $# -gt 0 ] || set -- --ignore tests/test_leaks.py --ignore tests/test_build.py --ignore tests/test_cuda_build.py \
    --ignore tests/test_demo.py --ignore tests/test_cpu_engine_c.py --ignore tests/test_cuda_launch_c.py \
    --ignore tests/test_torch_machinery.py --ignore tests/test_peft.py --ignore tests/test_fsdp.py \
    --ignore tests/test_hf.py --ignore tests/test_checkpoint_memory.py
cd "$root"
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    PYTHONPATH="$build/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1:allocator_may_return_null=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:${UBSAN_OPTIONS:-} \
    "$python" -m pytest -p no:cacheprovider --capture=sys "$@"
