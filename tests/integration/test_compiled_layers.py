"""Compiled and checkpointed layers give what plain ones give, without compiling again for other lengths."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lightning.batching.micro_batch import make_micro_batch
from rl_lightning.batching.spans import Spans
from rl_lightning.models.checkpointing import checkpoint_layers, kept_numbers, level_of, plan_levels
from rl_lightning.models.layers import compiled_graphs, decoder_layers
from rl_lightning.models.varlen import varlen_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from training_samples import Alone, fit, make_batch, write_model  # noqa: E402


def plain_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    outputs, repeats = [], query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    for q, k, v in zip(*(x.split(lengths) for x in (query, keys, values)), strict=True):
        distance = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
        seen = (distance >= 0) & (distance < (window or len(q)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_attention_is_attention_by_sequence(window: int | None) -> None:
    lengths = [5, 1, 9]
    inputs = [torch.randn(15, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(15, 4, 8, dtype=torch.float64)
    got = varlen_attention(*inputs, Spans.of(lengths, range(3)), 0.3, window)
    expected = plain_attention(*inputs, lengths, 0.3, window)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad((got * weights).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), inputs))


def gradient(module: Any, seed: int, share: bool = False) -> list[Tensor]:
    batch = make_batch(seed=seed, n_groups=2 + seed)
    module.zero_grad()
    module.score(make_micro_batch(batch, range(batch.n_seqs), share_prompts=share))[0].sum().backward()
    return [p.grad for p in module.parameters()]


def compile_for_test(module: Any) -> None:
    """What inductor makes of a graph does not matter here."""
    for layer in decoder_layers(module.model):
        for inner in layer.modules():
            inner.__dict__.pop("forward", None)
        layer.compile(dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_compiled_once_for_all_lengths(level: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3")
    plain, compiled = (Alone(folder, gradient_checkpointing=x) for x in ("none", level))
    for module in (plain, compiled):
        module.configure_model()
    compile_for_test(compiled)
    graphs = compiled_graphs()
    torch.testing.assert_close(gradient(compiled, 0), gradient(plain, 0), rtol=1e-3, atol=1e-4)
    assert compiled_graphs() == graphs + 1, "the two layers share one graph"
    for seed in range(1, 7):
        got, expected = gradient(compiled, seed, share=seed % 3 > 0), gradient(plain, seed)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert compiled_graphs() == graphs + 1, "whether prompts are shared is no part of the code either"


def test_compiled_shared_prompts_under_a_window_take_the_blocks(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    plain, compiled = Alone(folder), Alone(folder)
    for module in (plain, compiled):
        module.configure_model()
    compile_for_test(compiled)
    for share in (True, False):
        torch.testing.assert_close(gradient(compiled, 1, share), gradient(plain, 1), rtol=1e-3, atol=1e-4)


def test_compiled_shared_prompts_under_autocast(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3", num_hidden_layers=1)
    plain, compiled = Alone(folder, gradient_checkpointing="selective"), Alone(folder, gradient_checkpointing="selective")
    for module in (plain, compiled):
        module.configure_model()
    compile_for_test(compiled)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.cat([x.flatten() for x in gradient(compiled, 1, share=True)])
    expected = torch.cat([x.flatten() for x in gradient(plain, 1)])
    assert float((got - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("level", ["light", "selective", "full"])
def test_checkpointing_changes_no_gradient_and_can_be_undone(level: Any, tmp_path: Path) -> None:
    module = Alone(write_model(tmp_path, "qwen3"), dtype="float64")
    module.configure_model()
    kinds = [type(layer) for layer in decoder_layers(module.model)]
    expected = [gradient(module, 0, share) for share in (False, True)]
    checkpoint_layers(module.model, ["none", level])
    for share in (False, True):
        torch.testing.assert_close(gradient(module, 0, share), expected[share], rtol=0, atol=0)
    checkpoint_layers(module.model, "none")
    assert [type(layer) for layer in decoder_layers(module.model)] == kinds


def test_more_memory_means_less_recomputation(tmp_path: Path) -> None:
    module = Alone(write_model(tmp_path, "qwen3", num_hidden_layers=8))
    module.configure_model()
    kept, n_tokens = kept_numbers(module.model.config), 1000
    rank = {"none": 0, "light": 1, "selective": 2, "full": 3}
    before = plan_levels(module.model, n_tokens, 0.0)
    assert set(before) == {"full"}
    for spare in torch.linspace(0, 1.2 * 2 * n_tokens * kept["none"] * 10, 40).tolist():
        levels = plan_levels(module.model, n_tokens, spare)
        assert sum(rank[x] for x in levels) <= sum(rank[x] for x in before)
        if set(levels) != {"full"}:
            assert sum(2 * n_tokens * kept[x] for x in levels) <= spare
        before = levels
    assert set(before) == {"none"}


def test_the_old_values_of_the_option_still_work() -> None:
    assert [level_of(option) for option in (True, False, "auto")] == ["full", "none", "auto"]
    with pytest.raises(ValueError, match="gradient_checkpointing=half must be one of"):
        level_of("half")  # type: ignore[arg-type]


def test_without_compiling_no_graphs_are_reported(tmp_path: Path) -> None:
    module = Alone(write_model(tmp_path), gradient_checkpointing="auto")
    fit(module, [make_batch()])
    assert module.step_statistics["compiled_graphs"] == 0.0
