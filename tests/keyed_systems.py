"""Hypothesis strategy of L as models make it: keys of unit length, beta and decays."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays


@st.composite
def keyed(draw, chunk):
    """L and beta of one matrix, both float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    own = rng.normal(size=(chunk, draw(st.integers(1, 5))))
    keys = rng.normal(size=own.shape[1]) + draw(st.sampled_from([0.0, 0.1, 10.0])) * own
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    beta = draw(arrays(np.float64, chunk, elements=st.floats(0, draw(st.sampled_from([0.3, 1.0, 2.0])))))
    decay = np.cumsum(draw(arrays(np.float64, chunk, elements=st.floats(-3, 0))))
    gates = np.exp(np.minimum(decay[:, None] - decay, 0))
    return torch.from_numpy(np.tril(beta[:, None] * (keys @ keys.T) * gates, -1)), torch.from_numpy(beta)
