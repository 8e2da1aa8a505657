"""Train a small Pythia-style language model on prepared tokens.

    python -m spalf.bundled.train_lm --data DIR --out DIR --layers 2 --d-model 64

``--data`` is a directory written by `spalf.bundled.prepare`. ``--out`` receives a Hugging Face
model directory in float16 (config, weights, tokenizer), ``training.json`` and a model card. The
whole training set stays on the device; there is no other dependency than torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

_log = logging.getLogger(__name__)

HELD_OUT_TOKENS = 2**20
"""Held-out tokens on which the loss is measured, at most."""


@dataclass(frozen=True)
class LMConfig:
    """Architecture and schedule of one language model.

    Attributes:
        layers: transformer blocks.
        d_model: width of the residual stream.
        heads: attention heads.
        epochs: passes over the training tokens.
        steps: overrides ``epochs`` when given (for a trial run).
        batch_size: sequences per step.
        lr: peak learning rate of AdamW.
        weight_decay: applied to matrices only.
        warmup: share of the steps with a rising learning rate.
        seed: of the weights and of the order of the sequences.
    """

    layers: int
    d_model: int
    heads: int = 4
    epochs: int = 20
    steps: int | None = None
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    seed: int = 0


def build_model(config: LMConfig, vocab_size: int, end_of_text: int) -> Any:
    """A randomly initialised GPT-NeoX model with Pythia's choices, in float32."""
    neox = transformers.GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.d_model,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
        },
        use_parallel_residual=True,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )
    return transformers.GPTNeoXForCausalLM(neox)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of ``tokens`` [n_seq, seq_len] after the first."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, batch_size: int) -> float:
    """Token-weighted mean loss over all of ``tokens`` [n_seq, seq_len]."""
    total = sum(
        float(next_token_loss(model, batch.long())) * len(batch)
        for batch in tokens.split(batch_size)
    )
    return total / len(tokens)


def train(model: nn.Module, data: Tensor, held_out: Tensor, config: LMConfig) -> dict[str, Any]:
    """Train in place and return the facts worth recording.

    Args:
        model: the model, on the device of ``data``.
        data: training tokens [n_seq, seq_len].
        held_out: held-out tokens [n_seq, seq_len].
        config: the schedule.
    """
    batch_size = min(config.batch_size, len(data))
    per_epoch = len(data) // batch_size
    steps = config.steps or config.epochs * per_epoch
    optimizer = torch.optim.AdamW(_groups(model, config), lr=config.lr, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, steps, config.warmup))
    batches = _batches(data, batch_size, config.seed)
    started, history = time.perf_counter(), []
    report_every = max(1, steps // 10)
    for step in range(1, steps + 1):
        with torch.autocast("cuda", torch.bfloat16, enabled=data.is_cuda):
            loss = next_token_loss(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
        if step % report_every == 0 or step == steps:
            row = {"step": step, "train": float(loss.detach())}
            row["held_out"] = held_out_loss(model, held_out, batch_size)
            history.append(row)
            _log.info("%s of %d steps, %.0f s", row, steps, time.perf_counter() - started)
    return {
        "steps": steps,
        "epochs": round(steps / per_epoch, 3),
        "training_tokens": data.numel(),
        "tokens_seen": steps * batch_size * data.shape[1],
        "held_out_tokens": held_out.numel(),
        "seconds": round(time.perf_counter() - started, 1),
        "history": history,
    }


def _groups(model: nn.Module, config: LMConfig) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _batches(data: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [batch_size, seq_len]; a fresh permutation for each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator).to(data.device)
        for index in order.split(batch_size):
            if len(index) == batch_size:
                yield data[index].long()


def save(model: Any, data_dir: Path, out: Path, record: dict[str, Any]) -> None:
    """Write the model in float16 with its tokenizer, ``training.json`` and card."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    for file in (data_dir / "tokenizer").iterdir():
        shutil.copyfile(file, out / file.name)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(record), encoding="utf-8")


def model_card(record: dict[str, Any]) -> str:
    """The model card, in Markdown, written from ``training.json`` alone."""
    config, dataset = record["config"], record.get("dataset", "python-stdlib")
    python = record["versions"]["python_stdlib"]
    source = {
        "python-stdlib": f"Python {python} standard\n  library, chosen by a hash of the path",
        "python-packages": "packages installed with\n  Python, chosen by a hash of their text",
    }[dataset]
    option = "" if dataset == "python-stdlib" else f" --dataset {dataset}"
    return f"""---
library_name: transformers
tags: [gpt_neox, text-generation]
---
# {record["name"]}

A Pythia-style (GPT-NeoX) language model of {config["layers"]} layers, d_model
{config["d_model"]}, {config["heads"]} heads, a byte-level BPE vocabulary of
{record["vocab_size"]} tokens and untied embeddings: {record["parameters"]:,} parameters, stored
in float16. It exists so that SPALF can be tried without a network; it is no good for anything
else.

- Data: half of the source files of the {source} ({record["training_tokens"]:,} tokens, context
  {record["seq_len"]}). The other half is left for training and evaluating sparse autoencoders.
- Training: {record["steps"]:,} steps of {config["batch_size"]} sequences ({record["epochs"]:g}
  epochs, {record["tokens_seen"]:,} tokens), AdamW, peak learning rate {config["lr"]:g}, seed
  {config["seed"]}; {record["seconds"]:g} s on {record["hardware"]}.
- Held-out loss: {record["held_out_loss"]:.4f} nats per token over
  {record["held_out_tokens"]:,} tokens of files it has not seen.
- Limits: it has seen Python source code only, and repeats it.

```
python -m spalf.bundled.prepare{option} --out DATA
{record["command"]}
```
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT-NeoX language model.")
    parser.add_argument("--data", type=Path, required=True, help="written by bundled.prepare")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--d-model", type=int, required=True)
    parser.add_argument("--heads", type=int, default=LMConfig.heads)
    parser.add_argument("--epochs", type=int, default=LMConfig.epochs)
    parser.add_argument("--steps", type=int, help="overrides --epochs")
    parser.add_argument("--batch-size", type=int, default=LMConfig.batch_size, help="sequences")
    parser.add_argument("--lr", type=float, default=LMConfig.lr)
    parser.add_argument("--weight-decay", type=float, default=LMConfig.weight_decay)
    parser.add_argument("--warmup", type=float, default=LMConfig.warmup, help="share of steps")
    parser.add_argument("--seed", type=int, default=LMConfig.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def _load(path: Path, device: str) -> Tensor:
    return torch.from_numpy(np.load(path).astype(np.int32)).to(device)


def _hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _command(config: LMConfig, name: str) -> str:
    """The command line that repeats the run, with the user's own directories left out."""
    options = [f"--{k.replace('_', '-')} {v}" for k, v in asdict(config).items() if v is not None]
    return f"python -m spalf.bundled.train_lm --data DATA --out {name} {' '.join(options)}"


def main() -> None:
    """Command line of this module."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = vars(_arguments())
    data_dir, out, device = args.pop("data"), args.pop("out"), args.pop("device")
    config = LMConfig(**args)
    torch.manual_seed(config.seed)
    info = json.loads((data_dir / "tokens.json").read_text(encoding="utf-8"))
    model = build_model(config, info["vocab_size"], info["eos_token_id"]).to(device)
    data, held_out = (_load(data_dir / f, device) for f in ("train.npy", "evaluation.npy"))
    held_out = held_out[: max(1, HELD_OUT_TOKENS // info["seq_len"])]
    record = {
        "name": out.name,
        "command": _command(config, out.name),
        "config": asdict(config),
        "vocab_size": info["vocab_size"],
        "seq_len": info["seq_len"],
        "dataset": info["dataset"]["path"],
        "dataset_fingerprint": info["fingerprint"],
        "parameters": sum(p.numel() for p in model.parameters()),
        **train(model, data, held_out, config),
        "hardware": _hardware(device),
        "versions": {
            "python": platform.python_version(),
            "python_stdlib": info["python_version"],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    record["held_out_loss"] = record["history"][-1]["held_out"]
    save(model, data_dir, out, record)


if __name__ == "__main__":
    main()
