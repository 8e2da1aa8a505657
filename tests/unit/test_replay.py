"""Where there is no GPU, a model's passes are its own."""

from __future__ import annotations

from spalf.models import load_model, replayed
from tests.helpers_planted import PlantedModel


def test_on_the_cpu_nothing_is_recorded() -> None:
    for model in (
        load_model("spalf/demo-2l", "blocks.0.hook_resid_post", device="cpu"),
        PlantedModel(),
    ):
        for run in (model.activations, model.logits):
            assert replayed(model, run) == run
