import torch

import qinvert
from qinvert.calibration.matrix_sample import OF_ENTRY, MatrixSample
from qinvert.stress import stress_matrices
from qinvert.systems import Systems


def test_both_halves_of_a_sample_have_every_head_and_chunk():
    # 8 sequences, 2 heads and 8 chunks: every 8th matrix is of the same chunk, and heads alternate.
    scale = torch.arange(1, 17).view(2, 8, 1, 1) / 100
    lower = torch.tril(torch.ones(8, 2, 8, 8, 8), -1) * scale
    plan = qinvert.calibrate(stress_matrices("correlated_keys", 2, 8))
    sample = MatrixSample(plan)
    for _ in range(OF_ENTRY):
        sample.update("layer", Systems(lower=lower))
    (systems,) = sample.systems.values()
    values = (100 * systems.lower[:, 1, 0]).round().int()
    for half in (values[::2], values[1::2]):
        assert len(set((half > 8).tolist())) == 2
        assert len(set((half % 8).tolist())) > 4
    again = MatrixSample(plan)
    again.update("layer", Systems(lower=lower))
    assert torch.equal(next(iter(again.systems.values())).lower, systems.lower[:16])
