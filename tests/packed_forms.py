"""Formats and a size of packed weights whose candidates are, between them, every kernel for packed weights.
test_choose.py says which kernel is missing."""

import itertools

# (bits, group size, type of scales): types of x and scales that agree, and that do not.
GPTQ = tuple(itertools.product((2, 3, 4, 8), (-1, 32, 64, 128), ("float16", "bfloat16")))
# (block size, whether absmax is quantized too)
FOURBIT = ((32, False), (32, True), (64, False), (64, True), (128, False), (256, True), (512, False))

N, K = 272, 1152
# Columns that a batch of a decode kernel divides: kernels for double quantization want them.
BATCH_K = 512
ROWS = (1, 3, 8, 9, 16, 17, 40, 65, 130)


def columns(size, nested):
    """As near to K as blocks of this size allow."""
    unit = max(size, BATCH_K) if nested else size
    return K // unit * unit
