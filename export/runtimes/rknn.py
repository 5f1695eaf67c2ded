"""Rockchip NPUs: compiled by rknn-toolkit2, run in its simulator.

The toolkit multiplies the scale of every symmetric tensor by 128/127, in the
compiled file, too, and takes constants at the scale in the graph.  The program
takes that back before it loads the graph; a graph that is compiled without
that has other grids than its plan.
"""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate

#: The simulator's own rounding, and a float16 output: measured on the stress sets under
#: block merges, 0.2 values of a thousand differ by more, none by more than 4.
OWN_STEPS = 2

RUNTIME = separate(
    "rknn",
    summary="Rockchip RK3588, RK3576 and RK3568: compiled, and the toolkit's simulator",
    module="rknn",
    requirement="rknn-toolkit2",
    own_steps=OWN_STEPS,
    # On graphs that it does not like the optimizer never ends.
    seconds=180,
)
