"""Sampling draws from the right distribution, reports the right log-probability, and repeats itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lightning.engines.sampling import SamplingRows, sample, uniforms


def rows_of(n: int, **changes: object) -> SamplingRows:
    values = {
        "temperature": np.ones(n, np.float32),
        "top_p": np.ones(n, np.float32),
        "top_k": np.full(n, -1, np.int64),
        "greedy": np.zeros(n, bool),
        "uniform": uniforms(np.arange(n, dtype=np.uint64), np.zeros(n, np.int64)),
        "banned": None,
    }
    values.update({k: np.full(n, v, values[k].dtype) if np.isscalar(v) else v for k, v in changes.items()})
    return SamplingRows(**values)


def allowed_naively(logits: np.ndarray, temperature: float, top_p: float, top_k: int, banned: set[int]) -> np.ndarray:
    """Probabilities of what may be drawn, by the definition."""
    p = np.exp(logits / temperature - np.max(logits / temperature))
    p[list(banned)] = 0
    p /= p.sum()
    keep, mass = [], 0.0
    for rank, token in enumerate(np.argsort(-p, kind="stable")):
        if (top_k != -1 and rank >= top_k) or (rank > 0 and mass >= top_p):
            break
        keep.append(token)
        mass += p[token]
    q = np.zeros_like(p)
    q[keep] = p[keep]
    return q / q.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "banned"),
    [(1.0, 1.0, -1, set()), (0.7, 1.0, -1, set()), (1.0, 0.6, -1, set()), (1.3, 1.0, 3, set()), (1.0, 0.8, 5, {0, 4})],
)
def test_frequencies_follow_the_distribution(temperature: float, top_p: float, top_k: int, banned: set[int]) -> None:
    logits = torch.tensor([1.0, 0.3, -0.4, 2.1, 1.7, -3.0, 0.9], dtype=torch.float64)
    n = 40_000
    stops = np.tile(np.array([*banned, -1]), (n, 1)) if banned else None
    tokens, _ = sample(logits.expand(n, -1), rows_of(n, temperature=temperature, top_p=top_p, top_k=top_k, banned=stops))
    found = np.bincount(tokens.numpy(), minlength=7) / n
    expected = allowed_naively(logits.numpy(), temperature, top_p, top_k, banned)
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=0.01)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(2, 700),
    spread=st.sampled_from([0.1, 1.0, 5.0, 60.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([-1, 1, 4, 600]),
)
def test_draws_are_allowed_and_logprobs_are_of_the_whole_distribution(
    seed: int, vocabulary: int, spread: float, temperature: float, top_p: float, top_k: int
) -> None:
    n = 8
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocabulary, generator=generator) * spread
    rows = rows_of(n, temperature=temperature, top_p=top_p, top_k=top_k)
    tokens, logprobs = sample(logits, rows)
    expected = (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    for row, token in zip(logits.double().numpy(), tokens.tolist(), strict=True):
        slack = min(1.0, top_p + 1e-6)
        assert allowed_naively(row, temperature, slack, top_k, set())[token] > 0 or top_p == 1


def test_greedy_takes_the_best_and_ignores_the_rest() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sample(logits, rows_of(5, greedy=True, top_p=0.1, top_k=2))
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)


def test_mixed_rows_equal_rows_alone() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(2)) * 3
    rows = rows_of(
        4,
        greedy=np.array([True, False, False, False]),
        top_p=np.array([1, 0.5, 1, 1], np.float32),
        top_k=np.array([-1, -1, 600, -1]),
        temperature=np.array([1, 0.8, 1, 1.5], np.float32),
        banned=np.array([[-1], [7], [-1], [3]]),
    )
    together, together_logprobs = sample(logits, rows)
    for i in range(4):
        alone = SamplingRows(*(getattr(rows, f)[i : i + 1] for f in SamplingRows.__slots__))
        token, logprob = sample(logits[i : i + 1], alone)
        assert token.item() == together[i].item()
        torch.testing.assert_close(logprob[0], together_logprobs[i])


def test_a_ban_holds_even_where_nothing_else_has_probability() -> None:
    logits = torch.tensor([[500.0, 0.0, 1.0, -2.0]])
    tokens, logprobs = sample(logits, rows_of(1, greedy=True, banned=np.array([[0, -1]])))
    assert tokens.item() == 2
    assert logprobs.item() == pytest.approx(-499.0)


def test_top_p_beyond_the_first_candidates_sees_the_whole_vocabulary() -> None:
    logits = torch.zeros(64, 4096)
    tokens, _ = sample(logits, rows_of(64, top_p=0.9))
    assert tokens.unique().numel() > 50


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-52])
def test_the_ends_of_the_unit_interval_draw_something_possible(uniform: float) -> None:
    logits = torch.full((1, 301), -torch.inf)
    logits[0, [5, 250]] = 0.0
    tokens, logprobs = sample(logits, rows_of(1, uniform=np.array([uniform])))
    assert tokens.item() == (5 if uniform < 0.5 else 250)
    assert logprobs.item() == pytest.approx(np.log(0.5))


def test_uniforms_are_pure_and_look_independent() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    positions = np.tile(np.arange(200), 200)
    u = uniforms(seeds, positions)
    np.testing.assert_array_equal(u[5:9], uniforms(seeds[5:9], positions[5:9]))
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == len(u)
    assert u.mean() == pytest.approx(0.5, abs=0.01) and u.var() == pytest.approx(1 / 12, abs=0.002)
    grid = u.reshape(200, 200)
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
