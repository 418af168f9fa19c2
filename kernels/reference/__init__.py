"""Plain torch: the definition that the other paths are held against, and the fallback."""

from kernels.reference.torch_ops import TorchLinear, TorchOps

__all__ = ["TorchLinear", "TorchOps"]
