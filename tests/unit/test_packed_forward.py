"""The packed forward pass scores tokens as an ordinary padded one does, with and without shared prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_samples import Alone, make_batch, model_with_eyes, norm_in_float64, padded_logprobs, write_model

from rl_lightning.batching import layout as layouts
from rl_lightning.batching.layout import PackedLayout
from rl_lightning.batching.micro_batch import make_micro_batch
from rl_lightning.models.logprobs import token_logprobs
from rl_lightning.models.packed_model import check_supported, turn_off_dropout
from rl_lightning.types import Batch

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": False},
}


def scored(module: Alone, batch: Batch, share: bool) -> Tensor:
    """(T,) by the packed forward pass, NaN off the loss mask."""
    micro = make_micro_batch(batch, range(batch.n_seqs), share_prompts=share)
    logprobs, _ = module.score(micro)
    return torch.full(batch.loss_mask.shape, torch.nan, dtype=logprobs.dtype).index_put((micro.sources,), logprobs)


def reference(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    norm_in_float64(model)
    return model


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write_model(tmp_path, request.param, **MODELS[request.param])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dense_limit", [0, 1000])
def test_packed_equals_padded(folder: str, share: bool, dense_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "DENSE_TREE_TOKENS", dense_limit)
    module, batch = Alone(folder, dtype="float64"), make_batch(seed=1)
    module.configure_model()
    torch.testing.assert_close(scored(module, batch, share), padded_logprobs(reference(folder), batch), equal_nan=True)


def test_sharing_prompts_changes_no_gradient(folder: str) -> None:
    gradients = []
    for share in (False, True):
        module, batch = Alone(folder, dtype="float64"), make_batch(seed=2)
        module.configure_model()
        weights = torch.randn(len(batch.loss_mask), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (scored(module, batch, share)[batch.loss_mask] * weights[batch.loss_mask]).sum().backward()
        gradients.append({name: p.grad for name, p in module.model.named_parameters()})
    plain = reference(folder)
    (padded_logprobs(plain, batch)[batch.loss_mask] * weights[batch.loss_mask]).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[0][name], parameter.grad)
        torch.testing.assert_close(gradients[1][name], parameter.grad)


def test_checkpointed_activations_change_no_gradient(tmp_path: Path) -> None:
    folder, batch = write_model(tmp_path), make_batch(seed=2)
    modules = [Alone(folder, dtype="float64", gradient_checkpointing=on) for on in (False, True)]
    for module in modules:
        module.configure_model()
        scored(module, batch, True)[batch.loss_mask].sum().backward()
    for plain, again in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(plain.grad, again.grad)


def test_temperature_divides_the_logits(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    module, batch = Alone(folder, dtype="float64"), make_batch(seed=1)
    module.configure_model()
    module.temperature = 0.7
    torch.testing.assert_close(scored(module, batch, True), padded_logprobs(reference(folder), batch, 0.7), equal_nan=True)


def test_no_token_sees_another_sequence(tmp_path: Path) -> None:
    module, batch = Alone(write_model(tmp_path), dtype="float64"), make_batch(seed=4, n_groups=2, group_size=2)
    module.configure_model()
    before = scored(module, batch, True)
    batch.token_ids[batch.cu_seqlens[3] :] = 1  # the last answer, which shares its prompt with the one before
    after = scored(module, batch, True)
    end = batch.cu_seqlens[3]
    assert torch.equal(before[:end].nan_to_num(), after[:end].nan_to_num())
    assert not torch.equal(before[end:].nan_to_num(), after[end:].nan_to_num())


def test_saved_model_is_an_ordinary_one(tmp_path: Path) -> None:
    module = Alone(write_model(tmp_path / "a"))
    module.configure_model()
    module.model.save_pretrained(tmp_path / "b")
    assert "rl_lightning" not in (tmp_path / "b" / "config.json").read_text()
    batch = make_batch()
    got, expected = scored(module, batch, True).double(), padded_logprobs(reference(str(tmp_path / "b")), batch)
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_a_model_that_transforms_its_logits_is_refused(tmp_path: Path) -> None:
    module = Alone(write_model(tmp_path, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="LlamaForCausalLM transforms its logits .final_logit_softcapping."):
        module.configure_model()
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration transforms its logits .final_logit_softcapping."):
        check_supported(model_with_eyes(final_logit_softcapping=30.0))


def test_a_model_that_packing_would_score_otherwise_is_refused() -> None:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    hybrid = transformers.Lfm2Config(**shape, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has layers of conv, which would mix the tokens of sequences"):
        check_supported(transformers.Lfm2ForCausalLM(hybrid))
    with_head = transformers.ModernBertDecoderConfig(**shape, pad_token_id=0)
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM has weights before its output layer .lm_head.dense"):
        check_supported(transformers.ModernBertDecoderForCausalLM(with_head))


def test_attention_by_a_mask_of_the_model_is_refused(tmp_path: Path) -> None:
    """Doge drops from a token's past what it thinks little of."""
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    transformers.DogeForCausalLM(transformers.DogeConfig(**shape, keep_window_size=3)).save_pretrained(tmp_path)
    module = Alone(str(tmp_path))
    module.configure_model()
    with pytest.raises(ValueError, match="DogeAttention chooses what a token sees by a mask of its own"):
        scored(module, make_batch(), False)


@pytest.mark.parametrize(
    ("kind", "rates"), [("Starcoder2", ("residual_dropout", "embedding_dropout")), ("OPT", ("dropout", "layerdrop"))]
)
def test_rates_that_models_keep_as_numbers_are_turned_off(kind: str, rates: tuple[str, ...]) -> None:
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "word_embed_proj_dim": 32}
    config = getattr(transformers, f"{kind}Config")(**shape, num_key_value_heads=2, **dict.fromkeys(rates, 0.5))
    model, tokens = getattr(transformers, f"{kind}ForCausalLM")(config), torch.arange(1, 9).unsqueeze(0)
    turn_off_dropout(model)
    assert torch.equal(model.train()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_attention_blocks_are_few_and_cover_every_token_once() -> None:
    layout = PackedLayout([25, 25, 600, 3, 2, 3, 3, 3, 1, 40, 7], [0, 1, 2, 0, 0, 0, 1, 1, 1, 2, 2])
    assert sorted(layout.inverse.unique().tolist()) == sorted(layout.inverse.tolist())
    asked = torch.cat([block.queries.flatten() for block in layout.blocks])
    assert torch.equal(asked[layout.inverse], torch.arange(layout.n_tokens))
    assert len(layout.blocks) <= 4
    assert layout.positions[650:655].tolist() == [25, 26, 27, 25, 26]


@pytest.mark.parametrize("chunk", [1, 3 * 11, 10_000])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_logprobs_equal_a_log_softmax(chunk: int, bias: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    offset = torch.randn(11, dtype=torch.float64, requires_grad=True) if bias else None
    targets, rows = torch.tensor([3, 3, 0, 10, 5, 6, 7, 1, 2]), torch.tensor([0, 0, 0, 2, 1, 3, 6, 5, 4])
    logits = torch.nn.functional.linear(hidden, weight, offset) / 1.3
    table = logits.log_softmax(1)
    got, entropy = token_logprobs(
        hidden, weight, targets, rows=rows, bias=offset, temperature=1.3, with_entropy=True, chunk_logits=chunk
    )
    torch.testing.assert_close(got, table[rows, targets])
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(1)[rows].detach())
    inputs = [hidden, weight] + ([offset] if offset is not None else [])
    direction = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(table[rows, targets], inputs, direction)
    )


def test_frozen_weights_get_no_gradient() -> None:
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(11, 5)
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]), chunk_logits=22)
    logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is None
