"""SAEs beside SPALF's own, and beside those that nobody trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from spalf.config import SweepConfig, VariantEntry
from spalf.report.paper.results import CURVE, RANDOM, Result
from spalf.report.paper.sheet import NONE, Sheet, number
from spalf.report.paper.tables import settled

Consistency = Mapping[tuple[str, str, float], Mapping[str, Any]]
"""Agreement of seeds, by model, line and L0 target."""

BEYOND = 0.03
"""How far beyond SPALF's curve an L0 may lie and be compared: where a controller lands that met its
target."""

MEASURES = (
    ("ΔCE", "delta_ce", -1),
    ("explained variance", "explained_variance", 1),
    ("CE recovered", "ce_recovered", 1),
    ("KL", "kl", -1),
    ("ΔCE over the random SAE's, thresholds scaled", "sweep_ratio", -1),
    ("probes of one feature", "probe_k1", 1),
    ("probes of five features", "probe_k5", 1),
    ("first letter from features", "absorption_feature_accuracy", 1),
    ("PW-MCC between seeds", "pw_mcc", 1),
)
"""What a trained SAE has to beat a random one in: name, column, and whether more (1) or less (−1)
is better."""


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """ΔCE of every other SAE over SPALF's own at the same L0, as a column ``ratio``.

    SPALF's curve is the mean over seeds, interpolated in log L0 and log ΔCE. The ratio is missing
    where an SAE's L0 lies outside the curve, or a ΔCE is not positive. Random SAEs are left out.
    """
    found = []
    for _, rows in table.groupby("model", sort=False):
        own = rows[(rows["line"] == "spalf") & (rows["delta_ce"] > 0)]
        curve = own.groupby("L0_target")[["l0", "delta_ce"]].mean().sort_values("l0")
        others = rows[~rows["line"].isin(["spalf", RANDOM])]
        found.append(others.assign(ratio=_over_curve(others, curve)))
    return pd.concat(found) if found else table.iloc[:0].assign(ratio=[])


def _over_curve(points: pd.DataFrame, curve: pd.DataFrame) -> Any:
    delta = points["delta_ce"].to_numpy(float)
    logs = np.log(curve["delta_ce"].to_numpy(float))
    expected = np.exp(_at(points["l0"].to_numpy(float), curve["l0"].to_numpy(float), logs))
    return np.where(delta > 0, delta / expected, np.nan)


def _at(l0: Any, curve_l0: Any, curve: Any) -> Any:
    """A curve over log L0, at ``l0``: its nearest segment; missing where it is too far outside."""
    if len(curve_l0) < 2:
        return np.full(len(l0), np.nan)
    known = (l0 >= (1 - BEYOND) * curve_l0[0]) & (l0 <= (1 + BEYOND) * curve_l0[-1])
    x, at = np.log(curve_l0), np.log(np.where(known, l0, curve_l0[0]))
    left = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    slope = (curve[left + 1] - curve[left]) / (x[left + 1] - x[left])
    return np.where(known, curve[left] + slope * (at - x[left]), np.nan)


def comparison_sheet(compared: pd.DataFrame) -> Sheet:
    """ΔCE of baselines and imported SAEs over SPALF's own at the same L0, by model."""
    header = ("model", "method", "ΔCE ratio", "lowest", "highest", "SAEs", "outside")
    plain = compared[compared["variant"] == ""]
    rows = [
        (str(model), str(line), *_ratio(points))
        for (model, line), points in plain.groupby(["model", "line"], sort=False)
    ]
    return Sheet("comparison", header, rows)


def best_baseline_sheet(table: pd.DataFrame) -> Sheet:
    """SPALF, and each variant of it, beside the best baseline at the L0 that it came to.

    Means over seeds. The baselines' curves are means over seeds as well, interpolated in log L0;
    ΔCE in its logarithm. The best one is that with the lowest ΔCE there or, for explained
    variance, with the highest. Largest over seeds: how far L0 is off, and the share of dead
    features.
    """
    header = (
        "model", "line", "L0 asked", "seeds", "L0", "off by", "ΔCE", "best baseline", "its ΔCE",
        "ratio", "EV, Phase 1", "less the best", "dead",
    )  # fmt: skip
    rows = []
    for model, found in table.groupby("model", sort=False):
        plain = found[(found["variant"] == "") & ~found["method"].isin(["spalf", RANDOM])]
        names = ["l0", "delta_ce", "explained_variance"]
        curves = {
            str(line): points.groupby("L0_target")[names].mean().sort_values("l0")
            for line, points in plain[plain["delta_ce"] > 0].groupby("line", sort=False)
        }
        own = found[found["method"] == "spalf"]
        for (line, target), points in own.groupby(["line", "L0_target"], sort=False):
            row = _beside_the_best(points, curves)
            if row:
                rows.append((str(model), str(line), f"{target:g}", str(len(points)), *row))
    return Sheet("best_baseline", header, rows)


def _beside_the_best(
    points: pd.DataFrame, curves: Mapping[str, pd.DataFrame]
) -> tuple[str, ...] | None:
    l0, delta = float(points["l0"].mean()), float(points["delta_ce"].mean())
    deltas, variances = {}, []
    for line, curve in curves.items():
        at, x = np.array([l0]), curve["l0"].to_numpy(float)
        value = float(np.exp(_at(at, x, np.log(curve["delta_ce"].to_numpy(float))))[0])
        if not math.isnan(value):  # it reaches there
            deltas[line] = value
            variances.append(float(_at(at, x, curve["explained_variance"].to_numpy(float))[0]))
    if not deltas:
        return None
    best = min(deltas, key=deltas.__getitem__)
    variance = float(points.get("phase1_explained_variance", points["explained_variance"]).mean())
    return (
        number(l0, ".2f"), number(float(points["l0_error"].abs().max()), ".1%"),
        number(delta, ".4f"), best, number(deltas[best], ".4f"),
        number(delta / deltas[best], ".3f"), number(variance, ".4f"),
        number(variance - max(variances), "+.4f"),
        number(float(points["dead_fraction"].max()), ".2%"),
    )  # fmt: skip


def _ratio(points: pd.DataFrame) -> tuple[str, ...]:
    """Geometric mean, lowest, highest; how many were compared and how many could not be."""
    known = points["ratio"].dropna()
    outside = str(len(points) - len(known))
    if known.empty:
        return (NONE, NONE, NONE, "0", outside)
    values = (geometric_mean(known), known.min(), known.max())
    return (*(number(float(x), ".2f") for x in values), str(len(known)), outside)


def geometric_mean(values: pd.Series[Any]) -> float:
    """The exponential of the mean logarithm."""
    return float(np.exp(np.log(values.to_numpy(float)).mean()))


@dataclass(frozen=True)
class Change:
    """What a variant changes, and where in the manuscript it belongs.

    Attributes:
        name: of the variant.
        kind: ``constant`` or ``rate`` where it changes one structural constant or the learning
            rate and nothing else; ``method`` otherwise.
        text: what is changed, such as ``capu = false``.
        field: the constant, or ``lr``; empty for a change of the method.
        value: its value.
        factor: its value over the one it has elsewhere.
    """

    name: str
    kind: str
    text: str
    field: str = ""
    value: float = 0.0
    factor: float = 1.0


def changes(sweep: SweepConfig) -> list[Change]:
    """What each variant of a sweep changes, in the order of the configuration."""
    return [_change(name, entry, sweep) for name, entry in sweep.variants.items()]


def _change(name: str, entry: VariantEntry, sweep: SweepConfig) -> Change:
    given = {**entry.train, **entry.method, **entry.constants}
    text = ", ".join(f"{key} = {_yaml(value)}" for key, value in given.items()) or "nothing"
    if len(given) == 1 and not entry.method:
        field_name, value = next(iter(given.items()))
        usual = {**sweep.train.model_dump(), **sweep.constants.model_dump()}[field_name]
        kind = "constant" if entry.constants else "rate" if field_name == "lr" else "method"
        if kind != "method":
            return Change(name, kind, text, field_name, float(value), float(value) / usual)
    return Change(name, "method", text)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def variant_sheets(compared: pd.DataFrame, found: Sequence[Change]) -> tuple[Sheet, Sheet]:
    """Changes of the method, and of one constant or the learning rate by a factor."""
    outcome = ("ΔCE ratio", "lowest", "highest", "SAEs", "outside", "L0 off by", "dead", "settled")
    ablated, sensitive = [], []
    for change in found:
        own = compared[compared["variant"] == change.name]
        for model, points in own.groupby("model", sort=False):
            row = (*_ratio(points), *_outcome(points))
            if change.kind == "method":
                ablated.append((str(model), change.name, change.text, *row))
            else:
                value, factor = number(change.value, "g"), f"× {change.factor:.3g}"
                sensitive.append((str(model), change.field, value, factor, *row))
    return (
        Sheet("ablations", ("model", "variant", "change", *outcome), ablated),
        Sheet("sensitivity", ("model", "constant", "value", "factor", *outcome), sensitive),
    )


def _outcome(points: pd.DataFrame) -> tuple[str, str, str]:
    """Largest deviation of L0 from its target, largest share of dead features, settling."""
    off = number(float(points["l0_error"].abs().max()), ".1%")
    dead = number(float(points["dead_fraction"].max()), ".1%")
    return off, dead, settled(points) if "settling_step" in points else NONE


@dataclass(frozen=True)
class Sanity:
    """How trained SAEs fare against random ones.

    Attributes:
        sheet: the table.
        won: comparisons that the trained SAE won.
        total: comparisons there were.
        lost: the others, in words.
    """

    sheet: Sheet
    won: int
    total: int
    lost: Sequence[str] = field(default=())


def against_random(
    table: pd.DataFrame, results: Sequence[Result], consistency: Consistency
) -> Sanity:
    """Every trained SAE that is no variant beside the random one of its model, L0 and seed."""
    agreement = {key: score["pw_mcc"] for key, score in consistency.items()}
    keys = [tuple(key) for key in table[CURVE].to_numpy().tolist()]
    scored = table.assign(
        sweep_ratio=_sweep_ratios(results).reindex(table["place"]).to_numpy(float),
        pw_mcc=[agreement.get(key, np.nan) for key in keys],
    )
    plain = scored[scored["variant"] == ""]
    random, ours = plain[plain["line"] == RANDOM], plain[plain["line"] != RANDOM]
    pairs = ours.merge(random, on=["model", "L0_target", "seed"], suffixes=("", "_random"))
    lines = list(dict.fromkeys(ours["line"]))
    rows, won, total, lost = [], 0, 0, []
    for model, own in pairs.groupby("model", sort=False):
        for name, column, sign in MEASURES:
            if column not in own:
                continue
            both = own.dropna(subset=[column, f"{column}_random"])
            beaten = sign * (both[column] - both[f"{column}_random"]).astype(float) > 0
            won, total = won + int(beaten.sum()), total + len(beaten)
            lost += [f"{place}: {name}" for place in both.loc[~beaten, "place"]]
            if len(both):
                theirs = number(float(both[f"{column}_random"].astype(float).mean()))
                of_lines = [_tally(both[column], beaten, both["line"] == line) for line in lines]
                rows.append((str(model), name, theirs, *of_lines))
    return Sanity(Sheet("sanity", ("model", "measure", RANDOM, *lines), rows), won, total, lost)


def _tally(values: pd.Series[Any], beaten: pd.Series[Any], own: pd.Series[Any]) -> str:
    """The mean of a line's SAEs, and how many of them beat their random one."""
    if not own.any():
        return NONE
    mean = number(float(values[own].astype(float).mean()))
    return f"{mean} ({int(beaten[own].sum())} of {int(own.sum())})"


def _sweep_ratios(results: Sequence[Result]) -> pd.Series[Any]:
    """ΔCE over that of the random SAE at the same L0, largest over the sweep, by place.

    For the random SAE itself it is 1.
    """
    random = {
        (r.cell["model"], r.cell["L0_target"], r.cell["seed"]): _sweep(r)
        for r in results
        if r.line == RANDOM
    }
    found = {r.place: 1.0 for r in results if r.line == RANDOM}
    for result in results:
        cell = result.cell
        theirs = random.get((cell["model"], cell["L0_target"], cell["seed"]))
        ours = _sweep(result)
        if result.line != RANDOM and theirs is not None and ours is not None:
            inside = (ours[0] >= theirs[0][0]) & (ours[0] <= theirs[0][-1])
            expected = np.exp(np.interp(ours[0], *theirs))
            if inside.any():
                found[result.place] = float((np.exp(ours[1]) / expected)[inside].max())
    return pd.Series(found, dtype=float)


def _sweep(result: Result) -> tuple[Any, Any] | None:
    """Logarithms of L0, rising, and of ΔCE in a threshold sweep."""
    points = [(p["l0"], p["delta_ce"]) for p in result.data.get("threshold_sweep") or ()]
    logs = np.log(np.array(sorted(p for p in points if min(p) > 0), dtype=float).reshape(-1, 2))
    return (logs[:, 0], logs[:, 1]) if len(logs) > 1 else None
