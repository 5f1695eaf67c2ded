"""A layer of chunk steps without a model: what the planner takes, from random keys, values and gates."""

from dataclasses import replace
from functools import cache

import torch

from qinvert import elimination, gated_delta_step, residuals_as_sums
from qinvert.calibration.choices import RangeRule, ScaleRule
from qinvert.calibration.chunk_steps.candidate import Layer, StepRules, exact_outputs
from qinvert.calibration.chunk_steps.grids import RoomRules
from qinvert.calibration.chunk_steps.observation import ChunkObserver
from qinvert.calibration.chunk_steps.planner import StepChoices
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.formats import INT8, INT16
from qinvert.plan.quantization import Requantize

C, KEYS, VALUES, HEADS = 16, 8, 8, 3


def random_chunks(seed=0, *, batch=2, heads=HEADS, number=4, channel=False, outlier=1.0, decay=0.1, top=1.0):
    """Chunks of one layer; ``outlier`` multiplies the first channel of values."""
    generator = torch.Generator().manual_seed(seed)
    front = (batch, heads, number, C)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def gate(*shape):
        return torch.rand(*shape, generator=generator)

    q, k = (torch.nn.functional.normalize(draw(*front, KEYS), dim=-1) for _ in range(2))
    factors = torch.tensor([outlier, *(1.0,) * (VALUES - 1)])
    return DeltaChunks(
        q=q * KEYS**-0.5,
        k=k,
        v=draw(*front, VALUES) * factors,
        g=-decay * gate(*front, *((KEYS,) if channel else ())),
        beta=top * gate(*front),
        state=torch.zeros(batch, heads, KEYS, VALUES),
    )


def step_program(decay="scalar", form="folded", **options):
    """A program of a step for `random_chunks`, its residual terms as sums."""
    half = options.get("halves", False)
    inverse = residuals_as_sums(elimination(C // 2 if half else C))
    return gated_delta_step(inverse, KEYS, VALUES, decay, form, **options)


RULES = StepRules(
    narrow=INT8,
    wide=INT16,
    equal_widths=True,
    scales=ScaleRule.FLOAT,
    requantize=Requantize.MULTIPLIER,
    room=RoomRules(),
)
CHOICES = StepChoices(
    min_sqnr_db=20.0,
    widens=True,
    all_wide=False,
    value_bits="auto",
    state_bits="auto",
    reads_narrow=False,
    equalize=False,
    rotated=False,
    ranges=(RangeRule.MAX,),
)


def observed(program, *passes, rotated=False):
    """Statistics of some forward passes."""
    observer = ChunkObserver(program, rotated=rotated)
    for chunks in passes:
        observer.update(chunks, sampled=True)
    return observer.observed()


@cache
def small_layer(decay="scalar", form="folded", outlier=1.0, **options):
    """What the planner knows of a layer of `random_chunks`."""
    program = step_program(decay, form, **options)
    chunks = random_chunks(channel=decay == "channel", outlier=outlier)
    return layer_of(program, chunks)


def layer_of(program, chunks, rules=RULES):
    """What the planner knows of one pass of chunks."""
    return Layer(
        program=program,
        observed=observed(program, chunks),
        widths=width_groups(program),
        rules=rules,
        max_beta=1.0,
        truth=exact_outputs(chunks),
    )


def with_room(margin):
    """Rules with another margin of the state."""
    return replace(RULES, room=RoomRules(state_margin=margin))
