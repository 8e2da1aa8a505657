"""A model card for the Hugging Face hub, every figure of it read from the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalf.config import DatasetConfig
from spalf.data import is_on_hub
from spalf.errors import UserError
from spalf.interchange.load import LoadedSAE

TEMPLATE = Path(__file__).with_name("card.md.j2")

MEASURED = {
    "l0": "active features per token (L0)",
    "explained_variance": "explained variance",
    "mse": "squared error E‖x − x̂‖²",
    "ce_clean": "cross-entropy, clean",
    "ce_sae": "cross-entropy with the SAE",
    "ce_zero": "cross-entropy, zero-ablated",
    "delta_ce": "ΔCE",
    "ce_recovered": "CE recovered",
    "kl": "KL(clean ‖ with the SAE)",
    "dead_fraction": "share of features that never fire",
    "dense_fraction": "share of features that fire on more than a tenth of the tokens",
    "lambda_faith": "price of fidelity λ_faith",
    "train_tokens": "training tokens",
}
"""Rows of the card's table of results, by their name in ``evaluation.json``."""

TRAINING = ("L0_target", "R2_target", "F", "lr", "total_tokens", "batch_size", "seq_len", "seed")

UNPUBLISHED = ("lambda_faith", "train_tokens")
"""Rows that are no results of the SAE, and so not for the hub's list of results."""

EXAMPLES = {
    "saelens": """\
from sae_lens import SAE

folder = "."  # this one, or huggingface_hub.snapshot_download("<repository>")
sae = SAE.load_from_disk(folder)
z = sae.encode(x)  # x: activations [..., {d_model}]""",
    "dictionary_learning": """\
from dictionary_learning.utils import load_dictionary

folder = "."  # this one, or huggingface_hub.snapshot_download("<repository>")
sae, config = load_dictionary(f"{{folder}}/trainer_0", device="cpu")
z = sae.encode(x)  # x: activations [..., {d_model}]""",
    "sparsify": """\
from sparsify import SparseCoder

folder = "."  # this one, or huggingface_hub.snapshot_download("<repository>")
sae = SparseCoder.load_from_disk(f"{{folder}}/{hook_point}")
top_acts, top_indices, _ = sae.encode(x)  # x: activations [n, {d_model}]""",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        sae: as loaded.
        settings: of its run.
        format: the tool it was exported for.
        k: features kept of each token, for a tool without thresholds.
    """

    sae: LoadedSAE
    settings: Mapping[str, Any]
    format: str
    k: int | None


def model_card(subject: Subject, evaluation: Path | None = None) -> str:
    """The text of a ``README.md`` with the metadata that the hub reads at its top.

    Args:
        subject: what was exported.
        evaluation: the run's ``evaluation.json``; by default the one beside the SAE's directory.

    Raises:
        UserError: the evaluation is missing though named, damaged, or of another SAE.
    """
    from huggingface_hub import ModelCard

    sae, settings = subject.sae, subject.settings
    metrics = _metrics(subject, evaluation)
    dataset = settings.get("dataset") or {}
    card = ModelCard.from_template(
        _card_data(subject, metrics),
        template_path=str(TEMPLATE),
        title=_title(subject),
        kind="JumpReLU" if subject.k is None else "TopK",
        k=subject.k,
        d_sae=sae.d_sae,
        d_model=sae.d_model,
        model_name=_public(sae.model_name),
        hook_point=sae.hook_point,
        dataset=_public(dataset.get("path")),
        metrics=metrics,
        measured=_measured(metrics),
        training=_training(subject),
        example=EXAMPLES[subject.format].format(d_model=sae.d_model, hook_point=sae.hook_point),
    )
    return str(card.content)


def _title(subject: Subject) -> str:
    name = Path(str(subject.sae.model_name)).name
    target = subject.settings.get("L0_target")
    return f"SAE of {name}, {subject.sae.hook_point}, L0 {target:g}"


def _card_data(subject: Subject, metrics: Mapping[str, Any]) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    path = (subject.settings.get("dataset") or {}).get("path")
    dataset = _public(path)
    # Figures of the SAE with thresholds are none of its TopK conversion.
    published = {} if subject.k is not None else metrics
    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_name=label,
            metric_value=published[name],
        )
        for name, label in MEASURED.items()
        if published.get(name) is not None and name not in UNPUBLISHED
    ]
    return ModelCardData(
        library_name=subject.format,
        tags=["sparse-autoencoder", "interpretability", "spalf", subject.format],
        base_model=subject.sae.model_name if _on_hub(subject.sae.model_name) else None,
        datasets=[path] if path and is_on_hub(DatasetConfig(path=path)) else None,
        model_name=_title(subject) if results else None,
        eval_results=results or None,
    )


def _on_hub(model_name: str | None) -> bool:
    """Whether a name is that of a hub repository, not of a directory or a bundled model."""
    if model_name is None or model_name.startswith(("/", ".", "~", "spalf/")):
        return False
    return model_name.count("/") <= 1 and not Path(model_name).is_dir()


def _public(name: str | None) -> str:
    """A name as others may read it: of a path on this machine, the last part."""
    local = name is not None and (Path(name).is_absolute() or Path(name).exists())
    return Path(str(name)).name if local else str(name)


def _metrics(subject: Subject, evaluation: Path | None) -> dict[str, Any]:
    """The metrics of this very SAE, or nothing where no evaluation was asked for or found."""
    source = subject.sae.source
    path = evaluation or source.parent / "evaluation.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        cell, phases = report["cell"], report["phases"]
    except FileNotFoundError:
        if evaluation is None:
            return {}
        raise UserError("--evaluation", str(path), "no such file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("--evaluation", str(path), f"cannot be read: {error!r}") from None
    shared = ("model_name", "hook_point", "F", "L0_target", "seed")
    differing = [name for name in shared if cell.get(name) != subject.settings.get(name)]
    if differing:
        remedy = f"is of another SAE: {', '.join(differing)} differ; give the right --evaluation"
        raise UserError("--evaluation", str(path), remedy)
    return dict(phases.get(subject.sae.metadata.get("step"), {}))


def _measured(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, label in MEASURED.items():
        if metrics.get(name) is None:
            continue
        error = metrics.get(f"{name}_se")
        spread = "" if error is None else f" ± {error:.2g}"
        rows.append((label, f"{_shown(metrics[name])}{spread}"))
    return rows


def _training(subject: Subject) -> list[tuple[str, str]]:
    settings, metadata = subject.settings, subject.sae.metadata
    rows = [(name, _shown(settings[name])) for name in TRAINING if name in settings]
    rows.append(("trained up to", str(metadata.get("step"))))
    for name, value in (metadata.get("environment") or {}).items():
        rows.append((name, str(value)))
    return [(f"`{name}`" if name in TRAINING else name, value) for name, value in rows if value]


def _shown(value: Any) -> str:
    """Four significant digits of a figure, integers in full."""
    return (
        f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:,.0f}"
    )
