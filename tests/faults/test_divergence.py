"""Numbers that stop being finite: found to the step, named, kept out of the weights, gone past."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import MADE_BY, Run, assert_same


def _bad_activations(*steps: int) -> Callable[[], None]:
    """Put a NaN into the batches of these steps, counted from 1; every time they are made."""

    def install() -> None:
        from spalf.activations import ActivationStore

        batches = ActivationStore.batches

        def spoiled(
            store: ActivationStore,
            batch_size: int,
            block_tokens: int,
            seed: int,
            start_step: int = 0,
            end_step: int | None = None,
        ) -> Iterator[torch.Tensor]:
            stream = batches(store, batch_size, block_tokens, seed, start_step, end_step)
            for step, batch in enumerate(stream, start=start_step + 1):
                if step in steps:
                    batch = batch.clone()
                    batch[3, 5] = float("nan")
                yield batch

        ActivationStore.batches = spoiled  # type: ignore[method-assign]

    return install


def _bad_gradient(parameter: str, value: float, *steps: int) -> Callable[[], None]:
    """Make the gradient of a parameter bad at these steps, counted from 1."""

    def install() -> None:
        from spalf.training import graph, loop

        graph.train_step = _spoiling(graph.train_step)
        loop.first_non_finite = _spoiling(loop.first_non_finite)

    def _spoiling(function: Callable[..., Any]) -> Callable[..., Any]:
        def spoiling(state: Any, *args: Any) -> Any:
            def spoil(gradient: torch.Tensor) -> torch.Tensor:
                return torch.full_like(gradient, value)

            if state.step + 1 not in steps:
                return function(state, *args)
            handle = getattr(state.sae, parameter).register_hook(spoil)
            try:
                return function(state, *args)
            finally:
                handle.remove()

        return spoiling

    return install


def _bad_loss(*steps: int) -> Callable[[], None]:
    """Make the loss infinite at these steps, counted from 1, with gradients that are finite."""

    def install() -> None:
        from spalf.training import step as module

        forward = module._forward

        def spoiled(state: Any, *args: Any) -> Any:
            passed = forward(state, *args)
            if state.step + 1 in steps:
                first, *others = passed.losses
                bad = first + torch.full_like(first, float("inf"))
                passed = passed._replace(losses=(bad, *others))
            return passed

        module._forward = spoiled

    return install


CASES = [
    (_bad_loss(26), "loss not finite at step 26"),
    (_bad_activations(22), "activations not finite at step 22"),
    (_bad_activations(1), "activations not finite at step 1 "),
    (_bad_gradient("W_enc", float("nan"), 19), "gradient of W_enc not finite at step 19"),
    (
        _bad_gradient("log_threshold", float("inf"), 33),
        "gradient of log_threshold not finite at step 33",
    ),
]


@pytest.mark.parametrize(("spoil", "expected"), CASES)
def test_the_first_bad_step_stops_the_run_and_the_state_before_it_is_kept(
    spoil: Callable[[], None], expected: str, fresh: Callable[[str], Run], reference: Run
) -> None:
    import numpy as np
    from safetensors.numpy import load_file  # the parent of forks must start no threads

    result = fresh("phase1")
    outcome = result.run("phase1", spoil)
    assert outcome.status == 1, outcome.errors
    assert expected in outcome.lines[-1] and "training sequences" in outcome.lines[-1]
    assert "--skip-nonfinite" in outcome.lines[-1] and "Traceback" not in outcome.errors
    assert not (result.output("phase1") / "metadata.json").exists()
    step = int(expected.split("step ")[1])
    newest = sorted(result.working("phase1").glob("step_*"))[-1]
    assert newest.name == f"step_{step - 1:09d}"
    for path in newest.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert name == "exchange_rate" or np.isfinite(tensor).all(), (path, name)
    # The state is that of a run in which nothing bad has happened yet.
    again = result.run("phase1")
    assert again.status == 0, again.errors
    assert_same(result, reference, ("phase1/model.safetensors", "phase1/metrics.jsonl"))


def test_phase_two_names_its_sequences(fresh: Callable[[str], Run]) -> None:
    result = fresh("phase2")
    outcome = result.run("phase2", _bad_gradient("W_dec", float("nan"), 56))
    assert outcome.status == 1, outcome.errors
    assert "gradient of W_dec not finite at step 56 (training sequences" in outcome.lines[-1]


def test_bad_batches_are_skipped_and_recorded_up_to_the_number_allowed(
    fresh: Callable[[str], Run],
) -> None:
    result = fresh("phase1")
    outcome = result.run("phase1", _bad_activations(10, 22, 23), "--skip-nonfinite", "2")
    assert outcome.status == 1
    assert "not finite at step 23" in outcome.lines[-1]
    assert outcome.errors.count("batch skipped") == 2
    outcome = result.run("phase1", _bad_activations(10, 22, 23), "--skip-nonfinite", "3")
    assert outcome.status == 0, outcome.errors
    metadata = json.loads((result.output("phase1") / "metadata.json").read_text())
    skipped = metadata["state"]["skipped"]
    assert [found["step"] for found in skipped] == [10, 22, 23]
    assert all(found["tensor"] == "activations" for found in skipped)
    assert all("first_sequence" in found["stream"] for found in skipped)


def test_i10_a_run_that_skips_resumes_bit_identically(
    fresh: Callable[[str], Run], tmp_path: Path
) -> None:
    bad = _bad_activations(10, 22)
    straight = fresh("phase1")
    assert straight.run("phase1", bad, "--skip-nonfinite", "2").status == 0
    kept = tmp_path / "straight"
    straight.output("phase1").rename(kept)
    for step in (9, 11, 12, 21, 22, 23, 30):
        straight.forget("phase1")
        killed = straight.run("phase1", _killed_before(step, bad), "--skip-nonfinite", "2")
        assert killed.status == -signal.SIGKILL, killed.errors
        assert straight.run("phase1", bad, "--skip-nonfinite", "2").status == 0
        for name in ("model.safetensors", "metrics.jsonl", "optimizer.safetensors"):
            assert (straight.output("phase1") / name).read_bytes() == (kept / name).read_bytes()


def _killed_before(step: int, more: Callable[[], None]) -> Callable[[], None]:
    def install() -> None:
        more()
        from spalf.training import graph

        original = graph.train_step

        def killing(state: Any, *args: Any) -> Any:
            if state.step + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(state, *args)

        graph.train_step = killing

    return install


def _bad_harvest(number: int) -> Callable[[], None]:
    """Put an infinity into what the ``number``-th pass over the calibration split gives."""

    def install() -> None:
        from spalf.activations import ActivationStore

        harvest, calls = ActivationStore.harvest, [0]

        def spoiled(*args: Any) -> torch.Tensor:
            calls[0] += 1
            x = harvest(*args)
            return x.index_fill(0, torch.tensor([5]), float("inf")) if calls[0] == number else x

        ActivationStore.harvest = spoiled  # type: ignore[method-assign]

    return install


def test_calibration_stops_at_activations_that_are_not_finite(
    fresh: Callable[[str], Run], reference: Run
) -> None:
    result = fresh("calibrate")
    every = ("--runtime", '{"checkpoint_every_steps": 2}')
    outcome = result.run("calibrate", _bad_harvest(6), *every)
    assert outcome.status == 1, outcome.errors
    expected = "activations not finite at step 6 (calibration sequences 80 to 95)"
    assert expected in outcome.lines[-1] and "Traceback" not in outcome.errors
    assert not (result.output("calibrate") / "metadata.json").exists()
    again = result.run("calibrate", None, *every)
    assert again.status == 0, again.errors
    assert "resuming calibration at sequence 64" in again.errors
    assert_same(result, reference, MADE_BY["calibrate"])


def _bad_reconstruction(number: int) -> Callable[[], None]:
    """Make a NaN of one number in the ``number``-th reconstruction that is measured."""

    def install() -> None:
        from spalf.evaluation import downstream

        reconstruct, calls = downstream._Tally.reconstruct, [0]

        def spoiled(*args: Any) -> torch.Tensor:
            calls[0] += 1
            x = reconstruct(*args)
            return x.index_fill(2, torch.tensor([3]), float("nan")) if calls[0] == number else x

        downstream._Tally.reconstruct = spoiled  # type: ignore[method-assign]

    return install


def test_an_evaluation_that_is_not_finite_is_not_written(
    fresh: Callable[[str], Run], reference: Run
) -> None:
    result = fresh("evaluate")
    every = ("--runtime", '{"checkpoint_every_steps": 2}')
    outcome = result.run("evaluate", _bad_reconstruction(10), *every)  # two for each batch
    assert outcome.status == 1, outcome.errors
    expected = "measured 1.ce not finite at step 6 (held-out sequences 32 to 47)"
    assert expected in outcome.lines[-1] and "Traceback" not in outcome.errors
    assert not result.output("evaluate").exists()
    again = result.run("evaluate", None, *every)
    assert again.status == 0, again.errors
    assert "resuming evaluation after 4 batches" in again.errors
    assert_same(result, reference, MADE_BY["evaluate"])
