"""Options of whole steps that do not exist or do not go together: one line each, before the model runs."""

import pytest
import torch
from tiny_models import VOCABULARY, build, of_layers

import qinvert
from qinvert import ChunkOptions, elimination, gated_delta_step
from qinvert.errors import InputError, PlanError, ProgramError

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(0, VOCABULARY, (1, 70), generator=torch.Generator().manual_seed(0))


class Silent(torch.nn.Module):
    """A model that must not run."""

    def forward(self, **_):
        raise AssertionError("the model ran")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "uw"}, "form 'uw' is unknown; use state, wy or folded"),
        ({"form": 1}, "form 1 is unknown"),
        ({"form": "wy", "halves": True}, "halves applies T to one tensor, but form 'wy' has two"),
        ({"value_bits": 12}, "value_bits 12 is unknown; use auto, 8 or 16"),
        ({"value_bits": True}, "value_bits True is unknown"),
        ({"state_bits": "16"}, "state_bits '16' is unknown; use auto, 8, 16 or float32"),
        ({"value_bits": "float32"}, "value_bits 'float32' is unknown; use auto, 8 or 16"),
        ({"error_feedback": True, "state_bits": "float32"}, "a state in float32 loses nothing"),
        ({"state_margin": 0.5}, "state_margin 0.5 is below 1; pass at least 1, such as 4"),
        ({"state_margin": "wide"}, "state_margin 'wide' is not a number"),
        ({"state_margin": float("nan")}, "state_margin nan is not a number"),
        ({"error_feedback": True, "state_bits": 8}, "does not go with state_bits=8; leave one of them out"),
        ({"error_feedback": 1}, "error_feedback 1 is neither True nor False"),
        ({"int4": "T"}, r"int4 'T' is no tuple of names; pass those of tensors, such as \('D', 'T'\)"),
        ({"int4": ("T", 4)}, "is no tuple of names"),
        ({"rotate": True, "equalize": True}, "rotate mixes the channels that equalize scales"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, words):
    with pytest.raises(PlanError, match=words) as error:
        ChunkOptions(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scope": "layer"}, "scope 'layer' is unknown; use inverse or chunk"),
        ({"scope": "inverse", "chunk": ChunkOptions()}, "goes with scope='chunk'; leave it out"),
        ({"factored": True}, "factored goes with scope='inverse'; leave it out with scope='chunk'"),
        ({"checkpoint": "c.npz"}, "checkpoint goes with scope='inverse'"),
        ({"max_loss_db": 1.0}, "max_loss_db goes with scope='inverse'"),
        ({"measure": print}, "measure goes with scope='inverse'"),
        ({"chunk": {"form": "wy"}}, r"chunk is a dict; pass chunk=qinvert.ChunkOptions\(...\)"),
        ({"bits": 12}, "bits"),
        ({"bits": 4, "chunk": ChunkOptions(value_bits=8)}, "value_bits=8 does not go with bits=4"),
        ({"bits": 16, "chunk": ChunkOptions(state_bits=8)}, "state_bits=8 does not go with bits=16"),
        ({"bits": 8, "chunk": ChunkOptions(value_bits=16)}, "no format of more than 8 bits.*npu-qdq-int16"),
        (
            {"bits": 16, "chunk": ChunkOptions(error_feedback=True)},
            "error_feedback=True does not go with bits=16",
        ),
        (
            {"target": "npu-qdq-int8", "chunk": ChunkOptions(error_feedback=True)},
            "no format of more than 8 bits.*npu-qdq-int16",
        ),
        (
            {"target": "hexagon-uint16", "chunk": ChunkOptions(state_bits="float32")},
            "'hexagon-uint16' has no float32 between integers for a state; choose target='npu-qdq-int16'",
        ),
        (
            {"target": "npu-qdq-int16", "chunk": ChunkOptions(int4=("T",))},
            "'npu-qdq-int16' does not take 4 and 8 bits side by side; choose one of int-ops, int-ops-x86",
        ),
        (
            {"target": "npu-qdq-int4", "chunk": ChunkOptions(int4=("T",))},
            r"int4=\('T',\) does not go with bits=auto",
        ),
        ({"granularity": "row"}, "granularity 'row' is unknown"),
        ({"ranges": "most"}, "ranges 'most' is unknown"),
        ({"min_sqnr_db": "much"}, "min_sqnr_db"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_the_model_runs(changes, words):
    with pytest.raises(PlanError, match=words) as error:
        qinvert.calibrate(Silent(), TOKENS, **{"scope": "chunk"} | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [torch.zeros(2, 8, 8), {"a": torch.zeros(2, 8, 8)}, "L.npz", Silent()])
def test_matrices_and_models_without_data_are_refused(source):
    with pytest.raises(InputError, match="scope='chunk' plans the layers of a model: pass a model and data"):
        qinvert.calibrate(source, scope="chunk")


@pytest.fixture(scope="module")
def model():
    return build("qwen3_5", **of_layers("linear_attention", "full_attention"))


STEP = {"key_size": 16, "value_size": 16}


@pytest.mark.parametrize(
    ("method", "kind", "words"),
    [
        (elimination(32), ProgramError, "for 32 x 32 matrices, but the step needs 64 x 64"),
        (gated_delta_step(elimination(32), **STEP), InputError, r"the program is for \(32, 16, 16, False\)"),
        (
            gated_delta_step(elimination(64), **STEP, decay="channel"),
            InputError,
            r"= \(64, 16, 16, False\), but the program is for \(64, 16, 16, True\)",
        ),
        (qinvert.block_merge(64, factored=True), ProgramError, "does not map M to S"),
        ("blockmerge", ProgramError, "blockmerge"),
    ],
)
def test_programs_for_other_layers_are_refused(model, method, kind, words):
    with pytest.raises(kind, match=words) as error:
        qinvert.calibrate(model, TOKENS, scope="chunk", method=method)
    assert "\n" not in str(error.value)


def test_a_program_of_a_step_serves_for_the_beta_that_it_was_built_for():
    """Only this family lets beta exceed 1."""
    model = build("olmo_hybrid", **of_layers("linear_attention", "full_attention"))
    narrow, wide = (gated_delta_step(elimination(64), **STEP, max_beta=b) for b in (1.0, 2.0))
    with pytest.raises(
        ProgramError, match=r"beta reaches 1\.\d+, but .* is for beta up to 1; build it with max_beta=2"
    ):
        qinvert.calibrate(model, TOKENS, scope="chunk", method=narrow)
    plan = qinvert.calibrate(model, TOKENS, scope="chunk", method=wide).layer()
    assert plan.program == wide
    assert plan.provenance["max_beta"] == 2.0


def test_a_model_with_infinite_values_is_refused_by_the_name_of_the_layer(model):
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "in_proj" in n).fill_(torch.nan)
    with pytest.raises(InputError, match=r"of layer 'model.layers.0.linear_attn' holds NaN or Inf"):
        qinvert.calibrate(broken, TOKENS, scope="chunk")
