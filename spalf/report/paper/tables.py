"""What the manuscript prints about SAEs, as tables of text; each row is a mean over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from spalf.report.paper.results import QUESTIONS, RANDOM, Result
from spalf.report.paper.sheet import NONE, Sheet, extent, number, spread

LABEL = ("model", "method", "L0 asked")


def curves(table: pd.DataFrame) -> Iterable[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Model, line and L0 target as text, and the rows of its seeds.

    Models and lines are in the order of the table, but SPALF first and random SAEs last.
    """
    models, lines = (list(dict.fromkeys(table[name])) for name in ("model", "line"))
    lines.sort(key=lambda line: {"spalf": 0, RANDOM: 2}.get(line, 1))
    ranked = table.assign(
        model_rank=[models.index(model) for model in table["model"]],
        line_rank=[lines.index(line) for line in table["line"]],
    )
    by = ["model_rank", "line_rank", "L0_target"]
    for _, rows in ranked.sort_values([*by, "seed"], kind="stable").groupby(by, sort=True):
        first = rows.iloc[0]
        yield (first["model"], first["line"], f"{first['L0_target']:g}"), rows


def frontier_sheet(table: pd.DataFrame) -> Sheet:
    """The final SAEs on held-out tokens.

    ± is one standard deviation over seeds or, where there is one seed, one standard error over
    sequences.
    """
    measured = ("L0", "EV", "ΔCE", "CE recovered", "KL", "dead", "dense")
    rows = []
    for label, seeds in curves(table):
        values = (
            _with_error(seeds, "l0", ".2f"),
            spread(seeds["explained_variance"]),
            _with_error(seeds, "delta_ce", ".3f"),
            spread(seeds["ce_recovered"]),
            _with_error(seeds, "kl", ".3f"),
            _counted(seeds, "dead"),
            _counted(seeds, "dense"),
        )
        rows.append((*label, str(len(seeds)), *values))
    return Sheet("frontier", (*LABEL, "seeds", *measured), rows)


def _with_error(rows: pd.DataFrame, name: str, form: str) -> str:
    error = rows[f"{name}_se"].iloc[0] if f"{name}_se" in rows else None
    if len(rows) > 1 or error is None or pd.isna(error):
        return spread(rows[name], form)
    return f"{number(rows[name].iloc[0], form)} ± {number(error, form)}"


def _counted(rows: pd.DataFrame, name: str) -> str:
    """How many features of how many, on average over seeds, and the share."""
    counts = rows[f"{name}_features"].dropna()
    if counts.empty:
        return NONE
    mean = float(counts.mean())
    return f"{number(mean, '.0f' if mean == round(mean) else '.1f')} of {rows['F'].iloc[0]}"


def phases_sheet(table: pd.DataFrame) -> Sheet:
    """L0, explained variance and ΔCE at the end of each phase; SPALF itself only."""
    header = ("model", "L0 asked", "L0, 1", "L0, 2", "EV, 1", "EV, 2", "ΔCE, 1", "ΔCE, 2", "ratio")
    rows = []
    for (model, line, target), seeds in curves(table):
        if line != "spalf" or not _has(seeds, "phase2_ratio"):
            continue
        pairs = (("l0", ".2f"), ("explained_variance", ".3f"), ("delta_ce", ".3f"))
        values = [
            spread(seeds[f"{phase}{name}"], form)
            for name, form in pairs
            for phase in ("phase1_", "")
        ]
        rows.append((model, target, *values, spread(seeds["phase2_ratio"], ".2f")))
    return Sheet("phases", header, rows)


def control_sheet(table: pd.DataFrame) -> Sheet:
    """Settling, ∫v² and multipliers of Phase 1, with the slope of the frontier beside λ."""
    names = ("settled at step", "∫v² fidelity", "∫v² orthogonality", "λ", "slope", "ended by")
    rows = []
    for (model, line, target), seeds in curves(table):
        if line == "spalf" and "v2_faith" in seeds:
            ended = ", ".join(dict.fromkeys(str(e) for e in seeds["ended_by"] if e)) or NONE
            values = (
                settled(seeds),
                spread(seeds["v2_faith"], ".2f"),
                spread(seeds["v2_ortho"], ".2f"),
                spread(seeds["lambda_faith"], ".2f"),
                spread(seeds["slope"], ".2f"),
            )
            rows.append((model, target, *values, ended))
    return Sheet("control", ("model", "L0 asked", *names), rows)


def settled(rows: pd.DataFrame) -> str:
    """From which step on L0 stayed at its reference, from first to last; how many never did."""
    if not _has(rows, "settling_step"):
        return "never"
    steps, never = extent(rows["settling_step"], "d"), int(rows["settling_step"].isna().sum())
    return f"{steps}, {never} never" if never else steps


def dictionary_sheet(table: pd.DataFrame, results: Sequence[Result]) -> Sheet:
    """Cosine of each decoder column with its nearest neighbour, and over all pairs."""
    header = (*LABEL, "mean", "median", "95 %", "above 0.7", "above 0.9", "d · mean cos²")
    quantiles = {
        result.place: (result.data.get("decoder") or {}).get("nearest_quantiles") or {}
        for result in results
    }
    rows = []
    for label, seeds in curves(table):
        if not _has(seeds, "decoder_nearest_mean"):
            continue
        own = [quantiles[place] for place in seeds["place"]]
        values = (
            spread(seeds["decoder_nearest_mean"]),
            *(spread(found.get(name) for found in own) for name in ("0.5", "0.95")),
            *(spread(seeds[f"near_{limit}"], ".1%") for limit in ("0.7", "0.9")),
            spread(seeds["decoder_mean_square"], ".2f"),
        )
        rows.append((*label, *values))
    return Sheet("dictionary", header, rows)


def probing_sheet(table: pd.DataFrame) -> Sheet:
    """Balanced accuracy of probes of one and of five features, and of the activations."""
    names = [question.removesuffix("ation") for question in QUESTIONS]
    header = (*LABEL, *(f"{name}, {k}" for name in names for k in (1, 5)))
    rows: list[tuple[str, ...]] = []
    dense: dict[str, pd.DataFrame] = {}
    for label, seeds in curves(table):
        if _has(seeds, "probe_k1"):
            rows.append((*label, *_probed(seeds, ("k1", "k5"))))
            dense.setdefault(label[0], seeds)
    for model, seeds in dense.items():
        # The activations are the same for every SAE; one number serves both columns.
        rows.append((model, "activations", NONE, *_probed(seeds.head(1), ("all", "all"))))
    return Sheet("probing", header, rows)


def _probed(rows: pd.DataFrame, probes: tuple[str, str]) -> list[str]:
    names = [f"probe_{probe}_{question}" for question in QUESTIONS for probe in probes]
    return [spread(rows[name], ".2f") if name in rows else NONE for name in names]


def consistency_sheet(found: Mapping[tuple[str, str, float], Mapping[str, Any]]) -> Sheet:
    """Agreement of the dictionaries of different seeds: a row a line, a column an L0 target."""
    targets = sorted({target for _, _, target in found})
    rows = []
    for model, line in dict.fromkeys(key[:2] for key in found):
        own = [found.get((model, line, target), {}).get("pairs", []) for target in targets]
        rows.append((model, line, str(max(map(len, own))), *(spread(pairs) for pairs in own)))
    header = ("model", "method", "pairs", *(f"L0 {target:g}" for target in targets))
    return Sheet("consistency", header, rows)


def drift_sheet(table: pd.DataFrame) -> Sheet:
    """Cosine of anchored columns with their token directions; SAEs with anchors only."""
    header = (*LABEL, "anchored columns", "mean cosine", "smallest cosine")
    rows = []
    for label, seeds in curves(table):
        if _has(seeds, "drift_n_anchored") and seeds["drift_n_anchored"].max() > 0:
            values = (
                extent(seeds["drift_n_anchored"], "d"),
                spread(seeds["drift_mean_cosine"]),
                number(float(seeds["drift_min_cosine"].min())),
            )
            rows.append((*label, *values))
    return Sheet("drift", header, rows)


def absorption_sheets(table: pd.DataFrame, results: Sequence[Result]) -> tuple[Sheet, Sheet]:
    """First-letter absorption where it was measured, and why not where it was not."""
    header = (*LABEL, "absorbed", "letters from features", "letters from activations", "cases")
    measured = []
    for label, seeds in curves(table):
        if _has(seeds, "absorption_rate"):
            values = [
                spread(seeds[f"absorption_{name}"])
                for name in ("rate", "feature_accuracy", "probe_accuracy")
                if f"absorption_{name}" in seeds
            ]
            values += [NONE] * (3 - len(values))
            measured.append((*label, *values, extent(seeds["absorption_n_cases"], "d")))
    skipped: dict[tuple[str, str], int] = {}
    for result in results:
        found = result.data.get("absorption") or {"skipped": "not in this evaluation"}
        if "skipped" in found:
            key = (str(result.cell["model"]), str(found["skipped"]))
            skipped[key] = skipped.get(key, 0) + 1
    reasons = [(model, str(count), reason) for (model, reason), count in skipped.items()]
    return (
        Sheet("absorption", header, measured),
        Sheet("absorption_skipped", ("model", "SAEs", "reason"), reasons),
    )


def cost_sheet(table: pd.DataFrame, batch_size: Mapping[str, int]) -> Sheet:
    """Batches of ``batch_size`` tokens, tokens, minutes of each step and memory of an SAE."""
    minutes_of = ("Phase 1, min", "Phase 2, min", "baseline, min", "evaluation, min")
    rows = []
    for (model, line, target), seeds in curves(table):
        if line == RANDOM:
            continue
        tokens = seeds["train_tokens"].dropna()
        total = int(tokens.max()) if len(tokens) else None
        size = batch_size.get(model)
        minutes = [
            spread(seeds[f"seconds_{step}"] / 60, ".1f") if f"seconds_{step}" in seeds else NONE
            for step in ("phase1", "phase2", "baseline", "evaluate")
        ]
        batches = total // size if total and size else None
        numbers = (number(batches, ",d"), number(total, ",d"))
        memory = spread(seeds["memory_mb"], ".0f")
        rows.append((model, line, target, *numbers, *minutes, memory))
    return Sheet("cost", (*LABEL, "batches", "tokens", *minutes_of, "memory, MB"), rows)


def settings_sheet(results: Sequence[Result]) -> Sheet:
    """The learning rates that a baseline kept, those it tried, and what else was set for it."""
    kept: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        chosen = dict(result.cell.get("hyperparameters") or {})
        if result.line == RANDOM or not chosen:
            continue
        tried = " ".join(f"{rate:g}" for rate in chosen.pop("lr_tried", [])) or NONE
        text = ", ".join(f"{name} = {_shown(value)}" for name, value in chosen.items())
        rates = kept.setdefault((*result.label[:3], tried, text), [])
        rates.append(number(result.cell.get("lr"), "g"))
    rows = [(*key[:3], " ".join(dict.fromkeys(rates)), *key[3:]) for key, rates in kept.items()]
    return Sheet("settings", (*LABEL, "lr", "rates tried", "settings"), rows)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def missing_sheet(missing: Iterable[str]) -> Sheet:
    """The results of the grid that are not there."""
    return Sheet("missing", ("result",), [(place,) for place in missing])


def _has(rows: pd.DataFrame, name: str) -> bool:
    return name in rows and bool(rows[name].notna().any())
