"""What a user may write about one SAE in a configuration file, as frozen typed data.

It round-trips through YAML (`spalf.config.io`); `spalf.config.sweep` has grids of SAEs.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from spalf.config.base import Frozen
from spalf.config.constants import StructuralConstants

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$")]
PositiveInt = Annotated[int, Field(gt=0, le=10**15)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
DictionarySize = Annotated[int, Field(gt=0, le=2**28)]
SequenceLength = Annotated[int, Field(ge=2, le=2**20)]
Factors = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]

Baseline = Literal["batchtopk", "topk", "jumprelu"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""The architectures that SAELens trains for comparison."""

RANDOM = "random"
"""The method that trains nothing: what every trained SAE has to beat."""

BUFFER_TOKENS = 2**20
"""Capacity of the activation buffer, in activations (M18)."""


def _no_way_up(path: str) -> str:
    if ".." in PurePath(path).parts:
        raise ValueError("must not lead upwards with '..'; write the directory that is meant")
    return path


def _dataset_shorthand(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class DatasetConfig(Frozen):
    """Where text comes from. In YAML a bare string is short for ``{path: <string>}``.

    Attributes:
        path: ``python-stdlib``, a Hugging Face hub id, or a local file or directory of text,
            jsonl, parquet or Arrow, or ``.npy`` arrays of token ids.
        name: configuration of a hub dataset.
        split: split of a hub dataset.
        revision: branch, tag or commit of a hub dataset; by default the commit that is current
            when the run first reads it.
        text_field: the column that holds the text.
        tokens_field: the column that holds token ids; the dataset is tokenised already then.
    """

    path: NonEmpty
    name: str | None = None
    split: NonEmpty = "train"
    revision: str | None = None
    text_field: NonEmpty = "text"
    tokens_field: NonEmpty | None = None


Dataset = Annotated[DatasetConfig, BeforeValidator(_dataset_shorthand)]


class EvaluateConfig(Frozen):
    """How a trained SAE is measured.

    Attributes:
        tokens: held-out tokens used for every metric.
        sweep_factors: factors on the thresholds for the threshold-sweep frontier.
        sweep_tokens: held-out tokens used for each factor of that sweep.
        absorption: whether first-letter absorption is measured.
        probing: whether features are probed for facts about tokens, where the text is Python.
    """

    tokens: PositiveInt = 131_072
    sweep_factors: Factors = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
    sweep_tokens: PositiveInt = 16_384
    absorption: bool = True
    probing: bool = True


class MethodConfig(Frozen):
    """Which variant of the method runs. The defaults are the method; the rest are ablations.

    Attributes:
        whitening: soft-ZCA before the encoder (M2); off means centring only.
        metric: norm M of the faithfulness constraint (M8).
        encoder_init: matched filter or its inverse-whitening ablation (M5).
        surrogate: surrogate gradient of the gate (M6).
        centred_gradient: move W_dec by its gradient for codes less their mean over the batch, so
            that b_dec alone answers a mean residual (M4).
        controller: how the multipliers are driven (M12).
        anchors: tie V_cap decoder columns to the unembedding (M3).
        v_cap: number of anchored columns, where there are any; ``None`` means min(V, F/16).
        orthogonality: keep the constraint on co-active columns (M8).
        capu: adapt the penalty coefficients (M13); off keeps them at 1.
        setpoint: the loop that makes ``L0_target`` hold (M14).
        revival: let the thresholds of silent features sink in Phase 1 until they fire again.
        l0_schedule: start at m·L0_target instead of at the target (M9).
        averaging: end Phase 2 with the mean of the weights over its second half (M16).
        phase2_fraction: share of the token budget given to end-to-end training (M16); 0 skips it.
        phase2_lr: learning rate of end-to-end training; ``None`` means ``lr``, or .005/√d where
            that is lower.
    """

    whitening: bool = True
    metric: Literal["fisher", "euclidean", "mahalanobis"] = "fisher"
    encoder_init: Literal["matched_filter", "inverse_whitening"] = "matched_filter"
    surrogate: Literal["rectangle", "moreau"] = "rectangle"
    centred_gradient: bool = False
    controller: Literal["adrc", "pi", "gradient_ascent"] = "adrc"
    anchors: bool = False
    v_cap: PositiveInt | None = None
    orthogonality: bool = True
    capu: bool = True
    setpoint: bool = True
    revival: bool = True
    l0_schedule: bool = True
    averaging: bool = True
    phase2_fraction: float = Field(default=0.03, ge=0, lt=1)
    phase2_lr: float | None = Field(default=None, gt=0, le=1)


class BaselinesConfig(Frozen):
    """How the baselines of a sweep are trained; SAELens's recommended settings are the rest.

    Attributes:
        lrs: peak learning rates tried for each baseline; each keeps its own best.
        tried_by: ``every_seed``, or the ``first_seed`` of a sweep, whose choice the others take.
    """

    lrs: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False, min_length=1)
    ] = (3e-4, 1e-3, 3e-3)
    tried_by: Literal["every_seed", "first_seed"] = "every_seed"


class RuntimeConfig(Frozen):
    """How a run executes. Nothing here changes what is computed beyond floating-point rounding.

    Attributes:
        device: ``auto`` takes the GPU where there is one.
        threads: CPU threads; ``None`` leaves the choice to torch.
        kernel: ``auto`` takes Triton on a GPU and, where few features are active, lists of entries
            in PyTorch elsewhere; ``reference`` is dense PyTorch.
        precision: operands of the SAE's matrix products in training; ``auto`` takes bfloat16 on a
            GPU and float32 elsewhere. Weights, thresholds, codes and sums are float32 always.
        tf32: allow TF32 matrix products on a GPU, where they are in float32.
        overlap: harvest the next block of activations while Phase 1 trains on the ones before it;
            takes half as much room again for activations.
        log_every_steps: steps between rows of the metrics log; a phase's last step has one too.
        checkpoint_every_minutes: wall-clock minutes between checkpoints.
        checkpoint_every_steps: steps between checkpoints; ``None`` leaves it to the minutes.
        trackers: where the metrics go besides the metrics log.
    """

    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: PositiveInt | None = None
    kernel: Literal["auto", "triton", "reference"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    tf32: bool = True
    overlap: bool = False
    log_every_steps: PositiveInt = 10
    checkpoint_every_minutes: float = Field(default=10.0, gt=0)
    checkpoint_every_steps: PositiveInt | None = None
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False, max_length=2)
    ] = ()


class TrainConfig(Frozen):
    """The four knobs and the size of the run.

    Attributes:
        F: dictionary size (``d_sae`` elsewhere).
        L0_target: mean number of active features per token.
        R2_target: explained variance beyond which fidelity is not worth more features.
        lr: peak Adam learning rate; held at 0.05/√d_model, and said so, where it is above that.
        total_tokens: training budget in activations, both phases together.
        batch_size: activations (tokens, never sequences) per optimiser step; Phase 2 takes a
            quarter of them.
        seq_len: context length in tokens.
    """

    F: DictionarySize
    L0_target: float = Field(gt=0)
    R2_target: float = Field(default=0.99, gt=0, lt=1)
    lr: float = Field(default=3e-4, gt=0, le=1)
    total_tokens: PositiveInt
    batch_size: PositiveInt = 4096
    seq_len: SequenceLength = 128


class RunConfig(TrainConfig):
    """Everything needed to train and evaluate one SAE.

    Raises:
        spalf.errors.UserError: through `spalf.config.io`, for any field out of range or any
            contradiction between fields.
    """

    model_name: NonEmpty
    hook_point: NonEmpty
    dataset: Dataset
    seed: Seed = 0
    output_dir: Annotated[NonEmpty, AfterValidator(_no_way_up)] = "results/run"
    checkpoint: str | None = None
    revision: str | None = None
    backend: Literal["auto", "huggingface", "transformer_lens"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    evaluate: EvaluateConfig = EvaluateConfig()
    method: MethodConfig = MethodConfig()
    constants: StructuralConstants = StructuralConstants()
    baselines: BaselinesConfig = BaselinesConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.L0_target >= self.F:
            raise ValueError(f"L0_target = {self.L0_target:g} must be below F = {self.F}")
        if self.method.v_cap is not None and self.method.v_cap >= self.F:
            raise ValueError(f"method.v_cap = {self.method.v_cap} must be below F = {self.F}")
        if self.method.metric == "mahalanobis" and not self.method.whitening:
            raise ValueError("method.metric = 'mahalanobis' needs method.whitening = true")
        if self.batch_size % self.seq_len:
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of seq_len = {self.seq_len}"
            )
        if self.total_tokens < 10 * self.batch_size:
            raise ValueError(
                f"total_tokens = {self.total_tokens} must be at least ten batches of "
                f"batch_size = {self.batch_size}"
            )
        return self
