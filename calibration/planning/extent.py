"""Whether any grid can hold what a layer's inverses reach."""

from __future__ import annotations

from typing import Final

from qinvert.errors import InputError
from qinvert.numerics.scales import MAX_SCALE
from qinvert.systems import Systems

#: Largest magnitude of L and T that grids are planned for: that of a legal scale.  Keys of unit
#: length keep both below 2.
MAX_EXTENT: Final = MAX_SCALE


def check_extent(layer: str, sample: Systems) -> None:
    """Refuse matrices whose inverse no grid can hold, before candidates are compared.

    Raises
    ------
    InputError
        With the layer and the largest magnitude.
    """
    for name, values in (("L", sample.lower), ("T", sample.inverse())):
        largest = float(values.abs().max()) if values.numel() else 0.0
        # NaN fails: the exact solve overflows.
        if not largest <= MAX_EXTENT:
            raise InputError(
                f"layer {layer!r}: {name} reaches {largest:.3g}, but scales end at {MAX_SCALE:g}; unit keys "
                "and beta of at most 2 keep T small: normalize the keys, or look for a fault upstream"
            )
