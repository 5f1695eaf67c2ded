"""What the graph of a whole chunk step takes and returns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from qinvert.checks import check_flag, check_integer, check_member
from qinvert.chunk_step.ports import (
    BETA,
    KEY,
    LOG_DECAY,
    OUTPUT,
    QUERY,
    STATE,
    VALUE,
    StepSizes,
    state_grid,
    step_sizes,
)
from qinvert.chunk_step.window import MAX_CHUNKS, window_plan
from qinvert.errors import ExportError
from qinvert.export.graph import Sizes
from qinvert.export.interface import MAX_BATCH, MAX_ELEMENTS, GraphInput, GraphOutput, InputType, Interface
from qinvert.formats import FLOAT32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.plan.value_channels import MAX_HEADS
from qinvert.profiles import Profile

#: Input that says which tokens count.
VALID: Final = "valid"
#: What the graph calls the state that it returns.
STATE_OUT: Final = "state_out"


class Layout(StrEnum):
    """Order of the last two axes of keys, values and the state."""

    #: ``q, k [.., T, Dk]``, ``v [.., T, Dv]`` and ``state [.., Dk, Dv]``.
    TOKENS_FIRST = "tokens_first"
    #: ``q, k [.., T, Dk]``, ``v [.., Dv, T]`` and ``state [.., Dv, Dk]``.
    VALUES_FIRST = "values_first"
    #: ``q, k [.., Dk, T]``, ``v [.., Dv, T]`` and ``state [.., Dv, Dk]``: NPUs transpose the least.
    CHANNELS_FIRST = "channels_first"


class States(StrEnum):
    """Which states a graph returns."""

    #: The state behind the last chunk, ``state_out``.
    LAST = "last"
    #: Also those behind every other chunk, ``state_1``, ``state_2`` and so on, to cache prefixes.
    EVERY = "every"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedInterface(Interface):
    """The ports of a window of chunks, with batch and heads in one axis, under names of the graph."""

    input: GraphInput = GraphInput.PORTS
    output: GraphOutput = GraphOutput.PORTS
    #: What the graph calls every output port.
    names: Mapping[str, str] = field(default_factory=dict, hash=False)

    def output_names(self, plan: QuantizedProgram) -> dict[str, str]:
        """What the graph calls every output port."""
        # The general ones are asked for all the same: they refuse integers of two planes.
        # No super(): a dataclass with slots is another class than the one whose body this is.
        return {port: self.names.get(port, name) for port, name in Interface.output_names(self, plan).items()}

    def end_names(self, plan: QuantizedProgram) -> set[str]:
        """Names of the graph's ends, those of outputs included that something follows."""
        return Interface.end_names(self, plan) | set(Interface.output_names(self, plan).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInterface:
    """Inputs and outputs of the graph of a chunk step: batch, heads and tokens are axes of their own.

    Raises
    ------
    ExportError
        At construction, for an illegal option.
    """

    heads: int
    batch: int = 1
    #: Chunks of one call.
    chunks: int = 1
    layout: Layout = Layout.TOKENS_FIRST
    #: Whether q and k are raw: the graph gives both norm 1 and scales queries.
    normalize: bool = False
    states: States = States.LAST
    input_type: InputType = InputType.FLOAT32
    output: GraphOutput = GraphOutput.PORTS
    #: Independent parts of batch and heads in one graph.
    chains: int = 1

    def __post_init__(self) -> None:
        for name, most in (("heads", MAX_HEADS), ("batch", MAX_BATCH), ("chunks", MAX_CHUNKS)):
            check_integer(name, getattr(self, name), 1, most, ExportError, "; pass for example 1")
        kinds: tuple[tuple[str, type[StrEnum]], ...] = (
            ("layout", Layout),
            ("states", States),
            ("input_type", InputType),
        )
        for name, kind in kinds:
            object.__setattr__(self, name, check_member(kind, name, getattr(self, name), ExportError))
        if self.output not in (GraphOutput.PORTS, GraphOutput.INTEGERS):
            raise ExportError(f"output {str(self.output)!r} is for inverses; use 'ports' or 'integers'")
        check_flag("normalize", self.normalize, ExportError)
        object.__setattr__(self, "output", GraphOutput(self.output))
        if self.normalize and self.takes_integers:
            raise ExportError(
                "normalize=True needs keys in float, but input_type is 'integers'; let the host do it"
            )
        # This checks the chains.
        self.folded()

    @property
    def takes_integers(self) -> bool:
        """Whether inputs are integers on the grids of the plan."""
        return self.input_type is InputType.INTEGERS

    @property
    def returns_integers(self) -> bool:
        """Whether outputs are integers on the grids of the plan."""
        return self.output is GraphOutput.INTEGERS

    @property
    def hands_on(self) -> bool:
        """Whether the state that one call returns is what the next call takes."""
        return self.takes_integers == self.returns_integers

    @property
    def values_first(self) -> bool:
        """Whether v, o and the state hold values before tokens and keys."""
        return self.layout is not Layout.TOKENS_FIRST

    @property
    def keys_first(self) -> bool:
        """Whether q, k, and g of channels hold channels before tokens."""
        return self.layout is Layout.CHANNELS_FIRST

    def token_axis(self, name: str, plan: QuantizedProgram) -> int:
        """Axis of the tokens in an input or in o."""
        if name == VALID:
            return 1
        turned = self.keys_first if name in step_sizes(plan.program).key_ports else False
        turned = self.values_first if name in (VALUE, OUTPUT) else turned
        return 3 if turned else 2

    def tokens(self, plan: QuantizedProgram) -> int:
        """Tokens of one call."""
        return self.chunks * plan.chunk

    def window(self, plan: QuantizedProgram) -> QuantizedProgram:
        """Return the program of one call and one head.

        Raises
        ------
        PlanError
            If the state has two grids.
        """
        every = self.states is States.EVERY
        return window_plan(
            plan, self.chunks, values_first=self.values_first, keys_first=self.keys_first, every_state=every
        )

    def folded(self, names: Mapping[str, str] | None = None) -> FoldedInterface:
        """Return what the integer program inside takes and returns."""
        return FoldedInterface(
            batch=self.batch * self.heads,
            input_type=self.input_type,
            output=self.output,
            chains=self.chains,
            names=names or {},
        )

    def check(self, plan: LayerPlan) -> None:
        """Refuse a plan with channels that do not fit, or a call that is too large.

        Raises
        ------
        ExportError
            With both numbers.
        """
        sizes, channels = step_sizes(plan.program), plan.channels
        if channels is not None and channels.heads not in (1, self.heads):
            raise ExportError(
                f"heads {self.heads} does not fit the plan, whose value channels are those of "
                f"{channels.heads} heads; pass heads={channels.heads}"
            )
        if channels is not None and channels.value_size != sizes.value_size:
            raise ExportError(
                f"the plan has {channels.value_size} value channels, but its program {sizes.value_size}; "
                "calibrate again"
            )
        widest = max(sizes.key_size, sizes.value_size)
        if self.batch * self.heads * max(self.tokens(plan), sizes.key_size) * widest > MAX_ELEMENTS:
            raise ExportError(
                f"{self.batch} x {self.heads} heads of {self.tokens(plan)} tokens exceed {MAX_ELEMENTS:,} "
                "elements; choose a smaller batch or fewer chunks"
            )

    def inputs(self, plan: QuantizedProgram) -> dict[str, Sizes]:
        """Shape of every input by its name, in order."""
        sizes, front = step_sizes(plan.program), [self.batch, self.heads]
        tokens: Sizes = [*front, self.tokens(plan)]
        last = [self.tokens(plan), sizes.key_size]
        keys: Sizes = [*front, *(reversed(last) if self.keys_first else last)]
        found: dict[str, Sizes] = {
            QUERY: keys,
            KEY: keys,
            VALUE: self._values(self.tokens(plan), sizes),
            BETA: tokens,
            LOG_DECAY: keys if sizes.per_channel else tokens,
        }
        if not self.takes_integers:
            found[VALID] = [self.batch, self.tokens(plan)]
        return {**found, STATE: self._values(sizes.key_size, sizes)}

    def outputs(self, plan: QuantizedProgram) -> dict[str, Sizes]:
        """Shape of every output by its name, in order."""
        sizes = step_sizes(plan.program)
        state = self._values(sizes.key_size, sizes)
        earlier = range(1, self.chunks) if self.states is States.EVERY else ()
        between = {f"{STATE}_{i}": state for i in earlier}
        return {OUTPUT: self._values(self.tokens(plan), sizes), **between, STATE_OUT: state}

    def _values(self, rows: int, sizes: StepSizes) -> Sizes:
        last = [sizes.value_size, rows] if self.values_first else [rows, sizes.value_size]
        return [self.batch, self.heads, *last]

    def input_elements(self, plan: QuantizedProgram, profile: Profile) -> dict[str, str]:
        """NumPy name of the type of every input."""
        names = self.inputs(plan)
        if not self.takes_integers:
            return dict.fromkeys(names, "float32")
        return {name: profile.end_of(plan.tensors[name].format).element for name in names}

    def elements(self, plan: QuantizedProgram, profile: Profile) -> dict[str, str]:
        """NumPy name of the type of every output."""
        grids = {name: plan.tensors[self.tensor_of(plan, name)] for name in self.outputs(plan)}
        return {
            name: profile.end_of(grid.format).element if self.returns_integers else "float32"
            for name, grid in grids.items()
        }

    @staticmethod
    def tensor_of(plan: QuantizedProgram, output: str) -> str:
        """Tensor of the chunk step that an output of the graph holds."""
        tensors = {port.name: port.tensor for port in plan.program.outputs}
        return tensors[OUTPUT if output == OUTPUT else STATE]

    def grid_of(self, plan: QuantizedProgram, output: str) -> Quantization:
        """Grid of an output of the graph, whose steps measure differences; see `state_grid` for a float32."""
        grid = plan.tensors[self.tensor_of(plan, output)]
        return state_grid(plan) if grid.format.is_float else grid

    def metadata(self, plan: LayerPlan, profile: Profile) -> Mapping[str, str]:
        """Return everything that a host needs to drive the graph."""
        sizes = step_sizes(plan.program)
        found = {
            "input": str(GraphInput.PORTS),
            "output": str(self.output),
            "input_type": str(self.input_type),
            "batch": str(self.batch),
            "heads": str(self.heads),
            "chunk": str(sizes.chunk),
            "chunks": str(self.chunks),
            "key_size": str(sizes.key_size),
            "value_size": str(sizes.value_size),
            "decay": "channel" if sizes.per_channel else "scalar",
            "layout": str(self.layout),
            "states": str(self.states),
            "normalize": str(self.normalize).lower(),
            "state_input": STATE,
            "state_output": STATE_OUT,
            **({"chains": str(self.chains)} if self.chains > 1 else {}),
            **self._grids(plan, profile),
            **self._channels(plan),
        }
        return {f"qinvert.{key}": value for key, value in found.items()}

    def _grids(self, plan: LayerPlan, profile: Profile) -> dict[str, str]:
        ends: dict[str, Quantization] = {}
        if self.takes_integers:
            ends |= {f"input_{{}}/{name}": plan.tensors[name] for name in self.inputs(plan)}
        if self.returns_integers:
            names = self.outputs(plan)
            ends |= {f"output_{{}}/{name}": plan.tensors[self.tensor_of(plan, name)] for name in names}
        found = {"state_type": FLOAT32.element} if plan.tensors[STATE].format.is_float else {}
        for key, grid in ends.items():
            if grid.format.is_float:
                continue
            found[key.format("scale")] = repr(grid.scale)
            found[key.format("zero_point")] = str(profile.end_of(grid.format).zero_point)
        return found

    def _channels(self, plan: LayerPlan) -> dict[str, str]:
        channels = plan.channels
        if channels is None or channels.changes_nothing:
            return {}
        by_host = self.takes_integers or self.returns_integers
        return {
            "value_exponents": json.dumps([list(row) for row in channels.exponents]),
            "value_rotation": "hadamard" if channels.rotated else "none",
            "value_channels": f"v' = (v 2^-e) R, S' = (S 2^-e) R, o = (o' R^T) 2^e, "
            f"by the {'host where ends are integers' if by_host else 'graph'}",
        }
