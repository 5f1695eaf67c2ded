from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from qinvert.errors import PlanError
from qinvert.formats import (
    FLOAT32,
    FORMATS,
    INT4,
    INT8,
    INT8X2,
    INT16,
    INT16_WHOLE,
    UINT8,
    UINT16,
    IntFormat,
    find_format,
)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (INT8, np.int8),
        (UINT8, np.uint8),
        (INT16, np.int16),
        (INT16_WHOLE, np.int16),
        (UINT16, np.uint16),
    ],
)
def test_native_formats_span_their_numpy_type(fmt, dtype):
    assert (fmt.minimum, fmt.maximum) == (np.iinfo(dtype).min, np.iinfo(dtype).max)
    assert fmt.container_bits == np.iinfo(dtype).bits


@pytest.mark.parametrize(
    ("fmt", "largest", "magnitude"),
    [
        (INT4, 7, 7),
        (INT8, 127, 128),
        (UINT8, 127, 128),
        (INT16, 32767, 32768),
        (UINT16, 32767, 32768),
        (INT8X2, 32639, 32896),
    ],
    ids=str,
)
def test_a_range_maps_onto_the_shorter_side_and_saturation_reaches_the_longer(fmt, largest, magnitude):
    assert (fmt.largest, fmt.magnitude) == (largest, magnitude)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_the_container_is_named_as_onnx_and_numpy_name_it(fmt):
    limits = np.iinfo(fmt.element)
    assert limits.bits == fmt.container_bits
    assert (limits.min == 0) == (fmt in (UINT8, UINT16))


def test_int4_is_symmetric_in_an_int8_container():
    assert (INT4.minimum, INT4.maximum, INT4.container_bits) == (-7, 7, 8)


@pytest.mark.parametrize(("unsigned", "signed"), [(UINT8, INT8), (UINT16, INT16)], ids=str)
def test_unsigned_formats_hold_the_real_values_of_signed_ones(unsigned, signed):
    values = [q - unsigned.zero_point for q in range(unsigned.minimum, unsigned.maximum + 1)]
    assert values == list(range(signed.minimum, signed.maximum + 1))


def test_the_whole_form_of_int16_differs_in_nothing_but_how_it_is_multiplied():
    assert replace(INT16_WHOLE, name="int16", whole=False) == INT16
    assert [fmt.name for fmt in FORMATS.values() if fmt.whole] == ["int16-whole"]


def test_wide_formats_are_split_unless_they_are_whole():
    assert [fmt.name for fmt in FORMATS.values() if fmt.is_wide] == ["int16", "int16-whole", "uint16"]
    assert [fmt.name for fmt in FORMATS.values() if fmt.is_split] == ["int16", "uint16"]
    # Two planes of 8 bits are narrow: each is an operand as it is.
    assert not INT8X2.is_wide


def test_only_int8x2_has_two_planes_and_only_unsigned_formats_a_zero_point():
    assert [f.name for f in FORMATS.values() if f.planes != 1] == ["int8x2"]
    assert [f.name for f in FORMATS.values() if f.zero_point] == ["uint8", "uint16"]


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_found_by_the_name_it_prints(name):
    assert str(find_format(name)) == name


@pytest.mark.parametrize("name", ["int7", "INT8", "", None, 8, ["int8"], {}])
def test_an_unknown_name_lists_the_legal_ones(name):
    with pytest.raises(
        PlanError, match=r"unknown format.*int4, int8, uint8, int16, int16-whole, uint16, int8x2"
    ):
        find_format(name)


@pytest.mark.parametrize("zero_point", [-8, 8, 1000])
def test_a_zero_point_outside_the_grid_is_refused(zero_point):
    with pytest.raises(PlanError, match=r"odd: zero point .* outside \[-7, 7\]"):
        IntFormat(name="odd", container_bits=8, minimum=-7, maximum=7, zero_point=zero_point)


@pytest.mark.parametrize(("minimum", "maximum"), [(-128, 128), (-129, 127), (0, 256), (-(2**15), 2**15)])
def test_a_grid_wider_than_its_container_is_refused(minimum, maximum):
    with pytest.raises(PlanError, match=r"wide: .* does not fit 8 bits; use a wider container"):
        IntFormat(name="wide", container_bits=8, minimum=minimum, maximum=maximum)


def test_the_widest_grid_that_fits_its_container_is_taken():
    assert IntFormat(name="full", container_bits=8, minimum=-127, maximum=128).magnitude == 128


def test_formats_are_frozen():
    with pytest.raises(FrozenInstanceError):
        INT8.maximum = 126


def test_float32_is_found_and_is_no_integer_format():
    assert find_format("float32") is FLOAT32
    assert FLOAT32.name not in FORMATS
    assert (FLOAT32.element, FLOAT32.bytes, FLOAT32.is_split) == ("float32", 4, False)
    assert np.float32(FLOAT32.maximum) == np.finfo(np.float32).max
