"""The operations as Triton kernels, for CUDA and ROCm. Importing this imports Triton."""

from kernels.jit.triton_ops import TritonLinear, TritonOps

__all__ = ["TritonLinear", "TritonOps"]
