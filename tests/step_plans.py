"""Plans of chunk steps without calibration: grids from proved bounds, and from one run in floating point."""

from collections import defaultdict
from functools import cache

import torch

from qinvert import elimination, gated_delta_step
from qinvert.chunk_step.ports import READ_STATE, STATE, carried_tensors, step_sizes
from qinvert.formats import FLOAT32, INT8
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.steps import MOVES

#: What a range that no proof gives is multiplied by.
MARGIN = 1.5
#: What the names of tensors of the value path begin with.
VALUES = ("v", "rhs", "U", "o", "state")
#: What the names of log decays end in.
LOGS = ("g", "g/turned", "D/terms")


def step_inputs(sizes, count=1, chunks=1, seed=0, decay=0.1):
    """Unit keys, scaled queries, values, gates and a state as `step_sizes` orders them: one dict a chunk."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(count, *shape, generator=generator)

    def gate(*shape):
        return torch.rand(count, *shape, generator=generator)

    c, keys, values = sizes.chunk * chunks, sizes.key_size, sizes.value_size
    q, k = (torch.nn.functional.normalize(draw(c, keys), dim=-1) for _ in range(2))
    turn = (lambda x: x.mT) if sizes.values_first else (lambda x: x)
    turn_keys = (lambda x: x.mT) if sizes.keys_first else (lambda x: x)
    g = turn_keys(-decay * gate(c, keys)) if sizes.per_channel else -decay * gate(1, c)
    return {
        "q": turn_keys(q * keys**-0.5),
        "k": turn_keys(k),
        "v": turn(draw(c, values)),
        "beta": turn(gate(c, 1)),
        "g": g,
        "state": turn(0.3 * draw(keys, values)),
    }


def is_log(name):
    """Whether a tensor is a log decay."""
    return name in LOGS or name.endswith("/log")


def formats_of(wide, logs):
    """Return the format of a tensor by its name: ``wide`` for values, ``logs`` for log decays, else int8."""

    def choose(name):
        if is_log(name):
            return logs
        first = name.split("/")[0]
        values = first in VALUES or first in ("v_new", "v_predicted", "v_error")
        return wide if values and name != READ_STATE else INT8

    return choose


def step_plan(
    program,
    requantize=Requantize.MULTIPLIER,
    wide=INT8,
    logs=INT8,
    pow2=False,
    float_state=False,
    **fields,
):
    """Return a plan with the grids of bounds, and elsewhere of ranges with a margin."""
    sizes = step_sizes(program)
    ranges = defaultdict(float)

    def observe(name, value):
        ranges[name] = max(ranges[name], float(value.abs().max()))

    values, state = step_inputs(sizes, 4), None
    for _ in range(4):
        state = program.execute(values, torch.float64, observe)[STATE]
        values = {**values, STATE: state}
    groups = _groups(program)
    bounds = {step.output: step.bound for step in program.steps if step.bound is not None}
    choose, tensors = formats_of(wide, logs), {}
    for group in groups:
        proved = [bounds[name] for name in group if name in bounds]
        limit = max(proved) if proved else MARGIN * max(ranges[name] for name in group)
        formats = {choose(name) for name in group}
        fmt = max(formats, key=lambda f: f.container_bits * f.planes)
        scale = float32(max(limit, 1e-6) / fmt.largest)
        if pow2:
            scale = 2.0 ** torch.tensor(scale).log2().ceil().item()
        tensors |= dict.fromkeys(group, Quantization(format=fmt, scale=scale))
    if float_state:
        tensors |= dict.fromkeys(carried_tensors(program), Quantization(format=FLOAT32, scale=1.0))
    return LayerPlan(program=program, tensors=tensors, requantize=requantize, **fields)


def _groups(program):
    """Tensors that moves connect, and both ends of the state."""
    group = {name: {name} for name in program.tensors}

    def join(first, second):
        union = group[first] | group[second]
        group.update(dict.fromkeys(union, union))

    constants = {constant.name for constant in program.constants}
    for step in program.steps:
        if isinstance(step, MOVES):
            for name in set(step.inputs) - constants:
                join(name, step.output)
    join(STATE, next(port.tensor for port in program.outputs if port.name == STATE))
    return list({id(found): sorted(found) for found in group.values()}.values())


@cache
def small_plan(
    target="int-ops",
    *,
    decay="scalar",
    form="folded",
    values_first=True,
    halves=False,
    error_feedback=False,
    float_state=False,
    **formats,
):
    """A plan of one layer with chunks of 16 tokens, keys of 8 and values of 12."""
    options = {"values_first": values_first, "halves": halves}
    options["error_feedback"] = error_feedback or float_state
    program = gated_delta_step(elimination(8 if halves else 16), 8, 12, decay, form, **options)
    from qinvert.profiles import PROFILES

    profile = PROFILES[target]
    layer = step_plan(program, profile.requantize, float_state=float_state, **formats)
    return Plan(layers={"layer": layer}, target=target)
