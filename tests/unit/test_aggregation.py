"""How much each token counts, against slow loops."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_samples import Tokens, naive_aggregate, tokens

from rl_lightning.objectives.aggregation import Aggregation, aggregate, denominator, token_weights
from rl_lightning.objectives.sequences import Sequences

MASK, STARTS = torch.tensor([True, True, False, True, False, False]), torch.tensor([0, 3, 4, 6], dtype=torch.int32)
aggregations = st.sampled_from(get_args(Aggregation))


@pytest.mark.parametrize(
    ("aggregation", "weights", "total"),
    [
        ("token-mean", [1, 1, 0, 1, 0, 0], 3),
        ("sequence-mean-token-mean", [0.5, 0.5, 0, 1, 0, 0], 2),
        ("sequence-mean-token-sum", [1, 1, 0, 1, 0, 0], 2),
        ("token-sum-norm", [1, 1, 0, 1, 0, 0], 2 * 2),
    ],
)
def test_three_answers_of_which_one_has_no_token(aggregation: Any, weights: list[float], total: float) -> None:
    assert token_weights(MASK, STARTS, aggregation=aggregation).tolist() == weights
    assert aggregate(torch.ones(6), MASK, STARTS, aggregation=aggregation).dtype == torch.float32
    assert float(denominator(MASK, STARTS, aggregation=aggregation)) == total


@given(tokens, aggregations)
@settings(max_examples=150, deadline=None)
def test_aggregation_equals_a_slow_loop(x: Tokens, aggregation: Any) -> None:
    got = aggregate(x.a, x.m, x.cu_seqlens, aggregation=aggregation)
    assert float(got) == pytest.approx(naive_aggregate(x.a.tolist(), x.loss_tokens(), aggregation), rel=1e-12, abs=1e-12)


@given(tokens, st.sampled_from(get_args(Aggregation)[:3]))
@settings(max_examples=50, deadline=None)
def test_denominators_of_parts_add_up(x: Tokens, aggregation: Any) -> None:
    parts = [x.part(i, i + 1) for i in range(x.n_seqs)]
    whole = denominator(x.m, x.cu_seqlens, aggregation=aggregation)
    total = sum(float(denominator(part.m, part.cu_seqlens, aggregation=aggregation)) for part in parts if part.m.any())
    assert float(whole) == max(1, total)


@given(tokens)
@settings(max_examples=50, deadline=None)
def test_sums_and_means_over_sequences_equal_a_slow_loop(x: Tokens) -> None:
    sequences = Sequences(x.m, x.cu_seqlens, needed_by="this test")
    sums, means = sequences.sums(x.a), sequences.means(x.a)
    for i, chosen in enumerate(x.loss_tokens()):
        total = math.fsum(float(x.a[t]) for t in chosen)
        assert float(sums[i]) == pytest.approx(total, abs=1e-12) and int(sequences.counts[i]) == len(chosen)
        for t in range(int(x.cu_seqlens[i]), int(x.cu_seqlens[i + 1])):
            assert float(means[t]) == pytest.approx(total / max(1, len(chosen)), abs=1e-12)


def test_the_mean_of_a_long_float32_answer_is_exact() -> None:
    values = torch.full((30_000,), 0.1)
    mean = Sequences(torch.ones(30_000, dtype=torch.bool), torch.tensor([0, 30_000]), needed_by="this test").means(values)
    assert mean.dtype == torch.float32 and torch.equal(mean, values)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregation=mean is unknown: choose one of token-mean, sequence-mean-token-mean"):
        token_weights(MASK, STARTS, aggregation="mean")  # type: ignore[arg-type]
    for aggregation in get_args(Aggregation)[1:]:
        for function in (token_weights, denominator):
            with pytest.raises(ValueError, match=f"aggregation={aggregation} looks at whole sequences: give cu_seqlens"):
                function(MASK, None, aggregation=aggregation)
    with pytest.raises(ValueError, match="cu_seqlens spans 6 tokens, but there are 5"):
        token_weights(MASK[:5], STARTS, aggregation="token-sum-norm")
