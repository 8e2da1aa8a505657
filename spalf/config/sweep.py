"""What a user may write about a sweep: a grid of SAEs, with baselines and variants beside them.

`SweepConfig` is the workflow's configuration file, and the JSON schema is generated from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from spalf.config.base import Frozen
from spalf.config.constants import StructuralConstants
from spalf.config.types import (
    BASELINES,
    RANDOM,
    BaselinesConfig,
    Dataset,
    DictionarySize,
    EvaluateConfig,
    MethodConfig,
    Name,
    NonEmpty,
    PositiveInt,
    RunConfig,
    RuntimeConfig,
    Seed,
    SequenceLength,
)

Method = Literal["spalf", "batchtopk", "topk", "jumprelu", "random"]


class SweepTrainConfig(Frozen):
    """`TrainConfig` without ``L0_target``, which the grid supplies."""

    F: DictionarySize
    R2_target: float = Field(default=0.99, gt=0, lt=1)
    lr: float = Field(default=3e-4, gt=0, le=1)
    total_tokens: PositiveInt
    batch_size: PositiveInt = 4096
    seq_len: SequenceLength = 128


def _sweep_train_fields(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse what the grid supplies or belongs elsewhere.

    Keys that no configuration knows are found, with a suggestion, when a cell is built.
    """
    known = SweepTrainConfig.model_fields
    misplaced = [key for key in value if key in RunConfig.model_fields and key not in known]
    if misplaced:
        raise ValueError(f"{misplaced[0]!r} cannot be overridden here; {', '.join(known)} can")
    return value


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

    _train_fields_only = field_validator("train")(_sweep_train_fields)


class GridConfig(Frozen):
    """The axes of the sweep; every model is trained at every combination."""

    L0_target: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=1)
    ]
    seed: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0,)

    @field_validator("L0_target", "seed")
    @classmethod
    def _distinct(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        """No two cells may have one directory."""
        seen: dict[str, float] = {}
        for value in values:
            label = f"{value:g}" if isinstance(value, float) else str(value)
            if label in seen:
                raise ValueError(f"{seen[label]} and {value} are both called {label}; remove one")
            seen[label] = value
        return values


class VariantEntry(Frozen):
    """What a variant changes; it is trained at every point of the grid beside the sweep itself.

    Attributes:
        train: fields of the ``train`` block that differ, after those of the model.
        method: fields of the ``method`` block that differ.
        constants: fields of the ``constants`` block that differ.
    """

    train: Mapping[str, Any] = {}
    method: Mapping[str, Any] = {}
    constants: Mapping[str, Any] = {}

    _train_fields_only = field_validator("train")(_sweep_train_fields)


class Cell(Frozen):
    """One SAE of a sweep.

    Attributes:
        model: name of its language model in the sweep.
        L0_target: mean number of active features per token that was asked for.
        seed: of its training.
        method: ``spalf``, or the baseline it is, or ``random``.
        variant: name of the variant it belongs to; empty for the sweep itself.
    """

    model: Name
    L0_target: float
    seed: int
    method: Method = "spalf"
    variant: str = ""

    @property
    def series(self) -> str:
        """``model``, ``model/variant`` or ``model/baseline``: what is one curve in the figures."""
        name = self.variant if self.method == "spalf" else self.method
        return f"{self.model}/{name}" if name else self.model

    @property
    def place(self) -> str:
        """Where its results are, below ``results``."""
        return f"{self.series}/L0_{self.L0_target:g}/seed_{self.seed}"


class SweepConfig(Frozen):
    """A grid of SAEs: models × methods × L0_target × seed. The workflow's configuration file.

    Attributes:
        models: language models and sites, by a name of the user's choice.
        dataset: where text comes from.
        grid: the axes every method is trained along.
        methods: what is trained: ``spalf`` and SAELens's baselines; ``random`` adds untrained SAEs,
            which all others have to beat.
        variants: changed versions of ``spalf``, by name, such as ablations.
        baselines: how the baselines are trained.
        pack: whether one job trains all cells of a model, or of a variant, on one stream of
            activations; the results are the same.
    """

    models: Annotated[dict[Name, ModelEntry], Field(min_length=1)]
    dataset: Dataset
    grid: GridConfig
    train: SweepTrainConfig
    methods: Annotated[tuple[Method, ...], Field(strict=False, min_length=1)] = ("spalf",)
    variants: Mapping[Name, VariantEntry] = {}
    evaluate: EvaluateConfig = EvaluateConfig()
    method: MethodConfig = MethodConfig()
    constants: StructuralConstants = StructuralConstants()
    baselines: BaselinesConfig = BaselinesConfig()
    pack: bool = False
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        taken = sorted(
            set(self.variants) & {"spalf", "calibration", "imported", RANDOM, *BASELINES}
        )
        if taken:
            raise ValueError(f"a variant cannot be called {taken[0]!r}; give it another name")
        if self.variants and "spalf" not in self.methods:
            raise ValueError("variants are variants of spalf; add it to methods")
        odd = [target for target in self.grid.L0_target if target != int(target)]
        if "topk" in self.methods and odd:
            raise ValueError(f"topk needs a whole number, not grid.L0_target = {odd[0]:g}")
        return self

    def cells(self) -> Iterator[Cell]:
        """Every SAE of the sweep, models outermost, in the order of the file."""
        for model in self.models:
            for method in dict.fromkeys(self.methods):
                for variant in ("", *self.variants) if method == "spalf" else ("",):
                    for l0_target in self.grid.L0_target:
                        for seed in self.grid.seed:
                            yield Cell(
                                model=model,
                                L0_target=l0_target,
                                seed=seed,
                                method=method,
                                variant=variant,
                            )

    def run_config(self, cell: Cell) -> RunConfig:
        """The complete configuration of one cell, with its model's and its variant's overrides."""
        entry = self.models[cell.model]
        variant = self.variants[cell.variant] if cell.variant else VariantEntry()
        return RunConfig.model_validate(
            {
                **self.train.model_dump(),
                **entry.train,
                **variant.train,
                **entry.model_dump(exclude={"train", "evaluate", "dataset"}),
                "L0_target": cell.L0_target,
                "seed": cell.seed,
                "dataset": entry.dataset or self.dataset,
                "evaluate": {**self.evaluate.model_dump(), **entry.evaluate},
                "method": {**self.method.model_dump(), **variant.method},
                "constants": {**self.constants.model_dump(), **variant.constants},
                "baselines": self.baselines,
                "runtime": self.runtime,
            }
        )
