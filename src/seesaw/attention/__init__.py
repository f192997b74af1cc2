"""Attention over the paged pool, behind one small protocol: native kernels for CPU ranks, pure torch."""
