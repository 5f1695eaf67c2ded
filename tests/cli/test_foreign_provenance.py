"""Plans may hold any JSON object as their provenance: no verb may stumble over one."""

from dataclasses import replace

import pytest
from click.testing import CliRunner
from step_plans import small_plan

import qinvert
from qinvert.cli.app import cli
from qinvert.plan.plan import Plan
from qinvert.stress import stress_matrices

#: What JSON has, in the place of what calibration writes.
VALUES = (None, True, -1, 2**62, 1e308, "", "x" * 5000, "\x1b[2J", "a\0b", [], [[]], [{}], {}, {"a": [0]})
#: What verbs read of plans, and of their layers.
KEYS = (
    "hardware",
    "batch",
    "heads",
    "chains",
    "source",
    "model",
    "cost_unit",
    "candidates",
    "margins",
    "channels",
)


@pytest.fixture(scope="module")
def plans():
    lower = stress_matrices("correlated_keys", 2, 4)
    inverse = qinvert.calibrate(lower, method="elimination", bits=8, min_sqnr_db=0)
    return {"inverse": inverse, "step": small_plan("npu-qdq-int8")}


@pytest.mark.parametrize("kind", ["inverse", "step"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_no_verb_stumbles_over_a_foreign_provenance(plans, kind, value, tmp_path):
    plan, facts = plans[kind], dict.fromkeys(KEYS, value)
    name = next(iter(plan.layers))
    # The chip is known in one plan, so that the chains of its layer are asked for.
    for hardware in (value, "hexagon-v73"):
        layer = replace(plan.layer(), provenance=facts)
        own = facts | {"hardware": hardware, "batch": 8}
        Plan(layers={name: layer}, target=plan.target, provenance=own).save(tmp_path / "plan.json")
        for verb in (
            ("inspect",),
            ("inspect", "--json"),
            ("export", "-o", tmp_path / "graphs"),
            ("simulate",),
        ):
            done = CliRunner().invoke(cli, [verb[0], str(tmp_path / "plan.json"), *map(str, verb[1:])])
            assert done.exit_code in (0, 2), (verb, done.output, done.exception)
            assert done.exit_code == 0 or len(done.stderr.splitlines()) == 1
            assert "\x1b" not in done.output
