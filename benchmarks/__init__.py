"""Measurements of qlinear's layers beside torch's and other libraries' (`python -m benchmarks cpu`)."""
