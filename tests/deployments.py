"""A small deployed model, for the tests of deployments and of the verbs that drive them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_models import VOCABULARY, build, of_layers

import qinvert
from qinvert import ChunkOptions
from qinvert.export.deployment.deploy import build_graphs
from qinvert.export.deployment.options import DeployOptions
from qinvert.export.exporting import profile_for

TOKENS = torch.randint(0, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(0))
CACHE = 256


@dataclass(frozen=True)
class Tiny:
    model: Any
    #: Folder of the model.
    source: Path
    plan: Any
    graphs: list
    #: What `qinvert.deploy` wrote.
    folder: Path

    def deploy(self, path, **options):
        """Deploy the model once more, from the graphs that are traced already."""
        with patch("qinvert.export.deployment.deploy.build_graphs", lambda *_: self.graphs):
            return qinvert.deploy(self.model, self.plan, path, cache=CACHE, **options)


def tiny_deployment(folder):
    model = build("qwen3_5", **of_layers("linear_attention", "full_attention"))
    model.save_pretrained(folder / "model")
    options = ChunkOptions(value_bits=16, state_bits=16)
    plan = qinvert.calibrate(model, TOKENS, scope="chunk", target="npu-qdq-int16", chunk=options)
    plan = replace(plan, provenance={**plan.provenance, "source": str(folder / "model")})
    graphs = build_graphs(model, plan, profile_for(plan, None), DeployOptions(cache=CACHE))
    found = Tiny(model, folder / "model", plan, graphs, folder / "deployed" / "out")
    found.deploy(found.folder)
    return found
