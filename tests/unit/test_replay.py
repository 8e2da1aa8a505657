"""Where there is no GPU, a model's activations are its own."""

from __future__ import annotations

from spalf.models import load_model, replayed_activations
from tests.helpers_planted import PlantedModel


def test_on_the_cpu_nothing_is_recorded() -> None:
    for model in (
        load_model("spalf/demo-2l", "blocks.0.hook_resid_post", device="cpu"),
        PlantedModel(),
    ):
        assert replayed_activations(model) == model.activations
