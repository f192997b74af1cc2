"""Small C++ kernels for CPU ranks, compiled at first use into a shared library with a plain C interface."""
