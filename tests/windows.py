"""Models driven window by window with simulated steps, for the tests of windows."""

import torch

import qinvert
from qinvert import ChunkOptions
from qinvert.export.deployment.step_calls import SimulatedSteps, layer_steps
from qinvert.export.deployment.window import Window, windowed
from qinvert.export.whole_models.topk_ties import LowestIndexFirst

WIDE = {"target": "npu-qdq-int16", "chunk": ChunkOptions(value_bits=16, state_bits=16)}
CACHE = 256
#: Positions of a deployment whose windows have at most 4 chunks.
POSITIONS = CACHE + 256


def driven(model, plan, tokens, chunks, decoded=0):
    """Logits of all tokens: windows of ``chunks``, and the last ``decoded`` of them one by one."""
    cut = tokens.shape[1] - decoded
    return in_parts(model, plan, [(tokens[:, :cut], chunks), (tokens[:, cut:], None)])


def in_parts(model, plan, parts):
    """Logits of all tokens: a part in windows of so many chunks, or one by one where there are none."""
    found, states = [], None
    for part, count in parts:
        window = Window(model, layer_steps(plan, count, None), SimulatedSteps(), CACHE)
        size = 1 if count is None else count * 64
        with windowed(window, POSITIONS):
            window.probe(size)
            states = states or window.zeros()
            for start in range(0, part.shape[1], size):
                ids = part[:, start : start + size]
                number = ids.shape[1]
                filled = torch.cat([ids, ids.new_zeros(1, size - number)], 1)
                valid = None if count is None else (torch.arange(size) < number).float()[None]
                logits, *after = window(filled, states, valid)
                states = {state.name: x for state, x in zip(window.states, after, strict=True)}
                found.append(logits[:, :number])
    return torch.cat(found, 1), states


def whole(model, plan, tokens):
    with qinvert.patched(model, plan), LowestIndexFirst(), torch.no_grad():
        return model(tokens).logits
