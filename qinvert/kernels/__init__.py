"""Fused Triton kernels: one load of L and one store of T per matrix.

`solve_tril` is the one entrance.  ``LayerPlan.inverse``, ``qinvert.simulate``
and ``qinvert.patched`` go through it for CUDA tensors by themselves; with
flash-linear-attention's layout and arguments it also replaces that library's
function of the same name.  Importing this package does not import Triton.
"""

from qinvert.kernels.dispatch import solve_tril as solve_tril
from qinvert.kernels.float_ops import Precision as Precision

__all__ = ["Precision", "solve_tril"]
