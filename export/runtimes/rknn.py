"""Rockchip NPUs: compiled by rknn-toolkit2, run in its simulator.

The toolkit multiplies the scale of every symmetric tensor by 128/127, also in
the compiled file, except those of constants in Add and Mul.  The program
takes that back before it loads the graph; a graph that is compiled without
that has other grids than its plan.
"""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate

#: int8 products are exact.  Sums of two scales are not, and neither are products that a float
#: addition follows, which run in float16.  On the stress sets no value differs by more than 2.
OWN_STEPS = 2

RUNTIME = separate(
    "rknn",
    summary="Rockchip RK3588, RK3576 and RK3568: compiled, and the toolkit's simulator",
    module="rknn",
    requirement="rknn-toolkit2",
    own_steps=OWN_STEPS,
    # The toolkit takes float32 from the host and hands float16 to the NPU.
    inputs="float16",
    loading="RKNNLite.load_rknn, or rknn_init of the C API, on a board with that chip",
    # On graphs that it does not like the optimizer never ends.
    seconds=180,
)
