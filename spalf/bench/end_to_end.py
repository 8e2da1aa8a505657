"""Training with the language model in the loop: SPALF, packed SPALF, and SAELens's own runner.

The language model has the shape of Pythia-410m and random weights, the text is random tokens: what
an SAE makes of them is of no interest, how long it takes does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from spalf.activations import ActivationStore
from spalf.baselines.recipes import Shape as BaselineShape
from spalf.baselines.recipes import hyperparameters
from spalf.bench.problem import (
    STANDSTILL,
    Rounds,
    Shape,
    config_for,
    hold_at_target,
    quiet,
    run_on,
    steady,
)
from spalf.bench.timing import clock
from spalf.data import SequenceStream
from spalf.models.huggingface import HuggingFaceModel
from spalf.models.sites import parse_hook_point
from spalf.training.loop import PhaseRun, run_together
from spalf.training.phase import phase_one
from spalf.training.step import BANDWIDTH_EVERY

Row = dict[str, Any]

SEQ_LEN = 128
SETTLING_STEPS = 300
"""Steps on some of the activations before SPALF's are timed, as in `spalf.bench.contestants`."""
SEQUENCES = 4096
"""Different sequences; they come again when all have been read."""


@dataclass(frozen=True)
class LMShape:
    """Shape of a GPT-NeoX language model, and the layer whose output the SAE reads."""

    layers: int
    d_model: int
    heads: int
    d_vocab: int
    layer: int

    @property
    def hook_point(self) -> str:
        """TransformerLens name of the site."""
        return f"blocks.{self.layer}.hook_resid_post"


PYTHIA_410M = LMShape(layers=24, d_model=1024, heads=16, d_vocab=50_304, layer=12)
DEMO_4L = LMShape(layers=4, d_model=128, heads=4, d_vocab=2048, layer=2)


def stream(lm: LMShape) -> SequenceStream:
    """Random tokens."""
    drawn = np.random.default_rng(0).integers(0, lm.d_vocab, (SEQUENCES, SEQ_LEN))
    return SequenceStream(drawn.astype(np.int32))


def language_model(lm: LMShape, device: torch.device) -> HuggingFaceModel:
    """The model on ``device``: bfloat16 and SDPA, as a run with ``dtype: bfloat16`` has it."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=lm.d_vocab,
        hidden_size=lm.d_model,
        num_hidden_layers=lm.layers,
        num_attention_heads=lm.heads,
        intermediate_size=4 * lm.d_model,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).to(device, torch.bfloat16)
    site = parse_hook_point(lm.hook_point, config)
    return HuggingFaceModel(model, "random", lm.hook_point, site)


def harvest_ms(lm: LMShape, batch: int, device: torch.device) -> float:
    """Milliseconds that the language model takes for the activations of one step."""
    store = ActivationStore(language_model(lm, device), stream(lm))
    store.harvest(0, 64)
    sequences = 1024
    took = clock(lambda: store.harvest(0, sequences), device)
    return took / (sequences * SEQ_LEN / batch)


def spalf_ms(
    lm: LMShape,
    shape: Shape,
    device: torch.device,
    *,
    steps: int,
    cells: int = 1,
    overlap: bool,
) -> float:
    """Milliseconds a step of Phase 1 with its harvest; of ``cells`` SAEs on one stream.

    Timed from one chunk of the buffer to the next, so that every step has its share of a harvest.
    """
    store = ActivationStore(language_model(lm, device), stream(lm), ahead=overlap)
    sample = store.harvest(0, 16 * shape.batch // SEQ_LEN)
    chunk = max(2, steps // 2)
    pool = Rounds(sample, shape.batch)
    runs = [_run(shape, store, pool, l0, chunk) for l0 in _targets(shape, cells)]

    def train(to_step: int) -> None:
        for run in runs:
            run.phase = replace(run.phase, last_step=to_step, may_converge=False)
        run_together(runs)

    start = runs[0].state.step
    train(start + chunk)
    took = clock(lambda: train(start + chunk + 2 * chunk), device)
    store.close()
    return took / (2 * chunk)


def _targets(shape: Shape, cells: int) -> list[float]:
    """L0 targets an octave apart, like those of ``config/bench.yaml``.

    That of ``shape`` is the last but one, or the only one; all are below an eighth of F.
    """
    octaves = range(2 - cells, 2) if cells > 1 else [0]
    return [min(shape.L0 * 2.0**octave, shape.F / 8) for octave in octaves]


def _run(shape: Shape, store: ActivationStore, pool: Rounds, l0: float, chunk: int) -> PhaseRun:
    """A run at its L0, which stays there, and whose blocks are ``chunk`` batches long."""
    config = config_for(replace(shape, L0=l0), lr=2e-3)
    state, phase = run_on(config, pool)
    steady(state, phase, config)(SETTLING_STEPS)
    # Until lists that had to grow on the way there have been cut to what is left in them.
    hold_at_target(state, phase, config, pool)(BANDWIDTH_EVERY)
    config = config.model_copy(update={"lr": STANDSTILL})
    block_tokens = chunk * shape.batch

    class Blocks:
        """The store with blocks of another length."""

        @staticmethod
        def batches(batch: int, _: int, seed: int, start: int = 0, end: int | None = None) -> Any:
            return store.batches(batch, block_tokens, seed, start)

    # From the beginning of a chunk: chunk 0 is half a block.
    state.step += (-(state.step - chunk // 2)) % chunk
    return PhaseRun(state, phase_one(config, Blocks(), state.sae), config, quiet([]))  # type: ignore[arg-type]


def saelens_ms(
    lm: LMShape, shape: Shape, device: torch.device, *, method: str, steps: int, prefetch: bool
) -> float:
    """Milliseconds a step of SAELens's runner: the difference of a long run and a short one.

    Its language model runs in bfloat16 and its SAE under autocast, the faster of its settings.
    """
    model, text = _hooked_transformer(lm, device), _dataset(lm)
    times = [
        clock(_saelens_run(lm, shape, device, method, n, prefetch, model, text), device)
        for n in (steps, 3 * steps)
    ]
    return (times[1] - times[0]) / (2 * steps)


def _hooked_transformer(lm: LMShape, device: torch.device) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=lm.layers,
        d_model=lm.d_model,
        n_ctx=2048,
        d_head=lm.d_model // lm.heads,
        n_heads=lm.heads,
        d_mlp=4 * lm.d_model,
        d_vocab=lm.d_vocab,
        act_fn="gelu",
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=lm.d_model // lm.heads // 4,
        parallel_attn_mlp=True,
        device=str(device),
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        seed=0,
    )
    return HookedTransformer(config)


def _dataset(lm: LMShape) -> Any:
    from datasets import Dataset

    tokens = stream(lm).sequences(0, SEQUENCES)
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def _saelens_run(
    lm: LMShape,
    shape: Shape,
    device: torch.device,
    method: str,
    steps: int,
    prefetch: bool,
    model: Any,
    text: Any,
) -> Callable[[], object]:
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig
    from sae_lens.registry import get_sae_training_class

    sized = BaselineShape(shape.d_model, shape.F, shape.L0, steps)
    _, config_class = get_sae_training_class(method)
    settings = {**hyperparameters(method, sized), "normalize_activations": "none"}
    config = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=shape.d_model, d_sae=shape.F, device=str(device), **settings),
        model_name="random",
        hook_name=lm.hook_point,
        dataset_path="random",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=SEQ_LEN,
        training_tokens=steps * shape.batch,
        train_batch_size_tokens=shape.batch,
        store_batch_size_prompts=64,
        sequence_separator_token=None,
        prepend_bos=False,
        lr=3e-4,
        lr_warm_up_steps=0,
        autocast=device.type == "cuda",
        autocast_lm=device.type == "cuda",
        n_batches_in_buffer=max(20, 8 * shape.batch // SEQ_LEN),  # counted in sequences
        prefetch_llm_batches=prefetch,
        device=str(device),
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(config, override_dataset=text, override_model=model)
    return runner.run


def measurements(lm: LMShape, shape: Shape, device: torch.device, steps: int) -> Iterator[Row]:
    """What there is to compare: the harvest alone, one cell and five, SAELens's runner.

    Each both without and with the next harvest under way while the SAE trains.
    """
    yield {"what": "harvest", "ms": harvest_ms(lm, shape.batch, device)}
    for cells in (1, 5):
        for overlap in (False, True):
            took = spalf_ms(lm, shape, device, steps=steps, cells=cells, overlap=overlap)
            yield {"what": "spalf", "ms": took, "cells": cells, "overlap": overlap}
    for prefetch in (False, True):
        took = saelens_ms(lm, shape, device, method="jumprelu", steps=steps, prefetch=prefetch)
        yield {"what": "saelens jumprelu", "ms": took, "cells": 1, "overlap": prefetch}
