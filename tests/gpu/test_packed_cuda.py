"""The packed forward and backward pass on CUDA in bfloat16 is as good as an ordinary padded one in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lightning.batching.collate import collate
from rl_lightning.batching.micro_batch import make_micro_batch
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.types import Batch, Completion, Prompt, Rollout, RolloutGroup

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
SHAPE: dict[str, Any] = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2}


def make_batch(seed: int = 0, n_groups: int = 6, group_size: int = 4, longest: int = 200) -> Batch:
    """Random prompts and answers of very different lengths."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(n_groups):
        prompt = Prompt(str(index), "", tuple(rng.integers(3, 48, rng.integers(2, 60)).tolist()))
        lengths = rng.integers(1, longest, group_size)
        answers = [rng.integers(3, 48, n).astype(np.int32) for n in lengths]
        completions = [Completion(ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), "stop") for ids in answers]
        rollouts = tuple(Rollout(c, "", 0.0, {}, np.ones(len(c), dtype=bool)) for c in completions)
        groups.append(RolloutGroup(index, prompt, rollouts))
    return collate(groups)


def padded_logprobs(model: Any, batch: Batch) -> Tensor:
    """(M,) by transformers' own padded forward pass, in the order of the batch's loss tokens."""
    starts = batch.cu_seqlens.tolist()
    rows = [batch.token_ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(DEVICE)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(DEVICE)
    logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    scored = logprobs.gather(2, ids[:, 1:, None])[:, :, 0]
    return torch.cat([scored[i, n - 1 : len(row) - 1] for i, (row, n) in enumerate(zip(rows, batch.prompt_lens, strict=True))])


def packed_logprobs(module: AsyncPPOModule, batch: Batch, share: bool = False) -> Tensor:
    """(M,) by ours, in the same order; gradients flow."""
    micro = make_micro_batch(batch, range(batch.n_seqs), share_prompts=share, device=DEVICE)
    assert micro.layout.shared == share
    logprobs, _ = module.score(micro)
    return logprobs[torch.argsort(micro.sources).to(DEVICE)]


def gradients(model: torch.nn.Module, logprobs: Tensor) -> Tensor:
    """All gradients of a fixed random mixture of log-probabilities, as one vector."""
    generator = torch.Generator().manual_seed(0)
    (logprobs * torch.randn(len(logprobs), generator=generator).to(DEVICE)).sum().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def distance(values: Tensor, reference: Tensor) -> float:
    """Of vectors, as a share of the reference's length."""
    return float((values - reference).norm() / reference.norm())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_packed_is_as_close_to_float32_as_padded(weights: Any, share: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, batch = str(write_tiny_model(tmp_path, **SHAPE)), make_batch()

    def plain(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(DEVICE)

    exact, padded = plain(torch.float32), plain(getattr(torch, weights))
    module = AsyncPPOModule(folder, dtype=weights)
    module.configure_model()
    module.to(DEVICE)
    truth = padded_logprobs(exact, batch)
    with torch.autocast(DEVICE, torch.bfloat16):
        by_padding, by_packing = padded_logprobs(padded, batch), packed_logprobs(module, batch, share)
    error, allowed = (by_packing - truth).abs().mean(), (by_padding - truth).abs().mean()
    assert by_packing.isfinite().all() and error < 1.5 * allowed + 1e-4, (error, allowed)
    gradient = gradients(exact, truth)
    ours, theirs = (distance(gradients(m, p), gradient) for m, p in ((module.model, by_packing), (padded, by_padding)))
    assert ours < 1.5 * theirs + 1e-4, (ours, theirs)


@pytest.mark.parametrize("share", [False, True])
def test_what_stands_beside_a_sequence_does_not_change_it(share: bool, tmp_path: Path) -> None:
    folder = str(write_tiny_model(tmp_path, **SHAPE))
    module = AsyncPPOModule(folder, dtype="bfloat16")
    module.configure_model()
    module.to(DEVICE)
    few, many = make_batch(n_groups=1), make_batch(n_groups=6)
    with torch.no_grad():
        alone, beside = packed_logprobs(module, few, share), packed_logprobs(module, many, share)
    assert torch.equal(few.token_ids, many.token_ids[: len(few.token_ids)])
    torch.testing.assert_close(beside[: len(alone)], alone, atol=0.05, rtol=0.0)


def test_without_a_choice_prompts_are_shared_where_it_pays(tmp_path: Path) -> None:
    folder = str(write_tiny_model(tmp_path, **SHAPE))
    short, long = make_batch(longest=20), make_batch(longest=1000)  # answers beside prompts of about 30 tokens
    for dtype, batch, expected in (("bfloat16", short, True), ("bfloat16", long, False), ("float32", short, False)):
        module = AsyncPPOModule(folder, dtype=dtype)  # type: ignore[arg-type]
        module.configure_model()
        module.to(DEVICE)
        with torch.no_grad():
            micro_batches = list(module.micro_batches(batch, range(batch.n_seqs), 100_000))
        assert [micro.layout.shared for micro in micro_batches] == [expected], (dtype, expected)
        assert bool(module.batch_logprobs(batch, range(batch.n_seqs))[batch.loss_mask].isfinite().all())
