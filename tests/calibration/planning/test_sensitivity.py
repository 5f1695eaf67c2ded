import pytest
import torch

from qinvert.calibration.observation.ranges import RangeObserver
from qinvert.calibration.planning.sensitivity import LayerGrids, measure_sensitivities, measure_together
from qinvert.formats import INT8, INT8X2, INT16
from qinvert.methods import block_merge, elimination
from qinvert.numerics.scales import float32
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

FORMATS = (INT8, INT8X2, INT16)


def layer_of(program, name, count, seed):
    """Grids that cover what a stress set holds, once per format."""
    systems = Systems(lower=stress_matrices(name, count, 16, seed=seed))
    observer = RangeObserver(program)
    observer.update({"M": -systems.lower})
    grids = [
        {
            tensor: Quantization(format=fmt, scale=float32(max(largest, 1e-3) / fmt.largest))
            for tensor, largest in observer.ranges.items()
        }
        for fmt in FORMATS
    ]
    return LayerGrids(
        grids=grids,
        sample=systems,
        truth=systems.inverse(),
        requantize={fmt.name: Requantize.DIVIDE for fmt in FORMATS},
    )


@pytest.mark.parametrize("program", [block_merge(16, 2), elimination(16)], ids=lambda p: p.title)
def test_layers_together_have_the_noise_of_each_alone(program):
    # Repeated keys leave residues of zero, which are rounded by noise of a stream of their own.
    names = ("correlated_keys", "repeated_keys", "half_random", "correlated_keys")
    layers = [layer_of(program, name, 12, seed) for seed, name in enumerate(names)]
    assert len(measure_together(program, layers, at_once=6)) == 4
    for layer, found in zip(layers, measure_together(program, layers, at_once=6), strict=True):
        alone = measure_sensitivities(program, layer.grids, layer.sample)
        assert found.signal == alone.signal
        assert found.noise == pytest.approx(alone.noise, rel=1e-9, abs=1e-25)
        assert found.rounding == pytest.approx(alone.rounding, rel=1e-9, abs=1e-25)
        assert found.coherence == pytest.approx(alone.coherence, rel=1e-9)


def test_a_layer_with_coarser_grids_has_more_noise_than_its_neighbour():
    program = block_merge(16, 2)
    fine, coarse = (layer_of(program, "correlated_keys", 8, 0) for _ in range(2))
    grids = [
        {name: Quantization(format=g.format, scale=4 * g.scale) for name, g in grid.items()}
        for grid in coarse.grids
    ]
    coarse = LayerGrids(grids=grids, sample=coarse.sample, truth=coarse.truth, requantize=coarse.requantize)
    first, second = measure_together(program, [fine, coarse])
    assert second.noise[second.output, "int8"] > 4 * first.noise[first.output, "int8"]


def test_a_run_is_the_same_every_time():
    program = elimination(16)
    layers = [layer_of(program, "correlated_keys", 8, seed) for seed in (0, 1)]
    first, again = (measure_together(program, layers) for _ in range(2))
    assert [found.noise for found in first] == [found.noise for found in again]
    assert not torch.equal(layers[0].sample.lower, layers[1].sample.lower)
