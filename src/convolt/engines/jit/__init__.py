"""The compiled engine for CPUs: Numba and LLVM."""
