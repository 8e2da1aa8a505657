"""What a user may write in a configuration file, as frozen typed data.

`RunConfig` describes one SAE (one cell); `SweepConfig` a grid of them over models. Both round-trip
through YAML (`spalf.config.io`) and generate the JSON schema that the workflow validates against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from spalf.config.base import Frozen
from spalf.config.constants import StructuralConstants

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$")]
PositiveInt = Annotated[int, Field(gt=0, le=10**15)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
DictionarySize = Annotated[int, Field(gt=0, le=2**28)]
SequenceLength = Annotated[int, Field(ge=2, le=2**20)]
Factors = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]

BUFFER_TOKENS = 2**20
"""Capacity of the activation buffer, in activations (M18)."""


def _dataset_shorthand(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class DatasetConfig(Frozen):
    """Where text comes from. In YAML a bare string is short for ``{path: <string>}``.

    Attributes:
        path: ``python-stdlib``, a Hugging Face hub id, or a local file or directory of text,
            jsonl, parquet or Arrow.
        name: configuration of a hub dataset.
        split: split of a hub dataset.
        text_field: the column that holds the text.
    """

    path: NonEmpty
    name: str | None = None
    split: NonEmpty = "train"
    text_field: NonEmpty = "text"


Dataset = Annotated[DatasetConfig, BeforeValidator(_dataset_shorthand)]


class EvaluateConfig(Frozen):
    """How a trained SAE is measured.

    Attributes:
        tokens: held-out tokens used for every metric.
        sweep_factors: factors on the thresholds for the threshold-sweep frontier.
        sweep_tokens: held-out tokens used for each factor of that sweep.
        absorption: whether first-letter absorption is measured.
    """

    tokens: PositiveInt = 131_072
    sweep_factors: Factors = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
    sweep_tokens: PositiveInt = 16_384
    absorption: bool = True


class MethodConfig(Frozen):
    """Which variant of the method runs. The defaults are the method; the rest are ablations.

    Attributes:
        whitening: soft-ZCA before the encoder (M2); off means centring only.
        metric: norm M of the faithfulness constraint (M8).
        encoder_init: matched filter or its inverse-whitening ablation (M5).
        surrogate: surrogate gradient of the gate (M6).
        controller: how the multipliers are driven (M12).
        anchors: tie V_cap decoder columns to the unembedding (M3).
        v_cap: number of anchored columns; ``None`` means min(V, F/16).
        orthogonality: keep the constraint on co-active columns (M8).
        capu: adapt the penalty coefficients (M13); off keeps them at 1.
        setpoint: the loop that makes ``L0_target`` hold (M14).
        l0_schedule: start at m·L0_target instead of at the target (M9).
        phase2_fraction: share of the token budget given to end-to-end training (M16); 0 skips it.
    """

    whitening: bool = True
    metric: Literal["euclidean", "mahalanobis"] = "euclidean"
    encoder_init: Literal["matched_filter", "inverse_whitening"] = "matched_filter"
    surrogate: Literal["rectangle", "moreau"] = "rectangle"
    controller: Literal["adrc", "pi", "gradient_ascent"] = "adrc"
    anchors: bool = True
    v_cap: PositiveInt | None = None
    orthogonality: bool = True
    capu: bool = True
    setpoint: bool = True
    l0_schedule: bool = True
    phase2_fraction: float = Field(default=0.03, ge=0, lt=1)


class RuntimeConfig(Frozen):
    """How a run executes. Nothing here changes what is computed beyond floating-point rounding.

    Attributes:
        device: ``auto`` takes the GPU where there is one.
        threads: CPU threads; ``None`` leaves the choice to torch.
        kernel: ``auto`` takes Triton on a GPU and the PyTorch reference elsewhere.
        tf32: allow TF32 matrix products on a GPU.
        log_every_steps: steps between rows of the metrics log.
        checkpoint_every_minutes: wall-clock minutes between checkpoints.
        checkpoint_every_steps: steps between checkpoints; ``None`` leaves it to the minutes.
    """

    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: PositiveInt | None = None
    kernel: Literal["auto", "triton", "reference"] = "auto"
    tf32: bool = True
    log_every_steps: PositiveInt = 10
    checkpoint_every_minutes: float = Field(default=10.0, gt=0)
    checkpoint_every_steps: PositiveInt | None = None


class TrainConfig(Frozen):
    """The four knobs and the size of the run.

    Attributes:
        F: dictionary size (``d_sae`` elsewhere).
        L0_target: mean number of active features per token.
        R2_target: explained variance beyond which fidelity is not worth more features.
        lr: peak Adam learning rate.
        total_tokens: training budget in activations, both phases together.
        batch_size: activations (tokens, never sequences) per optimiser step.
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
    output_dir: NonEmpty = "results/run"
    checkpoint: str | None = None
    revision: str | None = None
    backend: Literal["auto", "huggingface", "transformer_lens"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    evaluate: EvaluateConfig = EvaluateConfig()
    method: MethodConfig = MethodConfig()
    constants: StructuralConstants = StructuralConstants()
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


class SweepTrainConfig(Frozen):
    """`TrainConfig` without ``L0_target``, which the grid supplies."""

    F: DictionarySize
    R2_target: float = Field(default=0.99, gt=0, lt=1)
    lr: float = Field(default=3e-4, gt=0, le=1)
    total_tokens: PositiveInt
    batch_size: PositiveInt = 4096
    seq_len: SequenceLength = 128


class ModelEntry(Frozen):
    """One language model of a sweep, and what it overrides.

    Attributes:
        train: fields of the top-level ``train`` block that differ for this model.
        evaluate: fields of the top-level ``evaluate`` block that differ for this model.
        dataset: replaces the top-level ``dataset``.
    """

    model_name: NonEmpty
    hook_point: NonEmpty
    revision: str | None = None
    backend: Literal["auto", "huggingface", "transformer_lens"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    dataset: Dataset | None = None
    train: Mapping[str, Any] = {}
    evaluate: Mapping[str, Any] = {}

    @field_validator("train")
    @classmethod
    def _train_fields_only(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        # Keys that no configuration knows are found, with a suggestion, when a cell is built.
        known = SweepTrainConfig.model_fields
        misplaced = [key for key in value if key in RunConfig.model_fields and key not in known]
        if misplaced:
            raise ValueError(f"{misplaced[0]!r} cannot be overridden here; {', '.join(known)} can")
        return value


class GridConfig(Frozen):
    """The axes of the sweep; every model is trained at every combination."""

    L0_target: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=1)
    ]
    seed: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)


class Cell(Frozen):
    """One point of the grid."""

    model: Name
    L0_target: float
    seed: int


class SweepConfig(Frozen):
    """A grid of SAEs: models × L0_target × seed. This is the workflow's configuration file."""

    models: Annotated[dict[Name, ModelEntry], Field(min_length=1)]
    dataset: Dataset
    grid: GridConfig
    train: SweepTrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    method: MethodConfig = MethodConfig()
    constants: StructuralConstants = StructuralConstants()
    runtime: RuntimeConfig = RuntimeConfig()

    def cells(self) -> Iterator[Cell]:
        """Every point of the grid, models outermost, in the order of the file."""
        for model in self.models:
            for l0_target in self.grid.L0_target:
                for seed in self.grid.seed:
                    yield Cell(model=model, L0_target=l0_target, seed=seed)

    def run_config(self, cell: Cell) -> RunConfig:
        """The complete configuration of one cell, with the model's overrides applied."""
        entry = self.models[cell.model]
        return RunConfig.model_validate(
            {
                **self.train.model_dump(),
                **entry.train,
                **entry.model_dump(exclude={"train", "evaluate", "dataset"}),
                "L0_target": cell.L0_target,
                "seed": cell.seed,
                "dataset": entry.dataset or self.dataset,
                "evaluate": {**self.evaluate.model_dump(), **entry.evaluate},
                "method": self.method,
                "constants": self.constants,
                "runtime": self.runtime,
            }
        )
