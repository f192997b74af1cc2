"""How tensors are handed to native functions."""

from __future__ import annotations

import ctypes

from torch import Tensor


class TensorPointer:
    """The type of an argument that is the address of a tensor's first element, or null for None.

    Functions that take tensors, and not their addresses, can be recorded (`native.program`).
    """

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p:
        """What ctypes passes."""
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
