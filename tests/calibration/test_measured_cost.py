"""A compiler's costs decide among the best candidates."""

import math

import pytest

import qinvert
from qinvert.calibration.planning.costs import Compiled
from qinvert.errors import ExportError
from qinvert.export.exporting import build
from qinvert.stress import stress_matrices

LOWER = stress_matrices("correlated_keys", 8, 16)


def planned(measure=None):
    return qinvert.calibrate(LOWER, hardware="hexagon-v81", batch=4, measure=measure)


def candidates(plan):
    return plan.layer().provenance["candidates"]


def test_the_compiler_decides_against_the_table():
    asked = []

    def backwards(layer, target, batch):
        asked.append(layer.program.title)
        # The cheaper by the table, the dearer here.
        return Compiled(cost=1000.0 - len(asked), chains=2)

    plan, other = planned(backwards), planned()
    assert len(asked) > 1
    assert plan.layer().program.title == asked[-1] != other.layer().program.title == asked[0]
    assert plan.layer().provenance["compiled_cost"] == 1000 - len(asked)
    assert sum("compiled_cost" in row for row in candidates(plan)) == len(asked)
    assert not any("compiled_cost" in row for row in candidates(other))


def test_chains_are_those_that_the_compiler_liked():
    plan = planned(lambda *_: Compiled(cost=1.0, chains=2))
    entries = {entry.key: entry.value for entry in build(plan, batch=4).metadata_props}
    assert entries["qinvert.chains"] == "2"


def test_a_graph_that_the_compiler_refuses_is_not_chosen():
    first = planned().layer().program.title

    def refuses_the_first(layer, target, batch):
        return Compiled(cost=math.inf if layer.program.title == first else 5.0, chains=1)

    plan = planned(refuses_the_first)
    assert plan.layer().program.title != first
    (refused,) = [row for row in candidates(plan) if row["program"] == first]
    assert refused["compiled_cost"] is None


def test_it_is_told_the_target_and_the_batch():
    told = set()

    def listens(layer, target, batch):
        told.add((target, batch))
        return Compiled(cost=1.0, chains=1)

    plan = planned(listens)
    assert told == {(plan.target, 4)} == {("hexagon-uint8", 4)}


@pytest.mark.parametrize(
    ("name", "said"), [("abacus", "unknown hardware 'abacus'"), ("hexagon-v81", "pip install")]
)
def test_what_cannot_compile_says_so_before_the_work(name, said, monkeypatch):
    monkeypatch.setattr("qinvert.export.compiled_cost.installed", list)
    with pytest.raises(ExportError, match=said):
        qinvert.compiled_cost(name)


def test_a_plan_is_compiled_whole_and_in_chains_between_integer_ends(monkeypatch):
    cycles = {"1": 70, "4": 50}
    seen = []

    def estimate(content, hardware):
        import onnx

        model = onnx.load_from_string(content)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        seen.append((entries["qinvert.input_type"], entries["qinvert.output"], hardware))
        return type("Estimate", (), {"cycles": cycles[entries.get("qinvert.chains", "1")]})

    monkeypatch.setattr("qinvert.export.compiled_cost.installed", lambda: ["qnn"])
    monkeypatch.setattr("qinvert.export.compiled_cost.estimate", estimate)
    plan = planned()
    found = qinvert.compiled_cost("hexagon-v81")(plan.layer(), plan.target, 4)
    assert found == Compiled(cost=50, chains=4)
    assert set(seen) == {("integers", "integers", "hexagon-v81")}


def test_a_refusal_of_the_compiler_is_an_infinite_cost(monkeypatch):
    def refuses(content, hardware):
        raise ExportError("no")

    monkeypatch.setattr("qinvert.export.compiled_cost.installed", lambda: ["qnn"])
    monkeypatch.setattr("qinvert.export.compiled_cost.estimate", refuses)
    plan = planned()
    assert qinvert.compiled_cost("hexagon-v81")(plan.layer(), plan.target, 4).cost == math.inf
