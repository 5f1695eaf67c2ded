"""Fused Triton kernels: one load of L and one store of T per matrix.

`solve_tril` is the public entrance.  It has the layout and the arguments of
flash-linear-attention, so that it also replaces that library's function of the
same name.  ``LayerPlan.inverse``, ``qinvert.simulate`` and ``qinvert.patched``
use the kernels for CUDA tensors without being asked; they enter through
`qinvert.kernels.dispatch.fused_inverse`.  Importing this package does not import
Triton.
"""

from qinvert.kernels.dispatch import solve_tril as solve_tril
from qinvert.kernels.float_ops import Precision as Precision

__all__ = ["Precision", "solve_tril"]
