"""Operations that are counted against those that torch counts, and MFU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode
from training_samples import Alone, fit, make_batch, model_with_eyes, write_model

from rl_lightning.batching.layout import PackedLayout
from rl_lightning.batching.micro_batch import make_micro_batch
from rl_lightning.callbacks.throughput import Throughput
from rl_lightning.models.lora import LoRAConfig
from rl_lightning.models.operations import Operations
from rl_lightning.models.packed_model import hidden_states
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.types import Batch

ONE_UPDATE = PPOConfig(n_minibatches=1)


def test_pairs_are_those_that_see_each_other() -> None:
    assert PackedLayout([4], [0]).n_pairs == 10
    assert PackedLayout([4, 3, 2, 1], [0, 0, 0, 3]).n_pairs == 10 + (6 + 3 * 4) + (3 + 2 * 4) + 1


def counted_matrices(model: Any, batch: Batch, *, share: bool) -> tuple[float, float]:
    """Operations of the layers' matrices by torch and by `Operations`."""
    micro = make_micro_batch(batch, range(batch.n_seqs), share_prompts=share)
    operations = Operations.of(model)
    pairs = 6 * operations.pair * micro.layout.n_pairs
    head = 2 * (2 * operations.head + operations.trained_head) * len(micro.predictors)
    with FlopCounterMode(display=False) as counter:
        hidden_states(model, micro).square().sum().backward()
    by_kind = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in by_kind.items() if "attention" not in str(kind) and "bmm" not in str(kind))
    return products, operations.training(micro) - pairs - head


@pytest.mark.parametrize("share", [False, True])
def test_matrix_products_are_those_that_torch_counts(tmp_path: Path, share: bool) -> None:
    module = AsyncPPOModule(write_model(tmp_path, "qwen3"), dtype="float64")  # float32 may go through oneDNN, uncounted
    module.configure_model()
    expected, counted = counted_matrices(module.model, make_batch(), share=share)
    assert counted == expected


def test_a_token_goes_through_the_experts_that_it_is_sent_to() -> None:
    import transformers

    shape = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    shape |= {"num_key_value_heads": 2, "vocab_size": 50, "num_experts": 8, "num_experts_per_tok": 2}
    operations = Operations.of(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape)))
    attention, router, expert = 32 * (32 + 16 + 16 + 32), 32 * 8, 3 * 32 * 16
    assert operations.weights == operations.trained_weights == attention + router + 2 * expert


def test_models_of_other_make_are_counted() -> None:
    import transformers

    gpt2 = Operations.of(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)))
    assert (gpt2.weights, gpt2.head, gpt2.pair) == (2 * 12 * 32 * 32, 50 * 32, 2 * 2 * 32)
    gemma = Operations.of(model_with_eyes())  # those of its language model alone
    assert (gemma.weights, gemma.pair) == (2 * (2 * 32 * (32 + 16) + 3 * 32 * 48), 2 * 2 * 32)


def test_frozen_weights_take_no_gradient(tmp_path: Path) -> None:
    module = AsyncPPOModule(write_model(tmp_path), dtype="float64", lora=LoRAConfig(rank=2))
    module.configure_model()
    expected, counted = counted_matrices(module.model, make_batch(), share=False)
    assert counted == pytest.approx(expected, rel=0.1)  # the first layer's input takes no gradient
    operations = Operations.of(module.model)
    assert operations.trained_weights < operations.weights / 2 and operations.trained_head == 0


def trained(path: str, *batches: Batch, share: bool = True, ppo: PPOConfig = ONE_UPDATE, **options: Any) -> Alone:
    """After steps of 10 s on a device of a million operations a second."""
    ticks = iter(range(0, 1000, 10))
    module = Alone(path, ppo=ppo, share_prompts=share, **options)
    fit(module, batches, callbacks=[Throughput(clock=lambda: float(next(ticks)), peak_flops=1e6)])
    return module


@pytest.mark.parametrize("share", [False, True])
def test_mfu_is_of_what_a_step_runs(tmp_path: Path, share: bool) -> None:
    batch = make_batch()
    module = trained(write_model(tmp_path), batch, share=share)
    everything = make_micro_batch(batch, range(batch.n_seqs), share_prompts=share)
    assert module.operations == Operations.of(module.model).training(everything)
    assert module.step_statistics["throughput/mfu"] == pytest.approx(module.operations / 10 / 1e6)
    assert module.step_statistics["throughput/trained_tokens_per_s"] == len(batch.token_ids) / 10


def test_every_step_has_its_own_mfu(tmp_path: Path) -> None:
    path, small, large = write_model(tmp_path), make_batch(n_groups=1), make_batch(n_groups=6)
    [alone, together] = [trained(path, *batches) for batches in ([small], [large, small])]
    assert together.step_statistics["throughput/mfu"] == pytest.approx(alone.step_statistics["throughput/mfu"])
    assert together.operations > 3 * alone.operations


def test_passes_that_only_score_count_a_third(tmp_path: Path) -> None:
    path, batch = write_model(tmp_path), make_batch()
    alone = trained(path, batch).operations
    with_reference = trained(path, batch, ppo=replace(ONE_UPDATE, kl_ctl=0.1)).operations
    assert with_reference == pytest.approx(4 / 3 * alone)


def test_a_critic_counts_without_the_vocabulary(tmp_path: Path) -> None:
    path, batch = write_model(tmp_path), make_batch()
    module = trained(path, batch, init_critic_from_actor=True, ppo=replace(ONE_UPDATE, disable_value=False))
    actor, critic = Operations.of(module.model), Operations.of(module.critic)
    assert (critic.weights, critic.pair, critic.head) == (actor.weights, actor.pair, 32)
    micro = make_micro_batch(batch, range(batch.n_seqs), share_prompts=True)
    at_least = actor.training(micro) + critic.training(micro) + critic.forward(micro)  # and the ends of truncated answers
    assert at_least <= module.operations < 1.1 * at_least
