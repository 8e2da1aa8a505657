"""The mixing buffer, the harvest, and patched losses (M16, M18, I8, I9)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from spalf.activations import (
    ActivationStore,
    buffer_position,
    mixed_batches,
    next_token_cross_entropy,
    next_token_kl,
)
from spalf.activations import store as store_module
from spalf.activations.ring import BlockRing, Blocks
from spalf.errors import StopRequested
from spalf.models import load_model
from tests.helpers_planted import D_MODEL, D_VOCAB, SEQ_LEN, PlantedModel, stream

BLOCK, BATCH = 64, 8


def numbered(index: int) -> Iterator[Tensor]:
    """Block k holds the numbers k·BLOCK to (k+1)·BLOCK − 1, one an activation; in two parts."""
    numbers = torch.arange(index * BLOCK, (index + 1) * BLOCK, dtype=torch.float32).unsqueeze(1)
    yield from numbers.split(BLOCK // 2)


def ring(blocks: Blocks = numbered, **options: Any) -> BlockRing:
    return BlockRing(blocks, BLOCK, torch.device("cpu"), **options)


def batches(count: int, start: int = 0, seed: int = 0, blocks: BlockRing | None = None) -> Tensor:
    drawn_from = ring() if blocks is None else blocks
    served = mixed_batches(drawn_from, batch_size=BATCH, seed=seed, start_step=start)
    return torch.stack(list(islice(served, count))).squeeze(-1)


def chunks(count: int) -> list[Tensor]:
    """The first chunks: half a block, then whole ones."""
    half, whole = BLOCK // 2 // BATCH, BLOCK // BATCH
    flat = batches(half + (count - 1) * whole).flatten()
    return list(flat.split([BLOCK // 2] + [BLOCK] * (count - 1)))


def test_m18_each_activation_is_served_exactly_once() -> None:
    served = torch.cat(chunks(9)).long()
    complete = served[served < 8 * BLOCK]
    assert torch.equal(complete.sort().values, torch.arange(8 * BLOCK))
    assert torch.equal(served.unique().sort().values, served.sort().values), "nothing twice"
    assert len(served) == 8 * BLOCK + BLOCK // 2


def test_m18_each_chunk_mixes_one_half_of_each_of_two_neighbours() -> None:
    for index, chunk in enumerate(chunks(6)):
        origin, counts = (chunk // BLOCK).unique(return_counts=True)
        expected = {0: BLOCK // 2} if index == 0 else dict.fromkeys((index - 1, index), BLOCK // 2)
        assert dict(zip(origin.long().tolist(), counts.tolist(), strict=True)) == expected


def test_m18_a_batch_is_a_random_sample_of_its_chunk() -> None:
    """Within a chunk the order is shuffled: batches mix both blocks, and are not sorted."""
    for chunk in chunks(6)[1:]:
        rows = chunk.view(-1, BATCH)
        mixed = [(row // BLOCK).unique().numel() == 2 for row in rows]
        assert sum(mixed) >= len(mixed) - 1
        assert not torch.equal(chunk, chunk.sort().values)


def test_i9_a_resume_at_any_step_continues_bit_identically() -> None:
    straight = batches(60)
    for start in range(45):
        assert torch.equal(batches(12, start), straight[start : start + 12]), start


@pytest.mark.parametrize("start", range(0, 40, 3))
def test_i9_a_resume_asks_for_two_blocks_only(start: int) -> None:
    asked: list[int] = []
    batches(1, start, blocks=ring(noting(asked)))
    chunk, _ = buffer_position(start, BATCH, BLOCK)
    assert asked == ([chunk - 1, chunk] if chunk else [0])
    asked.clear()
    batches(30, start, blocks=ring(noting(asked)))
    assert asked == list(range(asked[0], asked[-1] + 1)), "each later block once, in order"


def noting(asked: list[int]) -> Blocks:
    """`numbered`, writing down which blocks are made."""

    def blocks(index: int) -> Iterator[Tensor]:
        asked.append(index)
        return numbered(index)

    return blocks


@pytest.mark.parametrize("ahead", [False, True])
def test_runs_in_step_share_every_block(ahead: bool) -> None:
    asked: list[int] = []
    shared = ring(noting(asked), ahead=ahead, last=7)
    served = [mixed_batches(shared, batch_size=BATCH, seed=seed) for seed in (0, 1, 0)]
    together = torch.stack([torch.stack([next(run) for run in served]) for _ in range(60)])
    shared.close()
    for place, seed in enumerate((0, 1, 0)):
        assert torch.equal(together[:, place].squeeze(-1), batches(60, seed=seed))
    assert asked == list(range(8)), "chunk 7 is the last of 60 batches"


def test_a_run_that_is_behind_gets_its_own_batches() -> None:
    shared = ring()
    early, late = (
        mixed_batches(shared, batch_size=BATCH, seed=0, start_step=start) for start in (0, 30)
    )
    one, two = [], []
    for _ in range(20):
        one.append(next(early))
        two.append(next(late))
    assert torch.equal(torch.stack(one).squeeze(-1), batches(20))
    assert torch.equal(torch.stack(two).squeeze(-1), batches(20, start=30))


@pytest.mark.parametrize("start", [0, 3, 4, 17, 44])
def test_blocks_harvested_ahead_change_nothing(start: int) -> None:
    asked: list[int] = []
    blocks = ring(noting(asked), ahead=True)
    assert torch.equal(batches(40, start, blocks=blocks), batches(40, start))
    blocks.close()
    chunk, _ = buffer_position(start + 39, BATCH, BLOCK)
    assert asked == list(range(asked[0], asked[-1] + 1)), "each block once, in order"
    assert asked[-1] <= chunk + 1


def test_what_goes_wrong_while_harvesting_ahead_is_raised_where_the_block_is_needed() -> None:
    def failing(index: int) -> Iterator[Tensor]:
        if index == 2:
            raise StopRequested
        return numbered(index)

    served = mixed_batches(ring(failing, ahead=True), batch_size=BATCH, seed=0)
    first_of_chunk_two = 4 + 8
    assert len(list(islice(served, first_of_chunk_two))) == first_of_chunk_two
    with pytest.raises(StopRequested):
        next(served)


def test_closing_ends_a_harvest_between_two_parts() -> None:
    begun, go_on = threading.Event(), threading.Event()
    parts: list[int] = []

    def slow(index: int) -> Iterator[Tensor]:
        for part in numbered(index):
            if index == 1:
                begun.set()
                go_on.wait(10)
                parts.append(index)
            yield part

    blocks = ring(slow, ahead=True)
    batches(1, blocks=blocks)
    assert begun.wait(10)
    closing = threading.Thread(target=blocks.close)
    closing.start()
    while not blocks.closed:
        time.sleep(0.001)
    go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    assert parts == [1], "the second part was not asked for"


def test_batches_do_not_depend_on_the_global_generator_nor_touch_it() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = batches(20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(batches(20), one)


def test_the_seed_decides_the_order() -> None:
    assert not torch.equal(batches(20, seed=0), batches(20, seed=1))


def test_positions_in_the_buffer() -> None:
    assert buffer_position(0, 8, 64) == (0, 0)
    assert buffer_position(3, 8, 64) == (0, 24)
    assert buffer_position(4, 8, 64) == (1, 0)
    assert buffer_position(11, 8, 64) == (1, 56)
    assert buffer_position(12, 8, 64) == (2, 0)


def test_a_batch_may_not_straddle_two_chunks() -> None:
    with pytest.raises(ValueError, match=r"multiple of 2·batch_size"):
        next(mixed_batches(ring(), batch_size=24, seed=0))


def test_harvest_is_the_same_in_passes_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlantedModel()
    store = ActivationStore(model, stream(50, 0))
    whole = store.harvest(7, 13)
    assert whole.shape == (13 * SEQ_LEN, D_MODEL)
    assert torch.equal(whole, model.activations(store.sequences(7, 13)).flatten(0, 1))
    model.calls.clear()
    monkeypatch.setattr(store_module, "HARVEST_TOKENS", 4 * SEQ_LEN)
    assert torch.equal(store.harvest(7, 13), whole)
    assert model.calls == [4, 4, 4, 1]


def test_store_batches_are_the_blocks_of_the_training_order() -> None:
    store = ActivationStore(PlantedModel(), stream(50, 0))
    block_tokens = 8 * SEQ_LEN
    served = torch.cat(list(islice(store.batches(SEQ_LEN, block_tokens, seed=3), 4 + 8)))
    harvested = store.harvest(0, 16)
    key = served @ torch.arange(1.0, D_MODEL + 1)
    known = harvested @ torch.arange(1.0, D_MODEL + 1)
    assert torch.isin(key, known).all()
    assert len(key) == 12 * SEQ_LEN
    in_first_block = torch.isin(known[:block_tokens], key)
    assert in_first_block.all(), "the whole first block has been served by the end of chunk 1"


def test_clean_logits_of_the_latest_sequences_are_worked_out_once() -> None:
    model = PlantedModel()
    store = ActivationStore(model, stream(50, 0))
    tokens = store.sequences(4, 3)
    assert store.sequences(4, 3) is tokens
    assert torch.equal(store.clean_logits(tokens), model.logits(tokens))
    model.calls.clear()
    store.clean_logits(store.sequences(4, 3))
    assert not model.calls
    store.clean_logits(store.sequences(5, 3))
    assert model.calls == [3]


def test_kl_known_answers() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    original, patched = p.log().expand(3, 4, 2), q.log().expand(3, 4, 2)
    kl = next_token_kl(original + 7.0, patched)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl.shape == (3, 3), "next-token positions only"
    torch.testing.assert_close(kl, torch.full((3, 3), expected))
    assert not next_token_kl(original, original).any()
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    torch.testing.assert_close(next_token_kl(patched, original), torch.full((3, 3), reverse))


def test_cross_entropy_known_answers() -> None:
    tokens = torch.tensor([[1, 0, 2, 2]])
    uniform = next_token_cross_entropy(torch.zeros(1, 4, 5), tokens)
    torch.testing.assert_close(uniform, torch.full((1, 3), math.log(5)))
    logits = torch.zeros(1, 4, 5)
    logits[0, 0, 0] = logits[0, 1, 2] = logits[0, 2, 2] = 50.0
    assert next_token_cross_entropy(logits, tokens).max() < 1e-6, "position t predicts t + 1"


def test_losses_of_a_patched_linear_model() -> None:
    model = PlantedModel()
    tokens = stream(3, 0).sequences(0, 3)
    clean = model.logits(tokens)
    halved = model.patched_logits(tokens, lambda x: 0.5 * x)
    kl = next_token_kl(clean, halved)
    torch.testing.assert_close(kl, next_token_kl(clean, 0.5 * clean), atol=1e-4, rtol=1e-4)
    ce = next_token_cross_entropy(halved, tokens)
    torch.testing.assert_close(ce, next_token_cross_entropy(0.5 * clean, tokens))
    zeroed = next_token_cross_entropy(model.patched_logits(tokens, torch.zeros_like), tokens)
    torch.testing.assert_close(zeroed, torch.full((3, SEQ_LEN - 1), math.log(D_VOCAB)))


def test_i8_identity_patch_is_exact_and_a_real_patch_carries_gradient() -> None:
    model = load_model("spalf/demo-2l", "blocks.1.hook_resid_post", device="cpu")
    tokens = torch.randint(0, model.d_vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    clean = model.logits(tokens)
    same = model.patched_logits(tokens, lambda x: x)
    assert not next_token_kl(clean, same).any()
    assert torch.equal(same, clean)
    factor = torch.tensor(0.5, requires_grad=True)
    # Scaling alone would be undone by the layer norm that follows.
    patched = model.patched_logits(tokens, lambda x: factor * x + (1 - factor) * x.flip(-1))
    kl = next_token_kl(clean, patched)
    assert (kl > 0).all()
    kl.mean().backward()
    assert factor.grad is not None
    assert factor.grad < 0, "closer to the original is a smaller divergence"
