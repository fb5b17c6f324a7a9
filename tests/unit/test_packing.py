"""Packing, balancing, collating: nothing lost, no limit passed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_samples import Alone, fit, make_batch, make_groups, write_model

from rl_lightning.batching.balance import balance
from rl_lightning.batching.collate import collate
from rl_lightning.batching.filling import Family, fill
from rl_lightning.batching.micro_batch import make_micro_batch, pack_micro_batches
from rl_lightning.batching.packing import pack
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.types import Completion, Prompt, Rollout, RolloutGroup


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "min_groups", "expected"),
    [
        ([7, 5, 5, 4, 4, 3, 2, 1], 10, 1, [[0, 5], [1, 2], [3, 4, 6], [7]]),
        ([100, 200, 300, 150, 250], 500, 2, [[0], [1, 4], [2, 3]]),
        ([], 10, 3, []),
        ([3, 3], 10, 5, [[0], [1]]),
    ],
)
def test_allocation_of_the_paper(lengths: list[int], max_tokens: int, min_groups: int, expected: list[list[int]]) -> None:
    assert pack(lengths, max_tokens, min_groups=min_groups) == expected


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(64, 200), st.integers(1, 9))
def test_every_sequence_is_packed_once_within_the_limit(lengths: list[int], max_tokens: int, min_groups: int) -> None:
    groups = pack(lengths, max_tokens, min_groups=min_groups)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(group and sum(lengths[i] for i in group) <= max_tokens for group in groups)
    assert len(groups) >= min(min_groups, len(lengths))


def test_a_sequence_over_the_limit_is_named() -> None:
    with pytest.raises(ValueError, match="sequence of 11 tokens is longer than max_tokens_per_mb=10.*max_new_tokens"):
        pack([3, 11], 10)


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 6))
def test_balanced_parts_are_equally_many_and_close(loads: list[int], n_parts: int) -> None:
    loads = loads[: len(loads) // n_parts * n_parts]
    parts = balance(loads, n_parts)
    assert sorted(i for part in parts for i in part) == list(range(len(loads)))
    assert {len(part) for part in parts} == {len(loads) // n_parts}
    totals = [sum(loads[i] for i in part) for part in parts]
    assert not loads or max(totals) - min(totals) <= max(loads)


def test_what_cannot_be_dealt_equally_is_refused() -> None:
    with pytest.raises(ValueError, match="5 prompts cannot be dealt equally to 2 ranks"):
        balance([1] * 5, 2)


def test_collated_sequences_keep_every_number() -> None:
    groups = make_groups(seed=3)
    batch = collate(groups, version=7, wait_s=1.5)
    assert (batch.n_seqs, batch.version, batch.wait_s, batch.groups) == (12, 7, 1.5, tuple(groups))
    rows = [(group, rollout) for group in groups for rollout in group.rollouts]
    for i, (group, rollout) in enumerate(rows):
        begin, end = batch.cu_seqlens[i], batch.cu_seqlens[i + 1]
        answer = begin + batch.prompt_lens[i]
        assert batch.token_ids[begin:end].tolist() == [*group.prompt.token_ids, *rollout.completion.token_ids]
        np.testing.assert_array_equal(batch.behav_logprobs[answer:end], rollout.completion.logprobs)
        np.testing.assert_array_equal(batch.loss_mask[answer:end], rollout.loss_mask)
        assert not batch.loss_mask[begin:answer].any() and bool((batch.versions[begin:answer] == -1).all())
        assert batch.rewards[i] == rollout.reward and batch.group_ids[i] == group.index
        assert bool(batch.truncated[i]) == (rollout.completion.finish_reason == "length")
    assert batch.cu_seqlens[-1] == len(batch.token_ids) == len(batch.versions)


def test_an_empty_answer_and_an_empty_batch_are_refused() -> None:
    nothing = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), "stop")
    group = RolloutGroup(4, Prompt("q4", "", (1, 2)), (Rollout(nothing, "", 0.0, {}, np.zeros(0, bool)),))
    with pytest.raises(ValueError, match="'q4' .group 4. has no tokens"):
        collate([group])
    with pytest.raises(ValueError, match="at least one rollout"):
        collate([])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("max_tokens", [24, 60, 1000])
def test_micro_batches_score_every_loss_token_once(share: bool, max_tokens: int) -> None:
    batch = make_batch(seed=5, n_groups=4)
    packed = pack_micro_batches(batch, range(batch.n_seqs), max_tokens, share_prompts=share)
    micro_batches = [make_micro_batch(batch, chosen, share_prompts=share) for chosen in packed]
    assert sorted(s for m in micro_batches for s in m.sequences) == list(range(batch.n_seqs))
    sources = torch.cat([m.sources for m in micro_batches])
    assert torch.equal(sources.sort().values, torch.nonzero(batch.loss_mask).squeeze(1))
    for micro in micro_batches:
        assert micro.layout.n_tokens == len(micro.token_ids) <= max_tokens
        assert torch.equal(micro.targets, batch.token_ids[micro.sources])
        assert torch.equal(micro.token_ids[micro.predictors[micro.rows]], batch.token_ids[micro.sources - 1])
        for s, begin, end in zip(micro.sequences, micro.cu_seqlens, micro.cu_seqlens[1:], strict=False):
            assert bool(
                ((micro.sources[begin:end] >= batch.cu_seqlens[s]) & (micro.sources[begin:end] < batch.cu_seqlens[s + 1])).all()
            )


def test_shared_prompts_are_run_once_and_last_tokens_never() -> None:
    batch = make_batch(seed=6, n_groups=2)
    prompts = sum(len(g.prompt.token_ids) for g in batch.groups)
    answers = sum(len(r.completion) - 1 for g in batch.groups for r in g.rollouts)
    assert len(make_micro_batch(batch, range(batch.n_seqs), share_prompts=True).token_ids) == prompts + answers
    assert len(make_micro_batch(batch, range(batch.n_seqs)).token_ids) == 4 * prompts + answers


def test_a_limit_counts_what_is_run() -> None:
    batch = make_batch(seed=5, prompt_lens=(4, 5), answer_lens=(6, 7), n_groups=1)
    assert len(pack_micro_batches(batch, range(batch.n_seqs), 18)) == 2, "9 of 10 tokens are run"
    assert len(pack_micro_batches(batch, range(batch.n_seqs), 24, share_prompts=True)) == 1, "4 and 4 times 5"
    assert len(pack_micro_batches(batch, range(batch.n_seqs), 9)) == 4
    with pytest.raises(ValueError, match="sequence of 10 tokens is longer than max_tokens_per_mb=8: raise .* to at least 10"):
        pack_micro_batches(batch, range(batch.n_seqs), 8)


def test_sequences_off_the_loss_go_nowhere_and_pieces_are_split_on_demand() -> None:
    batch = make_batch(seed=7)
    batch.loss_mask[: batch.cu_seqlens[1]] = False
    packed = pack_micro_batches(batch, range(batch.n_seqs), 1000, min_groups=7, share_prompts=True)
    assert sorted(s for chosen in packed for s in chosen) == list(range(1, batch.n_seqs)) and len(packed) == 7


@pytest.mark.parametrize("budget", [8192, 16384, 32768])
@pytest.mark.parametrize("sigma", [0.9, 1.2])
def test_long_tailed_lengths_fill_their_micro_batches(budget: int, sigma: float) -> None:
    rng = random.Random(0)
    lengths = [max(16, min(8192, round(1024 * rng.lognormvariate(0, sigma)))) for _ in range(512)]
    filled = loads([Family(0, (i,), (length,)) for i, length in enumerate(lengths)], budget)
    assert sum(filled) / (len(filled) * budget) > 0.95
    assert max(filled) - min(filled) < 0.1 * budget


def loads(families: Sequence[Family], max_tokens: int, min_groups: int = 1) -> list[int]:
    """Tokens that each micro-batch runs, after a check that every answer is in one."""
    dealt = fill(families, max_tokens, min_groups=min_groups)
    assert sorted(m for members in dealt for m in members) == sorted(m for family in families for m in family.members)
    answers = {m: n for family in families for m, n in zip(family.members, family.answers, strict=True)}
    prompts = [sum(f.prompt for f in families if set(f.members) & set(members)) for members in dealt]
    return [prompt + sum(answers[m] for m in members) for prompt, members in zip(prompts, dealt, strict=True)]


def groups_of(n_groups: int, size: int, prompt: int, answer: int) -> list[Family]:
    return [Family(prompt, tuple(range(g * size, (g + 1) * size)), (answer - 1,) * size) for g in range(n_groups)]


def test_sequences_that_fit_exactly_do() -> None:
    assert loads(groups_of(16, 1, 1024, 1025), 16384) == [16384, 16384]


def test_micro_batches_are_equally_full_where_that_costs_nothing() -> None:
    assert sorted(loads(groups_of(16, 1, 1024, 1025), 16383)) == [10240, 10240, 12288]


def test_a_group_is_divided_where_that_saves_micro_batches() -> None:
    filled = loads(groups_of(7, 8, 128, 1024), 16384)  # 8,312 tokens a group: whole, one would go into each
    assert len(filled) == 4 and max(filled) - min(filled) < 1024
    assert sum(filled) <= 7 * 8312 + 3 * 128


def test_long_prompts_are_not_run_again_for_a_micro_batch_less() -> None:
    assert loads(groups_of(3, 8, 4000, 501), 15000) == [8000] * 3, "two of 14,000 would run 28,000"


def cut_where_full(families: Sequence[Family], max_tokens: int) -> list[int]:
    """Loads of families, each cut into as few parts as fit."""
    pieces: list[int] = []
    for family in families:
        begin = len(pieces)
        for answer in family.answers:
            if len(pieces) > begin and pieces[-1] + answer <= max_tokens:
                pieces[-1] += answer
            else:
                pieces.append(family.prompt + answer)
    return pieces


FAMILIES = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 60), min_size=1, max_size=8)), max_size=20)


@given(FAMILIES, st.integers(100, 300), st.integers(1, 9))
def test_filling_never_makes_more_micro_batches_than_whole_pieces(
    sizes: list[tuple[int, list[int]]], max_tokens: int, min_groups: int
) -> None:
    numbers = iter(range(1000))
    families = [Family(prompt, tuple(islice(numbers, len(answers))), tuple(answers)) for prompt, answers in sizes]
    filled, pieces = loads(families, max_tokens), cut_where_full(families, max_tokens)
    whole = len(pack(pieces, max_tokens))
    assert max(filled, default=0) <= max_tokens and len(filled) <= whole
    assert sum(filled) <= sum(pieces) + (whole - len(filled)) * max_tokens // 8
    finer = loads(families, max_tokens, min_groups)
    assert max(finer, default=0) <= max_tokens
    assert len(finer) >= min(min_groups, sum(len(family.members) for family in families))


def test_the_step_says_how_full_its_micro_batches_were(tmp_path: Path) -> None:
    batch = make_batch(prompt_lens=(4, 5), answer_lens=(6, 7), n_groups=3)
    module = Alone(write_model(tmp_path), ppo=PPOConfig(n_minibatches=1), max_tokens_per_mb=40, share_prompts=False)
    fit(module, [batch])
    assert module.step_statistics["packing_efficiency"] == pytest.approx(12 * 9 / (3 * 40)), "4 + 6 tokens, the last is not run"
