"""Fewer transposes of one program, with the same integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from qinvert.program.inlining import renamed
from qinvert.program.steps import Multiply, Step, Transpose


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortened:
    """Steps without transposes of transposes."""

    steps: tuple[Step, ...]
    #: Tensors that are new, each with the tensor that it is the transpose of.
    added: dict[str, str] = field(default_factory=dict)


def without_double_transposes(steps: Sequence[Step], outputs: Collection[str]) -> Shortened:
    """``(x^T)^T = x`` and ``(x^T * y)^T = x * y^T``: steps that move nothing there and back.

    Transposes move integers and round nothing, so that all remaining tensors keep their integers.
    Compilers move transposes over elementwise operators until two of them meet, and leave operators
    behind that no integer kernel takes.

    Parameters
    ----------
    steps : sequence of Step
        In an order in which they can run.
    outputs : collection of str
        Tensors that must stay.
    """
    sources: dict[str, str] = {}
    products: dict[str, Multiply] = {}
    names, added, found = dict[str, str](), dict[str, str](), list[Step]()
    written = {step.output for step in steps}
    reads = Counter(name for step in steps for name in step.inputs)
    for given in steps:
        step = renamed(given, lambda name: names.get(name, name))
        if isinstance(step, Transpose) and step.source in sources and step.output not in outputs:
            names[step.output] = sources[step.source]
            continue
        if isinstance(step, Transpose) and step.source in products and reads[step.source] == 1:
            product = products[step.source]
            turned = f"{product.right}/turned"
            if turned not in added:
                added[turned] = product.right
                found.append(Transpose(output=turned, source=product.right))
            found.append(replace(product, output=step.output, left=sources[product.left], right=turned))
            continue
        if isinstance(step, Transpose):
            sources[step.output] = step.source
        # Constants have no grid that a transposed one could take over.
        if isinstance(step, Multiply) and step.left in sources and step.right in written:
            products[step.output] = step
        found.append(step)
    return Shortened(steps=_read(found, outputs), added=added)


def _read(steps: Sequence[Step], outputs: Collection[str]) -> tuple[Step, ...]:
    """Return the steps but for moved tensors that nothing reads any more."""
    wanted, kept = set(outputs), list[Step]()
    for step in reversed(steps):
        if step.output in wanted or not isinstance(step, (Transpose, Multiply)):
            kept.append(step)
            wanted.update(step.inputs)
    return tuple(reversed(kept))
