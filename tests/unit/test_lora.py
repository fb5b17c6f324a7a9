"""Adapters: they alone are trained; engines and exports get merged weights, and the reference needs no copy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_samples import SavedTokenizer
from training_samples import Alone, fit, make_batch, norm_in_float64, padded_logprobs, write_model

from rl_lightning.callbacks.export import Export
from rl_lightning.callbacks.weight_publisher import named_weights
from rl_lightning.models.lora import LoRAConfig, merged_weights, without_lora
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.modules.sft import SFTModule
from rl_lightning.weights.object_store import ObjectStoreTransport, read_weights
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.transport import WeightTarget

LORA = LoRAConfig(rank=4, alpha=8)


class Adapted(Alone):
    """Its tokenizer is a fake, and frozen weights have no gradient to keep."""

    tokenizer = SavedTokenizer()  # type: ignore[assignment]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def make_module(folder: str, **options: Any) -> Adapted:
    defaults: dict[str, Any] = {"lora": LORA, "dtype": "float64", "optimizer": OptimizerConfig(lr=1e-2)}
    return Adapted(folder, **{**defaults, "ppo": PPOConfig(n_minibatches=2), **options})


def load(path: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    norm_in_float64(model)
    return model


def test_only_adapters_are_trained_and_they_start_from_the_model(folder: str) -> None:
    module = make_module(folder)
    module.configure_model()
    plain = load(folder)
    for (name, merged), (other, weight) in zip(merged_weights(module.model), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(merged, weight)
    fit(module, [make_batch()])
    assert all(".lora_" in name for name in module.gradients) and len(module.gradients) == 2 * 7
    trained = sum(len(group["params"]) for group in module.optimizers().param_groups)  # type: ignore[union-attr]
    assert trained == 14
    for name, weight in load(folder).named_parameters():
        own = dict(module.model.named_parameters())
        assert torch.equal(own[name if name in own else name.replace(".weight", ".base_layer.weight")], weight)


def test_gradients_are_those_of_the_factors(folder: str) -> None:
    """With W + s B A the gradient of B is s dW A', that of A is s B' dW."""
    ppo = PPOConfig(n_minibatches=1)
    module, full = make_module(folder, ppo=ppo), Alone(folder, ppo=ppo, dtype="float64")
    module.configure_model()
    generator, scale = torch.Generator().manual_seed(0), 8 / 4
    for name, parameter in module.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    full.configure_model()
    full.model.load_state_dict(dict(merged_weights(module.model)), strict=False)
    for trained in (module, full):
        trained.optimizer_config = OptimizerConfig(gradient_clipping=0.0)
        fit(trained, [make_batch(seed=61)])
    layer = "model.layers.0.mlp.up_proj"
    a, b = (before[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
    slope = full.gradients[f"{layer}.weight"]
    torch.testing.assert_close(module.gradients[f"{layer}.lora_B.default.weight"], scale * slope @ a.T)
    torch.testing.assert_close(module.gradients[f"{layer}.lora_A.default.weight"], scale * b.T @ slope)


def test_engines_get_merged_weights_and_training_goes_on_with_its_own(folder: str) -> None:
    module, batch = make_module(folder), make_batch(seed=62)
    fit(module, [batch])
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    update = ObjectStoreTransport().stage(1, NamedWeights(named_weights(module)), [WeightTarget("engine")])[0]
    engine = load(folder)
    missing = engine.load_state_dict(dict(read_weights(update.payload, 1.0)), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["lm_head.weight"]  # tied
    got, own = (padded_logprobs(model, batch) for model in (engine, module.model))
    torch.testing.assert_close(got, own, equal_nan=True)
    assert not torch.allclose(padded_logprobs(load(folder), batch), own, equal_nan=True)
    assert all(torch.equal(p, before[name]) for name, p in module.model.named_parameters())


def test_export_holds_the_merged_model_and_the_adapter(folder: str, tmp_path: Path) -> None:
    from peft import PeftModel

    module, batch = make_module(folder), make_batch(seed=63)
    fit(module, [batch], callbacks=[Export(tmp_path)])
    exported = tmp_path / "epoch1epochstep1globalstep1"
    merged, adapted = load(exported), PeftModel.from_pretrained(load(folder), exported / "adapter")
    own = padded_logprobs(module.model, batch)
    for model in (merged, adapted):
        torch.testing.assert_close(padded_logprobs(model, batch), own, equal_nan=True)
    assert adapted.peft_config["default"].base_model_name_or_path == folder
    assert "rl_lightning" not in (exported / "config.json").read_text()


def test_the_reference_is_the_actor_without_adapters(folder: str) -> None:
    batch, ppo = make_batch(), PPOConfig(n_minibatches=2, kl_ctl=0.1)
    module, whole = make_module(folder, ppo=ppo), make_module(folder, ppo=ppo, lora=None)
    for trained in (module, whole):
        fit(trained, [batch, batch])
    assert module.reference is not None and module.reference.model is module.model
    assert module.step_statistics["ref_kl"] == pytest.approx(whole.step_statistics["ref_kl"], rel=1e-5)
    assert all(p.requires_grad == (".lora_" in name) for name, p in module.model.named_parameters())
    elsewhere = make_module(folder, ppo=PPOConfig(n_minibatches=2, kl_ctl=0.1, ref_ema_eta=0.5))
    fit(elsewhere, [batch])
    assert elsewhere.reference is not None and elsewhere.reference.model is not elsewhere.model
    start, now = dict(load(folder).named_parameters()), dict(merged_weights(elsewhere.model))
    for name, weight in elsewhere.reference.state_dict().items():
        torch.testing.assert_close(weight, (start[name].detach() + now[name]) / 2)


def test_adapters_come_back_after_an_error(folder: str) -> None:
    module, batch = make_module(folder), make_batch(seed=64)
    fit(module, [batch])
    own = padded_logprobs(module.model, batch)
    with pytest.raises(KeyError), without_lora(module.model):
        torch.testing.assert_close(padded_logprobs(module.model, batch), padded_logprobs(load(folder), batch), equal_nan=True)
        raise KeyError
    torch.testing.assert_close(padded_logprobs(module.model, batch), own, equal_nan=True)


def test_adapters_are_a_function_of_the_seed_and_leave_the_global_generator(folder: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    weights = []
    for seed in (1, 1, 2):
        module = make_module(folder, seed=seed)
        module.configure_model()
        weights.append(dict(module.model.named_parameters())["model.layers.0.mlp.up_proj.lora_A.default.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.rand(1), expected)


def test_a_run_with_adapters_reloads(folder: str, tmp_path: Path) -> None:
    module = make_module(folder, lora=LoRAConfig(rank=2, target_modules=("q_proj", "v_proj")), gradient_checkpointing=True)
    fit(module, [make_batch()]).save_checkpoint(tmp_path / "run.ckpt")
    again = Adapted.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert again.lora == module.lora
    assert {name.split(".")[4] for name, _ in again.model.named_parameters() if ".lora_" in name} == {"q_proj", "v_proj"}
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adapters_can_be_fine_tuned_too(folder: str) -> None:
    module = SFTModule(folder, lora=LORA, optimizer=OptimizerConfig(lr=1e-2))
    losses = []
    for _ in range(2):
        fit(module, [make_batch(seed=65)] * 5)
        losses.append(module.step_statistics["loss"])
    assert losses[1] < losses[0]
    assert [n for n, p in module.named_parameters() if p.requires_grad and ".lora_" not in n] == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora.rank=16 needs the package peft: run pip install rl-lightning\[lora\]"):
        LoRAConfig()


def test_what_cannot_be_adapted_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="lora.rank=0"):
        LoRAConfig(rank=0)
    for name in ("lm_head", "embed_tokens"):  # tied here: the embedding's adapter would change the engines' output layer alone
        module = make_module(folder, lora=LoRAConfig(target_modules=("q_proj", name)))
        with pytest.raises(ValueError, match=rf"lora.target_modules names .*{name}, whose weight is that of the output layer"):
            module.configure_model()
    with pytest.raises(ValueError, match="no_such_layer"):
        make_module(folder, lora=LoRAConfig(target_modules=("no_such_layer",))).configure_model()
