"""From one layer's plan of a chunk step to a graph of all its heads."""

from __future__ import annotations

from typing import TypeVar, cast

from qinvert.chunk_step.ports import find_step_sizes
from qinvert.errors import ExportError
from qinvert.export.graph import GraphBuilder
from qinvert.export.interface import AUTO, STEP_OPTIONS, GraphInput, GraphOutput, InputType, Options
from qinvert.export.layer_graph import require
from qinvert.export.lowering import find_lowering
from qinvert.export.step_ends import StepEnds
from qinvert.export.step_interface import Layout, States, StepInterface
from qinvert.hardware import Hardware
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile

T = TypeVar("T")


def is_step(plan: LayerPlan) -> bool:
    """Whether the program of a plan is a whole chunk step."""
    return find_step_sizes(plan.program) is not None


def refuse_step_options(plan: LayerPlan, options: Options) -> None:
    """Refuse options of chunk steps for another program.

    Raises
    ------
    ExportError
        With the option and the program.
    """
    for name in STEP_OPTIONS:
        if options.get(name) is not None:
            raise ExportError(
                f"{name} {options.get(name)!r} is for plans of whole chunk steps, and {plan.program.title} "
                f"is none; leave {name} out"
            )


def step_interface(plan: LayerPlan, options: Options, hardware: Hardware | None = None) -> StepInterface:
    """Return checked options of `qinvert.export` for a chunk step; ``hardware`` decides what chains it has.

    Raises
    ------
    ExportError
        If one of them is not legal, or the number of heads is not known.
    """
    if options.get("input", AUTO) not in (AUTO, GraphInput.PORTS) or options.get("key_size") is not None:
        raise ExportError(
            f"{plan.program.name} is a whole chunk step, which takes q, k, v, beta, g and state; leave out "
            "input and key_size"
        )
    batch, chains, output = (options.get(name, AUTO) for name in ("batch", "chains", "output"))
    heads = _heads(plan, options.get("heads"))
    batch = cast("int", _given(None if batch == AUTO else batch, 1))
    if chains == AUTO:
        chains = 1 if hardware is None else hardware.step_chains(batch * heads)
    interface = StepInterface(
        heads=heads,
        batch=batch,
        chunks=_given(options.get("chunks"), 1),
        layout=cast("Layout", _given(options.get("layout"), Layout.TOKENS_FIRST)),
        normalize=_given(options.get("normalize"), False),
        states=cast("States", _given(options.get("states"), States.LAST)),
        input_type=cast("InputType", options.get("input_type", InputType.FLOAT32)),
        output=cast("GraphOutput", GraphOutput.PORTS if output == AUTO else output),
        chains=cast("int", chains),
    )
    interface.check(plan)
    return interface


def lower_step(plan: LayerPlan, profile: Profile, interface: StepInterface) -> GraphBuilder:
    """Return the graph of one layer under ``profile``; nothing is written.

    Raises
    ------
    ExportError
        If the profile cannot express the plan.
    PlanError
        If the state's input and output have two grids.
    """
    graph = lowered_step(plan, profile, interface)
    for name in interface.outputs(plan):
        graph.output(name)
    return graph


def lowered_step(plan: LayerPlan, profile: Profile, interface: StepInterface) -> GraphBuilder:
    """Return what `lower_step` returns, before tensors are declared to be outputs."""
    window, graph = interface.window(plan), GraphBuilder()
    require(profile, window)
    elements = interface.input_elements(plan, profile)
    for name, shape in interface.inputs(plan).items():
        graph.input(name, shape, elements[name])
    channels = plan.channels
    if channels is not None and channels.changes_nothing:
        channels = None
    ends = StepEnds(graph=graph, interface=interface, window=window, channels=channels)
    given, results = ends.given(), ends.results(plan)
    lowering = find_lowering(profile.lowering)(window, profile, interface.folded(results), graph)
    lowering.run(given, results)
    ends.returned(plan)
    return graph


def _heads(plan: LayerPlan, heads: int | None) -> int:
    found = plan.provenance.get("heads")
    # A plan from elsewhere may hold anything there.
    known = found if type(found) is int else None
    if heads is None and known is None:
        raise ExportError(
            "the plan does not say how many heads its layer has; pass heads, for example heads=16"
        )
    if None not in (heads, known) and heads != known:
        raise ExportError(f"heads {heads!r} are not the {known} of the plan's layer; leave heads out")
    return cast("int", known if heads is None else heads)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
