"""A model as a function of a window of tokens and all states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from qinvert.calibration.patching import delta_layers, redirected
from qinvert.chunk_step.ports import BETA, KEY, LOG_DECAY, QUERY, STATE, VALUE
from qinvert.errors import ExportError
from qinvert.export.deployment.attention import tabled_rotations, window_attention, window_mask
from qinvert.export.deployment.cache import WindowCache
from qinvert.export.deployment.indexers import by_layer_kind, indexers, window_indexers
from qinvert.export.deployment.states import State, StateKind, Traffic
from qinvert.export.deployment.step_calls import LayerStep, StepCalls
from qinvert.export.step_interface import VALID
from qinvert.export.whole_models.export_model import plain_experts
from qinvert.export.whole_models.tracing import without_autocast


class Window(torch.nn.Module):
    """``(input_ids [1, T], valid [1, T], states) -> (logits [1, T, V], states)``; T is fixed.

    Tokens that count come first: n ones, then zeros.  Without ``valid`` all count.
    """

    def __init__(
        self, model: torch.nn.Module, steps: Mapping[str, LayerStep], calls: StepCalls, cache: int
    ) -> None:
        super().__init__()
        self.model = model
        #: States in the order of inputs and outputs; `probe` finds them.
        self.states: tuple[State, ...] = ()
        self.steps, self.calls, self.cache = steps, calls, cache
        #: Number of every delta-rule layer in the model.
        self._numbers = {
            n: getattr(m, "layer_idx", i) for i, (n, m) in enumerate(delta_layers(model).items())
        }
        self._traffic = Traffic(cache=cache)
        self._valid: torch.Tensor | None = None
        self._sparse = any(True for _ in indexers(model))
        self._earlier = torch.ones(1, 1, 1, 1, dtype=torch.float32)

    def forward(
        self, input_ids: torch.Tensor, states: dict[str, torch.Tensor], valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the logits and every state."""
        self._traffic = Traffic(cache=self.cache, given=states)
        logits = self._logits(input_ids, valid)
        return logits, *(self._traffic.returned[state.name] for state in self.states)

    def probe(self, tokens: int) -> None:
        """Find the states of the model by a call on zeros."""
        self._traffic = Traffic(cache=self.cache)
        self._earlier = torch.ones(1, 1, tokens, tokens, dtype=torch.float32).tril()
        with torch.no_grad():
            self._logits(torch.zeros(1, tokens, dtype=torch.int64), None)
        found = self._traffic.found
        attends = any(state.kind is StateKind.KEYS for state in found.values())
        shared = (StateKind.VISIBLE, StateKind.POSITION)
        self.states = tuple(state for state in found.values() if attends or state.kind not in shared)

    def zeros(self) -> dict[str, torch.Tensor]:
        """All states before the first token."""
        return {state.name: state.zeros() for state in self.states}

    def _logits(self, input_ids: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        traffic, tokens = self._traffic, input_ids.shape[1]
        self._valid = valid
        counted = torch.ones(1, tokens, dtype=torch.float32) if valid is None else valid
        mask = self._mask(traffic, counted)
        first = torch.zeros(1, dtype=torch.int32)
        if traffic.given is None or StateKind.POSITION in traffic.given:
            first = traffic.take(StateKind.POSITION, (1,), None)
            traffic.give(StateKind.POSITION, first + counted.sum(1).to(torch.int32), None)
        positions = (torch.arange(tokens, dtype=torch.int32) + first)[None]
        result = self.model(
            input_ids=input_ids,
            attention_mask=by_layer_kind(mask) if self._sparse else mask,
            position_ids=positions,
            past_key_values=WindowCache(traffic, valid, first, positions),
            use_cache=True,
        )
        logits: torch.Tensor = result.logits
        return logits

    def _mask(self, traffic: Traffic, valid: torch.Tensor) -> torch.Tensor:
        tokens = valid.shape[1]
        row = valid[:, None, None]
        if traffic.given is not None and StateKind.VISIBLE not in traffic.given:
            return torch.zeros(1, 1, tokens, tokens, dtype=torch.float32)
        visible = traffic.take(StateKind.VISIBLE, (1, 1, 1, self.cache), None)
        traffic.give(StateKind.VISIBLE, torch.cat([visible, row], 3)[..., tokens:], None)
        return window_mask(visible, row, self._earlier)

    def rule(self, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """What the layer of that name calls, see `qinvert.chunk_gated_delta_rule`."""
        return partial(self._delta_rule, name)

    def _delta_rule(
        self,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step, layer = self.steps[name], self._numbers[name]
        if not use_qk_l2norm_in_kernel:
            raise ExportError(
                f"layer {name} takes keys that are normalized before; deploy cannot express that"
            )
        tokens, heads = value.shape[1:3]
        state = self._traffic.take(StateKind.RECURRENT, step.state_shape, layer)
        given = {QUERY: _repeated(query, heads), KEY: _repeated(key, heads), VALUE: value}
        given |= {BETA: beta, LOG_DECAY: g}
        inputs = {name: _filled(self._laid(step, name, x), step, name) for name, x in given.items()}
        out, after = self.calls(step, inputs | {VALID: self._counted(tokens, step.tokens), STATE: state})
        self._traffic.give(StateKind.RECURRENT, after, layer)
        if step.interface.values_first:
            return out[..., :tokens].permute(0, 3, 1, 2), after
        return out[:, :, :tokens].transpose(1, 2), after

    @staticmethod
    def _laid(step: LayerStep, name: str, x: torch.Tensor) -> torch.Tensor:
        """``[1, T, H, ..]`` in the layout of a step: heads before tokens, channels before or behind them."""
        if x.ndim == 3:
            return _turned(x)
        last = step.interface.token_axis(name, step.plan) == 3
        return x.permute(0, 2, 3, 1) if last else x.transpose(1, 2)

    def _counted(self, tokens: int, whole: int) -> torch.Tensor:
        if self._valid is not None:
            return self._valid
        return (torch.arange(whole) < tokens).to(torch.float32)[None]


def _turned(x: torch.Tensor) -> torch.Tensor:
    """``[1, T, H] -> [1, H, T]`` by a transpose of four axes.

    After one of three axes Qualcomm's compiler (onnxruntime-qnn 2.7.0) takes up to 3.7 times the cycles for
    the whole prefill graph of the recall model, as it simulates them.
    """
    tokens, heads = x.shape[1:]
    return x.reshape(1, 1, tokens, heads).transpose(2, 3).reshape(1, heads, tokens)


def _filled(x: torch.Tensor, step: LayerStep, name: str) -> torch.Tensor:
    """Append zeros up to the tokens of a step."""
    axis = step.interface.token_axis(name, step.plan) if x.ndim == 4 else 2
    missing = step.tokens - x.shape[axis]
    if not missing:
        return x
    return torch.cat([x, torch.zeros(*x.shape[:axis], missing, *x.shape[axis + 1 :], dtype=x.dtype)], axis)


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat the heads of queries and keys for the values that share them."""
    shared = heads // x.shape[2]
    return x if shared == 1 else torch.index_select(x, 2, torch.arange(heads) // shared)


@contextmanager
def windowed(window: Window, positions: int) -> Iterator[Window]:
    """Have the model of a window call its steps and caches, inside a ``with`` block.

    Raises
    ------
    InputError
        If the model has no delta-rule layer, or is patched.
    """
    model = window.model
    with (
        plain_experts(model),
        window_attention(model),
        tabled_rotations(model, positions),
        window_indexers(model, positions),
        redirected(model, window.rule),
        without_autocast(model),
        torch.no_grad(),
    ):
        yield window
