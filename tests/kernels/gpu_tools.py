"""Where the Triton kernels are tested: on a GPU, or on the CPU in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def teach_the_interpreter_bfloat16() -> None:
    """The interpreter multiplies the raw bits of bfloat16 operands (triton issue 11584) and cuts digits off where a GPU
    rounds to nearest even: widen operands first, and round as a GPU does."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return plain_dot(self, widen(a), widen(b), *rest)

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, to: Any) -> TensorHandle:
        if to.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return plain_cast(self, source, to)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


if knobs.runtime.interpret:
    teach_the_interpreter_bfloat16()
