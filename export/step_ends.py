"""The ends of a step graph: from what a layer has to the ports of a window of chunks, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qinvert.chunk_step.channel_map import channel_factors, rotation
from qinvert.chunk_step.ports import BETA, KEY, LOG_DECAY, QUERY, STATE, VALUE
from qinvert.export.graph import GraphBuilder, Sizes
from qinvert.export.step_interface import VALID, StepInterface
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.steps import NORM_EPSILON

#: What float tensors of the ends are called after what they are.
NORMALIZED: Final = "{}/normalized"
SCALED: Final = "{}/scaled"
ROTATED: Final = "{}/rotated"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnds:
    """Appends the nodes between the inputs and outputs of a graph and the ports of a window."""

    graph: GraphBuilder
    interface: StepInterface
    #: The integer program between the ends.
    window: QuantizedProgram
    #: What happens to values; None where they pass as they are, or where a host does it.
    channels: ValueChannels | None

    def given(self) -> dict[str, str]:
        """Append what makes the ports of the inputs; return the tensor of every port."""
        valid = None if self.interface.takes_integers else self._valid()
        named = {name: name for name in (QUERY, KEY, VALUE, BETA, LOG_DECAY, STATE)}
        if self.interface.normalize:
            named |= {QUERY: self._scaled(self._normalized(QUERY)), KEY: self._normalized(KEY)}
        if valid is not None:
            named |= {name: self._kept(name, valid) for name in (BETA, LOG_DECAY)}
        if self.channels is not None and not self.interface.takes_integers:
            named |= {name: self._entered(name, self.channels) for name in (VALUE, STATE)}
        shapes = {port.name: self._folded_shape(port.shape[1:]) for port in self.window.program.inputs}
        return {
            name: self._reshaped(tensor, f"{name}/folded", shapes[name]) for name, tensor in named.items()
        }

    def results(self, plan: QuantizedProgram) -> dict[str, str]:
        """What the window is to call its outputs, by port: those of the graph, where nothing follows."""
        wanted = self._outputs(plan)
        shapes = {port.name: self._folded_shape(port.shape[1:]) for port in self.window.program.outputs}
        last = {port: shapes[port] == shape and not self._leaves for port, (_, shape) in wanted.items()}
        return {port: name if last[port] else f"{name}/folded" for port, (name, _) in wanted.items()}

    def returned(self, plan: QuantizedProgram) -> None:
        """Append what makes the outputs of the graph."""
        for port, (name, shape) in self._outputs(plan).items():
            found = self.results(plan)[port]
            if found == name:
                continue
            if not self._leaves:
                self._reshape(found, name, shape)
                continue
            tensor = self._reshaped(found, f"{name}/unfolded", shape)
            self._left(tensor, name)

    def _outputs(self, plan: QuantizedProgram) -> dict[str, tuple[str, Sizes]]:
        """Name and shape of the graph's output that each port of the window becomes."""
        ports = [port.name for port in self.window.program.outputs]
        return dict(zip(ports, self.interface.outputs(plan).items(), strict=True))

    @property
    def _leaves(self) -> bool:
        return self.channels is not None and not self.interface.returns_integers

    def _folded_shape(self, sizes: tuple[int, ...]) -> Sizes:
        return [1, self.interface.batch * self.interface.heads, *sizes]

    def _reshaped(self, tensor: str, name: str, shape: Sizes) -> str:
        return tensor if self.graph.shape(tensor) == shape else self._reshape(tensor, name, shape)

    def _reshape(self, tensor: str, name: str, shape: Sizes) -> str:
        sizes = self.graph.initializer(f"shape/{'x'.join(map(str, shape))}", np.array(shape, dtype=np.int64))
        return self.graph.node("Reshape", [tensor, sizes], name, shape, self.graph.element(tensor))

    def _normalized(self, name: str) -> str:
        """``x / sqrt(sum(x^2) + epsilon)``."""
        graph, shape = self.graph, self.graph.shape(name)
        column: Sizes = [*shape[:3], 1]
        square = graph.node("Mul", [name, name], f"{name}/square", shape)
        axes = graph.initializer("axes/3", np.array([3], dtype=np.int64))
        total = graph.node("ReduceSum", [square, axes], f"{name}/square/sum", column, keepdims=1)
        floored = graph.node(
            "Add", [total, graph.scalar("norm_epsilon", NORM_EPSILON)], f"{name}/square/floored", column
        )
        norm = graph.node("Sqrt", [floored], f"{name}/norm", column)
        return graph.node("Div", [name, norm], NORMALIZED.format(name), shape)

    def _scaled(self, name: str) -> str:
        shape = self.graph.shape(name)
        factor = self.graph.scalar("query_scale", float(np.float32(float(shape[3]) ** -0.5)))
        return self.graph.node("Mul", [name, factor], SCALED.format(QUERY), shape)

    def _valid(self) -> str:
        batch, tokens = self.graph.shape(VALID)
        return self._reshape(VALID, f"{VALID}/heads", [batch, 1, tokens])

    def _kept(self, name: str, valid: str) -> str:
        """Clear the numbers of tokens that do not count."""
        shape = self.graph.shape(name)
        if len(shape) > len(self.graph.shape(valid)):
            valid = self._reshape(valid, f"{VALID}/channels", [*self.graph.shape(valid), 1])
        return self.graph.node("Mul", [name, valid], f"{name}/{VALID}", shape)

    def _entered(self, name: str, channels: ValueChannels) -> str:
        tensor = self._times(name, f"{name}/channels", channels, leaving=False)
        return self._turned(tensor, ROTATED.format(name)) if channels.rotated else tensor

    def _left(self, tensor: str, name: str) -> None:
        assert self.channels is not None
        if self.channels.rotated:
            tensor = self._turned(tensor, f"{name}/turned_back")
        self._times(tensor, name, self.channels, leaving=True)

    def _times(self, tensor: str, name: str, channels: ValueChannels, *, leaving: bool) -> str:
        factors = channel_factors(channels, leaving=leaving)
        sizes = (1, len(factors), -1, 1) if self.interface.values_first else (1, len(factors), 1, -1)
        constant = self.graph.initializer(
            f"channels/{'out' if leaving else 'in'}", factors.reshape(sizes).astype(np.float32)
        )
        return self.graph.node("Mul", [tensor, constant], name, self.graph.shape(tensor))

    def _turned(self, tensor: str, name: str) -> str:
        assert self.channels is not None
        matrix = rotation(self.channels.value_size).astype(np.float32)
        # The matrix is symmetric, so that it turns rows as it turns columns, and back.
        constant = self.graph.initializer("channels/rotation", matrix[None, None])
        operands = [constant, tensor] if self.interface.values_first else [tensor, constant]
        return self.graph.node("MatMul", operands, name, self.graph.shape(tensor))
