"""Shapes of products with 8-bit weights and activations that between them reach every kernel on a GPU of 132
multiprocessors: (K, N, rows). test_cuda_w8a8_driver.py says which kernel is missing."""

# Each tile of outputs is summed by one block, or by the members of a cluster.
WHOLE = (
    (128, 72, 1),
    (512, 72, 9),
    (128, 264, 20),
    (4096, 144, 8),
    (14336, 144, 3),
    (2048, 144, 9),
    (128, 6144, 70),
    (128, 6144, 129),
    (128, 6144, 300),
    (4096, 2064, 33),
    (4096, 8208, 70),
    (512, 8208, 600),
    (128, 2064, 4096),
    (8192, 1032, 256),
    (8192, 2064, 256),
)
# Blocks share tiles, and their sums meet in scratch.
SHARED = (
    (128, 17000, 9),
    (128, 17000, 33),
    (128, 17000, 70),
    (128, 17000, 512),
    (1024, 17000, 300),
    (4096, 17000, 129),
)
