"""What a runtime is, and what it says of a graph that it ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from qinvert.errors import ExportError
from qinvert.export.runtimes.estimates import CycleEstimate, Request
from qinvert.numerics.law import Rounding

if TYPE_CHECKING:
    import numpy.typing as npt

#: Inputs of one call by name.
Feed: TypeAlias = "Mapping[str, npt.NDArray[Any]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One way in which a runtime compiled a graph and ran it."""

    #: Optimization level, processor or architecture.
    setting: str
    #: Output of every call.
    outputs: Sequence[npt.NDArray[Any]]
    #: Every output by its name, of every call of every sequence, where sequences were run.
    sequences: Sequence[Sequence[Feed]] = ()
    #: Types that each product runs in, ``"int8 x int8"``, by name of the node.
    products: Mapping[str, str] = field(default_factory=dict)
    #: Nodes that the runtime left to another processor than the one it compiled for.
    elsewhere: Sequence[str] = ()
    #: What the compiler says that the graph costs, where a `Request` asked for it.
    estimate: CycleEstimate | None = None
    #: Files that were kept, where a `Request` asked for it, and how to load each.
    kept: Mapping[str, str] = field(default_factory=dict)


#: Yields what each setting of a runtime makes of a serialized model and the feeds.
Execute: TypeAlias = Callable[[bytes, Sequence[Feed]], Iterator[Execution]]
#: The same with a request; without feeds the graph is compiled only, for the chips of the request.
Compile: TypeAlias = Callable[[bytes, Sequence[Feed], Request], Iterator[Execution]]
#: Runs sequences of calls, in which each output that the mapping names is the input that it says of the
#: next call: the runtime's own values, and not copies that somebody has rounded again.
Carry: TypeAlias = Callable[[bytes, "Sequence[Sequence[Feed]]", Mapping[str, str]], Iterator[Execution]]
#: Compiles several graphs in one process, and yields in their order what each gave, or why it is refused.
CompileEach: TypeAlias = Callable[[Sequence[bytes], Request], "Iterator[Sequence[Execution] | ExportError]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A runtime that verification can use."""

    #: Name on the command line.
    name: str
    #: Runs a graph.
    execute: Execute
    #: One line for the table of runtimes.
    summary: str
    #: Module whose import shows that it is installed.
    module: str
    #: What ``pip install`` takes.
    requirement: str
    #: Steps of the output's grid by which any value may differ: 0 where the runtime
    #: computes what ONNX says, more where a processor has a rounding of its own.
    #: `qinvert.export.verification.tolerance` says what else follows from it.
    own_steps: int = 0
    #: Type in which the graph's float32 inputs enter the processor: verification gives it
    #: numbers of that type, so that rounding them is not a difference.
    inputs: str = "float32"
    #: Whether float operators behind the integers run in another order: T may then differ by
    #: float32 rounding, which is smaller than any difference of an integer.
    reorders: bool = False
    #: Whose integers the processor computes, for the plans for which that is known.
    rounding: Rounding = Rounding.ONNX
    #: Runs or compiles a graph and answers a `Request`, for runtimes that can.
    compile: Compile | None = None
    #: The same for several graphs without feeds, for runtimes whose start takes longer than a small graph.
    compile_each: CompileEach | None = None
    #: Runs sequences of calls, for runtimes that can hand a state on.
    carry: Carry | None = None
    #: What each chip is that the runtime estimates cycles for, by the name that callers give.
    hardware: Mapping[str, str] = field(default_factory=dict)
    #: How to load what `Request.keep` leaves, in one sentence; empty where nothing can be kept.
    loading: str = ""

    def __post_init__(self) -> None:
        if self.compile is None and (self.hardware or self.loading):
            raise ExportError(
                f"runtime {self.name!r} estimates or keeps files, but has no compile; give it one"
            )
