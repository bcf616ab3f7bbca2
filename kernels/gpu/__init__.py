"""The sparse layer and its routing as Triton kernels, for NVIDIA GPUs from Ampere on (docs/kernels.md)."""

from moesaic.kernels.gpu.experts import sparse_ffn
from moesaic.kernels.gpu.routing import MAX_EXPERTS, route

__all__ = ["MAX_EXPERTS", "route", "sparse_ffn"]
