"""The page of features: what is collected, what it says, and that nothing in it can run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spalf.config import RunConfig
from spalf.dashboard import (
    Collector,
    anchor_drift,
    build_page,
    nearest_features,
    token_effects,
    token_strings,
)
from spalf.dashboard.collect import BINS, CONTEXTS, WINDOW
from spalf.errors import Interrupted, UserError
from spalf.interchange.export import export
from spalf.interchange.importing import import_sae
from spalf.models import load_tokenizer
from spalf.report.aggregate import aggregate
from spalf.steps.dashboard import dashboard
from tests.browser import pages
from tests.helpers_planted import (
    D_VOCAB,
    Run,
    context,
    planted_config,
    run_phases,
    write_calibration,
)
from tests.workflow.synthetic import evaluation

SITE = {"model_name": "planted", "hook_point": "planted.site"}
LIMIT = 25 * 2**20
"""Bytes a page of 8192 features may take."""


def unpacked(page: bytes) -> dict[str, Any]:
    """The page's blocks of data, as its own program reads them."""
    found = re.findall(
        r'<script type="application/octet-stream" id="([^"]+)">([^<]*)</script>', page.decode()
    )
    return {name: json.loads(zlib.decompress(base64.b64decode(text))) for name, text in found}


def summary_of(page: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.findall(r'id="summary">(.*?)</script>', page.decode())[0])
    return found


def feature(page: bytes, index: int) -> dict[str, Any]:
    blocks = unpacked(page)
    size = len(blocks["features-0"])
    found: dict[str, Any] = blocks[f"features-{index // size}"][index % size]
    return found


def context_text(page: bytes, found: list[Any]) -> tuple[list[str], str]:
    """The tokens of a context and the one at its peak."""
    blocks = unpacked(page)
    place, start, position, _, _ = found
    first, tokens = blocks["sequences-0"][place]
    shown = tokens[start - first : start - first + WINDOW]
    texts = [blocks["strings"][token] for token in shown]
    return texts, texts[position - start]


@pytest.fixture(scope="module")
def page() -> bytes:
    return pages.planted_page()


def test_contexts_are_the_strongest_ones_of_the_planted_feature(page: bytes) -> None:
    tokens = pages.planted_tokens()
    for j in (0, 3, 12):
        # OneTokenSAE fires most on the first occurrence of its token in a sequence.
        firsts = [row.tolist().index(j) for row in tokens if j in row]
        expected = sorted((2 - p / pages.SEQ_LEN for p in firsts), reverse=True)[:CONTEXTS]
        found = feature(page, j)["contexts"]
        assert [c[3] for c in found] == pytest.approx(expected, rel=1e-3)
        assert {context_text(page, c)[1] for c in found} == {pages.strings([j])[0]}
        assert len({c[0] for c in found}) == len(found), "one from each sequence"


def test_a_context_is_the_text_around_its_peak(page: bytes) -> None:
    tokens = pages.planted_tokens()
    strongest = feature(page, 12)["contexts"][0]
    texts, _ = context_text(page, strongest)
    hits = [(row, row.tolist().index(12)) for row in tokens if 12 in row]
    row, position = min(hits, key=lambda hit: hit[1])
    start = min(max(0, position - 40), pages.SEQ_LEN - WINDOW)
    assert texts == pages.strings(row[start : start + WINDOW].tolist())
    # Codes of the other tokens of the window: every occurrence of 12, and nothing else.
    offsets = strongest[4][::2]
    assert offsets == [i for i, t in enumerate(row[start : start + WINDOW].tolist()) if t == 12]
    assert strongest[4][2 * offsets.index(position - start) + 1] == 255


def test_a_feature_that_never_fires_says_so(page: bytes) -> None:
    table = unpacked(page)["table"]
    assert table["fired"][pages.SILENT] == 0
    assert table["fires_on"][pages.SILENT] is None
    assert feature(page, pages.SILENT)["contexts"] == []
    assert feature(page, pages.SILENT)["histogram"] == []


def test_the_list_holds_density_maximum_token_and_drift(page: bytes) -> None:
    blocks, tokens = unpacked(page), pages.planted_tokens()
    table, words = blocks["table"], blocks["strings"]
    counts = torch.bincount(tokens.flatten(), minlength=pages.N_TOKENS)[: pages.D_SAE]
    counts[pages.SILENT] = 0
    assert table["fired"] == counts.tolist()
    for j in set(range(pages.D_SAE)) - {pages.SILENT}:
        assert words[table["fires_on"][j]] == pages.strings([j])[0]
        assert table["max"][j] == pytest.approx(feature(page, j)["contexts"][0][3], rel=1e-3)
    assert [words[t] for t in table["anchor"]] == pages.strings(range(pages.N_ANCHORED))
    assert len(table["drift"]) == len(table["cosine"]) == pages.N_ANCHORED
    assert min(table["drift"]) > 0


@pytest.mark.parametrize("batch", [1, 5, 48])
def test_the_size_of_batches_changes_nothing(batch: int) -> None:
    one, other = pages.planted_data(), pages.planted_data(batch)
    for name in ("peak", "sequence", "position", "window"):
        assert torch.equal(getattr(one.contexts, name), getattr(other.contexts, name))
    assert torch.equal(one.statistics.histogram, other.statistics.histogram)
    assert torch.equal(one.statistics.fired, other.statistics.fired)


class Scaled:
    """Two features: the absolute value of the activation, and a hundredth of it."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        z = x.abs() * torch.tensor([1.0, 0.01])
        return z * (z > torch.tensor([0.5, 0.005]))


def test_histograms_widen_and_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, 1, generator=generator) * torch.logspace(-2, 2, 64)[:, None, None]
    collector = Collector(Scaled(), torch.tensor([0.5, 0.005]), seq_len=20)
    for some in x.split(7):
        collector.add(some)
    found = collector.statistics()
    z = Scaled().encode(x.flatten(0, 1))
    for j in range(2):
        width = float(found.bin_width[j])
        edges = np.arange(BINS + 1) * width
        active = z[z[:, j] > 0, j].double().numpy()
        assert found.histogram[j].tolist() == np.histogram(active, edges)[0].tolist()
        assert edges[BINS // 2] <= active.max() < edges[BINS]
        assert found.fired[j] == len(active)
        assert float(found.mean[j]) == pytest.approx(active.mean(), rel=1e-5)
        assert float(found.maximum[j]) == pytest.approx(active.max())


def test_codes_that_are_not_finite_are_refused() -> None:
    collector = Collector(Scaled(), torch.ones(2), seq_len=4)
    with pytest.raises(UserError, match="not all features are finite"):
        collector.add(torch.full((1, 4, 1), torch.inf))


def test_promoted_tokens_are_decoder_times_unembedding() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(5, 8, generator=generator)
    W_U = torch.randn(8, 30, generator=generator)
    W_U[:, 27:] = 1e3  # padding of the vocabulary
    found = token_effects(W_dec, W_U, n_tokens=27, k=4)
    effect = W_dec @ W_U[:, :27]
    effect -= effect.mean(dim=1, keepdim=True)
    order = effect.argsort(dim=1, descending=True)
    assert torch.equal(found.promoted, order[:, :4])
    assert torch.equal(found.suppressed, order[:, -4:].flip(1))
    torch.testing.assert_close(found.promoted_effect, effect.gather(1, order[:, :4]))
    torch.testing.assert_close(found.suppressed_effect, effect.gather(1, order[:, -4:].flip(1)))


def test_nearest_features_leave_out_the_feature_itself() -> None:
    W_dec = torch.tensor([[1.0, 0], [2.0, 0.2], [0, 1], [-1, 0]])
    near, cosine = nearest_features(W_dec, k=10)
    assert near.tolist()[0] == [1, 2, 3]
    assert near.shape == cosine.shape == (4, 3)
    assert cosine[0].tolist() == pytest.approx([2 / 4.04**0.5, 0, -1])


def test_drift_is_relative_to_the_length_of_the_anchor() -> None:
    anchors = torch.tensor([[2.0, 0], [0, 4]])
    W_dec = torch.tensor([[2.0, 1], [0, 4], [9, 9]])
    distance, cosine = anchor_drift(W_dec, anchors)
    assert distance.tolist() == [0.5, 0]
    assert cosine.tolist() == pytest.approx([2 / 5**0.5, 1])


def test_token_strings_of_a_bundled_tokenizer_spell_the_text() -> None:
    tokenizer = load_tokenizer("spalf/demo-2l")
    text = "def main(self):\n    return  None  # end\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 5
    assert "".join(token_strings(tokenizer, ids)) == text
    assert token_strings(tokenizer, []) == []
    # Half of a character has no text; it is named as the tokenizer names it.
    halves = token_strings(tokenizer, tokenizer.encode("é😀", add_special_tokens=False))
    assert all(half and "\ufffd" not in half for half in halves)


def test_token_strings_keep_the_space_that_decoders_drop() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "▁a", "▁cat", "s", "▁"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert tokenizer.decode([2]) == "cat"
    assert token_strings(tokenizer, [1, 2, 3]) == [" a", " cat", "s"]


class Elements(HTMLParser):
    """Every element of a page, as a browser would find it."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_hostile_text_adds_no_element() -> None:
    title = "</title><script>alert(1)</script>"
    cell = {"model": '</script><img src="x">', "model_name": "m", "hook_point": "h"}
    cell |= {"method": "spalf", "variant": ""}
    hostile = pages.planted_page(title, cell={**cell, "L0_target": 8.0, "seed": 0})
    harmless, found = Elements(pages.planted_page("harmless")), Elements(hostile)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    assert ("h1", title) in found.texts
    assert b"alert(1)" not in hostile.replace(b"&gt;alert(1)&lt;", b"")
    assert not found.named("img")


def test_tokens_travel_inside_compressed_blocks_only(page: bytes) -> None:
    """So no token, whatever it is, is ever read as markup."""
    assert set(pages.HOSTILE) <= set(unpacked(page)["strings"])
    for token in ("<img src=x", "{{ title }}", "\u202e"):
        assert token.encode() not in page


def test_the_page_asks_for_nothing_and_runs_only_its_own_scripts(page: bytes) -> None:
    found = Elements(page)
    links = [
        value
        for _, attributes in found.tags
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset", "data")
    ]
    assert links
    assert all(link and link.startswith(("#", "data:,")) for link in links)
    assert not [name for _, attributes in found.tags for name in attributes if name[:2] == "on"]
    text = page.decode()
    policy = found.named("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for pattern in (r"<script>(.*?)</script>", r"<style>(.*?)</style>"):
        contents = re.findall(pattern, text, flags=re.DOTALL)
        assert contents
        for content in contents:
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
    assert "\r" not in text  # a browser would change it, and with it the digests


def test_the_library_is_named_with_its_licence(page: bytes) -> None:
    assert b"uPlot-1.6.32" in page
    assert b"uPlot (v1.6.32)" in page
    assert b"The MIT License" in page
    assert b"Leon Sorokin" in page


def test_equal_inputs_give_equal_bytes(page: bytes) -> None:
    assert pages.planted_page() == page
    assert pages.planted_page("another") != page


def test_a_page_of_8192_features_is_small_and_in_pieces() -> None:
    large = pages.large_page()
    assert len(large) < LIMIT
    blocks = unpacked(large)
    assert len(blocks["table"]["fired"]) == 8192
    assert len([name for name in blocks if name.startswith("features-")]) == 128
    shown = feature(large, 8191)
    assert len(shown["contexts"]) == CONTEXTS
    assert len(shown["promoted"][0]) == 10


def test_numbers_that_are_not_finite_stay_out_of_the_page() -> None:
    data = pages.planted_data()
    data.threshold[3] = np.nan
    row = {**pages.log()[0], "lambda_faith": float("nan")}
    summary = pages.summary(data, pages.N_ANCHORED, log=[row])
    assert summary["traces"]["lambda_faith"] == [None]
    assert unpacked(build_page("t", summary, data, pages.strings, ""))["table"]["threshold"][3] is (
        None
    )


def test_a_long_log_is_thinned_and_keeps_its_end() -> None:
    data = pages.planted_data()
    rows = pages.log(10_000)
    traces = pages.summary(data, 0, log=rows)["traces"]
    assert traces["every"] == 7
    assert len(traces["tokens"]) <= 1501
    assert traces["tokens"][-1] == rows[-1]["tokens"]
    assert traces["phase2"] == next(row["tokens"] for row in rows if row["phase"] == 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("planted")
    config = planted_config(evaluate={"tokens": 2048}, method={"v_cap": 6})
    return run_phases(config, write_calibration(config, directory / "calibration"), directory)


class Words:
    """A tokenizer of the planted vocabulary."""

    def __len__(self) -> int:
        return D_VOCAB

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0]

    def batch_decode(self, sequences: list[list[int]], **_: Any) -> list[str]:
        return ["".join(f" {i}" for i in ids) for ids in sequences]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]


def write(run: Run, out: Path, config: RunConfig | None = None, **options: Any) -> bytes:
    phases = {"phase1": run.directory / "phase1", "phase2": run.directory / "phase2"}
    phases = options.pop("phases", phases)
    calibration = options.pop("calibration", run.directory / "calibration")
    made = options.pop("context", context())
    with mock.patch("spalf.steps.dashboard.load_tokenizer", lambda *_, **__: Words()):
        dashboard(config or run.config, calibration, phases, out, made, **options)
    return out.read_bytes()


def test_the_step_writes_the_same_page_twice(run: Run, tmp_path: Path) -> None:
    first = write(run, tmp_path / "a.html", model_label="tiny")
    assert write(run, tmp_path / "b.html", model_label="tiny") == first
    assert {path.name for path in tmp_path.glob("*.html*")} == {"a.html", "b.html"}
    table = unpacked(first)["table"]
    assert len(table["fired"]) == run.config.F
    assert len(table["anchor"]) == 6
    # The log of both phases, one row a step.
    summary = summary_of(first)
    assert len(summary["traces"]["tokens"]) == len(run.rows("phase1")) + len(run.rows("phase2"))
    assert summary["tokens"] == 2048


def test_the_step_reads_what_the_sae_encodes(run: Run, tmp_path: Path) -> None:
    from spalf.data import TokenSplits
    from spalf.training.state import load_sae

    page = write(run, tmp_path / "page.html")
    sae = load_sae(run.checkpoint("phase2"), run.config, torch.device("cpu"))
    tokens = TokenSplits.open(run.directory / "calibration" / "tokens").evaluation
    x = context().load_model(run.config).activations(tokens.sequences(0, 128, seed=0))
    with torch.no_grad():
        z = sae.encode(x.flatten(0, 1))
    table = unpacked(page)["table"]
    assert table["fired"] == (z > 0).sum(dim=0).tolist()
    assert table["max"] == pytest.approx(z.amax(dim=0).tolist(), rel=1e-3)


def test_the_step_refuses_what_it_cannot_use(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    other = tmp_path / "evaluation.json"
    with pytest.raises(UserError, match="no such file"):
        write(run, out, evaluation=tmp_path / "none.json")
    other.write_text(json.dumps(evaluation("tiny", 8.0, **SITE)))
    with pytest.raises(UserError, match="is of another SAE: its L0_target is 8"):
        write(run, out, evaluation=other)
    with pytest.raises(UserError, match="is missing; run its step again"):
        write(run, out, calibration=tmp_path / "none")
    assert not out.parent.exists()


def test_the_frontier_is_that_of_the_model_and_marks_the_sae(run: Run, tmp_path: Path) -> None:
    cells = {
        "own": evaluation("tiny", 4.0, **SITE, F=64),
        "denser": evaluation("tiny", 8.0, **SITE, F=64),
        "variant": evaluation("tiny", 4.0, **SITE, F=64, variant="no-anchors"),
        "elsewhere": evaluation("other", 4.0),
    }
    for name, content in cells.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    frontier, _ = aggregate([tmp_path / f"{name}.json" for name in cells], tmp_path)
    given = {"evaluation": tmp_path / "own.json", "frontier": frontier, "model_label": "tiny"}
    summary = summary_of(write(run, tmp_path / "page.html", **given))
    rows = {(row["method"], row["L0_target"]): row["own"] for row in summary["frontier"]}
    assert rows == {("spalf", 4): True, ("spalf", 8): False, ("spalf no-anchors", 4): False}
    expected = cells["own"]["phases"]["phase2"]["delta_ce"]
    assert dict(summary["facts"])["ΔCE (nats)"] == f"{expected:.3f}"
    with pytest.raises(UserError, match="is of another SAE: its variant is no-anchors"):
        write(run, tmp_path / "b.html", **given | {"evaluation": tmp_path / "variant.json"})


def as_saelens(run: Run, out: Path, k: int | None = None) -> Path:
    """The run's SAE in SAELens's format, or a TopK one with its weights."""
    export(run.directory / "phase2", out, "saelens")
    if k is None:
        return out
    weights = load_file(out / "sae_weights.safetensors")
    weights.pop("threshold")
    save_file(weights, out / "sae_weights.safetensors")
    config = json.loads((out / "cfg.json").read_text())
    (out / "cfg.json").write_text(json.dumps({**config, "architecture": "topk", "k": k}))
    return out


def test_an_sae_of_saelens_has_a_page_too(run: Run, tmp_path: Path) -> None:
    import_sae(as_saelens(run, tmp_path / "source"), tmp_path / "theirs")
    report = evaluation("tiny", 4.0, **SITE, F=64, method="theirs")
    report |= {"final": "sae", "phases": {"sae": report["phases"]["phase2"]}}
    (tmp_path / "e.json").write_text(json.dumps(report))
    frontier, _ = aggregate([tmp_path / "e.json"], tmp_path)
    given = {"evaluation": tmp_path / "e.json", "frontier": frontier, "model_label": "tiny"}
    page = write(run, tmp_path / "p.html", phases={"sae": tmp_path / "theirs"}, **given)
    ours, theirs = unpacked(write(run, tmp_path / "ours.html"))["table"], unpacked(page)["table"]
    assert theirs["max"] == pytest.approx(ours["max"], rel=1e-2)
    assert np.abs(np.subtract(theirs["fired"], ours["fired"])).sum() <= 4
    assert theirs["promotes"] == ours["promotes"] and theirs["anchor"] == []
    summary = summary_of(page)
    assert summary["anchored"] == 0 and summary["traces"]["tokens"] == []
    assert [row["own"] for row in summary["frontier"]] == [True]
    assert ("h1", "tiny · planted.site · theirs · L0 4 · seed 0") in Elements(page).texts


def test_an_sae_that_keeps_the_largest_has_no_thresholds(run: Run, tmp_path: Path) -> None:
    folder = as_saelens(run, tmp_path / "topk", k=3)
    page = write(run, tmp_path / "page.html", phases={"sae": folder})
    table = unpacked(page)["table"]
    assert sum(table["fired"]) == pytest.approx(3 * 2048, rel=0.05)
    assert set(table["threshold"]) == {None}
    assert summary_of(page)["threshold"] is None
    assert "sae_weights.safetensors" in page.decode() and "topk" in page.decode()


def test_an_sae_of_another_width_is_refused(run: Run, tmp_path: Path) -> None:
    folder = as_saelens(run, tmp_path / "narrow")
    weights = load_file(folder / "sae_weights.safetensors")
    narrow = {"W_enc": weights["W_enc"][:2], "W_dec": weights["W_dec"][:, :2].contiguous()}
    save_file(
        {**weights, **narrow, "b_dec": weights["b_dec"][:2]}, folder / "sae_weights.safetensors"
    )
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "d_in": 2}))
    with pytest.raises(UserError, match="is for activations of width 2"):
        write(run, tmp_path / "page.html", phases={"sae": folder})
    assert not (tmp_path / "page.html").exists()


def test_a_step_that_is_stopped_leaves_no_page(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(Interrupted):
        write(run, out, context=context(should_stop=lambda: True))
    assert not out.exists()
