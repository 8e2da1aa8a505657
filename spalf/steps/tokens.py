"""The first half of calibration: the dataset as tokens on disk, resumable (M17)."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spalf.checkpoint import identity_digest, naming
from spalf.config import RunConfig
from spalf.data import TokenSplits, tokenize_dataset
from spalf.data.tokens import INDEX_FILE
from spalf.errors import Interrupted, StopRequested, UserError
from spalf.models import LanguageModel, load_tokenizer
from spalf.steps.context import CheckpointClock, StepContext
from spalf.steps.sources import Sources

logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 2**22
"""Cap on the calibration stream: it ends there even if the covariance has not converged (M1)."""


EVALUATION_SPREAD = 32
"""Held-out tokens there are to choose from, for each that is measured on: a random choice among
many documents says more of a dataset than the whole of a few."""


def tokens_name(settings: Mapping[str, Any], sources: Sources) -> str:
    """The directory for tokens of this dataset, model and size; another for any other.

    Args:
        settings: of the calibration.
        sources: state of model and dataset.
    """
    # The standard library's text is the running interpreter's.
    chosen = {"python": platform.python_version()} | sources.inputs()
    chosen |= {name: settings[name] for name in ("dataset", "seq_len", "total_tokens", "evaluate")}
    return f"tokens.{identity_digest(chosen)[:8]}"


def tokens_of(
    config: RunConfig, model: LanguageModel, directory: Path, context: StepContext
) -> TokenSplits:
    """The dataset's tokens, from an earlier attempt as far as that got.

    Args:
        config: of the run, with pinned revisions.
        model: whose tokenizer it is.
        directory: where the tokens are made.
        context: says when to stop.

    Raises:
        UserError: the dataset or the tokenizer cannot be used.
        Interrupted: asked to stop; the position was saved.
    """
    with context.nothing_to_lose():
        if (directory / INDEX_FILE).exists():
            try:
                return TokenSplits.open(directory)
            except UserError as error:
                logger.warning("tokenising again: %s", error)
        tokenizer = _tokenizer(config, model)
    runtime = config.runtime
    clock = CheckpointClock(runtime.checkpoint_every_minutes, runtime.checkpoint_every_steps)
    done = 0

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        context.pause_point()

    try:
        return tokenize_dataset(
            config.dataset,
            tokenizer,
            directory,
            seq_len=config.seq_len,
            train_tokens=config.total_tokens,
            calibration_tokens=CALIBRATION_TOKENS,
            evaluation_tokens=EVALUATION_SPREAD * config.evaluate.tokens,
            progress=progress,
            save_due=clock.due,
        )
    except StopRequested:
        raise Interrupted(done, "token") from None


def _tokenizer(config: RunConfig, model: LanguageModel) -> Any:
    tokenizer = load_tokenizer(
        config.model_name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if len(tokenizer) > model.d_vocab:
        remedy = (
            f"its tokenizer has {len(tokenizer)} tokens, its weights only {model.d_vocab}; "
            "give the directory of one model, with its own tokenizer"
        )
        raise UserError("model_name", config.model_name, remedy)
    return tokenizer


def place_tokens(tokens: Path, out: Path) -> dict[str, Path]:
    """Put the files of tokens into ``out`` as well; links cost nothing where they are possible."""
    files = {}
    (out / "tokens").mkdir(exist_ok=True)
    for source in sorted(path for path in tokens.iterdir() if not path.name.startswith(".")):
        target = out / "tokens" / source.name
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            with naming(target):
                shutil.copyfile(source, target)
        files[f"tokens/{source.name}"] = target
    return files
