"""A model cut over ranks trains as a whole one: FSDP2, tensor parallelism and both, through RayModelParallelStrategy."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from rl_lightning.batching.balance import balance
from rl_lightning.batching.collate import collate
from rl_lightning.callbacks.export import Export
from rl_lightning.callbacks.nonfinite import NonFiniteGuard
from rl_lightning.callbacks.recovery import RecoveryCheckpoint
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.engines.torch import TorchEngine
from rl_lightning.models.sharding import is_sharded, whole
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.rollout.replay import ReplayDataModule
from rl_lightning.strategies import RayModelParallelStrategy
from rl_lightning.strategies.failures import RayWorkerError
from rl_lightning.types import Batch, RolloutGroup, SamplingParams
from tests.samples import LetterPrompts, share_of_even_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from training_samples import make_groups, make_trainer, write_model  # noqa: E402

pytestmark = pytest.mark.slow

LAYOUTS = {"2 ranks, FSDP2": (2, 1), "2 ranks, tensor parallel": (1, 2), "2 x 2 ranks": (2, 2)}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "actor alone": {"n_minibatches": 1},
    "critic and moving reference": {
        "n_minibatches": 1, "disable_value": False, "gae_lambda": 0.9, "kl_ctl": 0.1, "ref_ema_eta": 0.2,
    },
}  # fmt: skip


class Alone(AsyncPPOModule):
    """Without engines to publish to."""

    def configure_callbacks(self) -> list[Callback]:
        return []


class Shares(LightningDataModule):
    """Each rank's share of given steps, as the controller would deal it; goes on after the steps that are done."""

    def __init__(self, steps: Sequence[Sequence[RolloutGroup]]) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> Shares:
        return self

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        assert self.trainer is not None
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        for version, groups in enumerate(self.steps[self.trainer.global_step :], start=self.trainer.global_step):
            part = balance([group.n_tokens for group in groups], ranks["num_replicas"])[ranks["rank"]]
            yield collate([groups[i] for i in part], version=version)


class Record(Callback):
    """Keeps the loss of every step, and at the end the share of weights that this rank held, and all weights in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.differences: list[float] = []
        self.held = 1.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        statistics: Any = pl_module.step_statistics
        self.losses.append(statistics["actor_loss"])
        self.norms.append(statistics.get("grad_norm", math.nan))
        self.differences.append(statistics.get("engine_logprob_diff_max", 0.0))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = {name: whole(weight.detach()) for name, weight in pl_module.named_parameters()}
        held = sum(local(weight).numel() for weight in pl_module.parameters())
        self.held = held / sum(weight.numel() for weight in weights.values())
        if trainer.is_global_zero:
            torch.save(weights, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("losses", "norms", "differences", "held")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def local(weight: Tensor) -> Tensor:
    sharded: Any = weight
    return sharded.to_local() if is_sharded(weight) else weight


def make_module(folder: str, ppo: dict[str, Any], **options: Any) -> Alone:
    model: dict[str, Any] = {"dtype": "float64", "optimizer": OptimizerConfig(lr=1e-3), "max_tokens_per_mb": 40}
    if not ppo.get("disable_value", True):
        model |= {"init_critic_from_actor": True, "critic_optimizer": OptimizerConfig(lr=1e-2)}
    return Alone(folder, ppo=PPOConfig(**ppo), **(model | options))


def make_steps(count: int = 2) -> list[list[RolloutGroup]]:
    return [make_groups(seed, n_groups=4, version=seed) for seed in range(count)]


def train(path: Path, module: Alone, steps: Sequence[Sequence[RolloutGroup]], **options: Any) -> tuple[Record, dict[str, Tensor]]:
    record, ckpt_path = Record(path), options.pop("ckpt_path", None)
    callbacks = [record, *options.pop("callbacks", [])]
    make_trainer(callbacks=callbacks, **options).fit(module, datamodule=Shares(steps), ckpt_path=ckpt_path)
    return record, torch.load(path)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_in_pieces_trains_as_a_whole_one(ray_cluster: str, tmp_path: Path, layout: str, objective: str) -> None:
    data, tensor = LAYOUTS[layout]
    ppo = OBJECTIVES[objective]
    folder = write_model(tmp_path / "model", "qwen3")
    one, weights = train(tmp_path / "one.pt", make_module(folder, ppo), make_steps())
    strategy = RayModelParallelStrategy(tensor_parallel_size=tensor, num_workers=data * tensor)
    many, pieced = train(tmp_path / "many.pt", make_module(folder, ppo), make_steps(), strategy=strategy)
    assert many.held < 0.9
    assert many.losses == pytest.approx(one.losses, rel=1e-4, abs=1e-6)
    assert many.norms == pytest.approx(one.norms, rel=1e-4)
    assert pieced.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(pieced[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whole_file", [False, True], ids=["folder of pieces", "one file"])
def test_a_run_in_pieces_goes_on_from_its_checkpoint(ray_cluster: str, tmp_path: Path, whole_file: bool) -> None:
    ppo = OBJECTIVES["critic and moving reference"]
    folder, steps = write_model(tmp_path / "model", "qwen3"), make_steps(3)

    def strategy(tensor: int) -> RayModelParallelStrategy:
        return RayModelParallelStrategy(tensor, num_workers=2, save_distributed_checkpoint=not whole_file)

    straight, weights = train(tmp_path / "straight.pt", make_module(folder, ppo), steps, strategy=strategy(1))
    recovery = RecoveryCheckpoint(tmp_path / "recovery", steps=1, secs=None)
    options: dict[str, Any] = {"callbacks": [recovery], "enable_checkpointing": True}
    train(tmp_path / "begun.pt", make_module(folder, ppo), steps, strategy=strategy(1), max_steps=2, **options)
    assert recovery.path.is_dir() is not whole_file
    other = strategy(1 if whole_file else 2)  # pieces can be put together in another way
    options = {"strategy": other, "ckpt_path": str(recovery.path)}
    resumed, again = train(tmp_path / "resumed.pt", make_module(folder, ppo), steps, **options)
    assert resumed.losses == pytest.approx(straight.losses, rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-4, atol=1e-6)


class Broken(Alone):
    """Its loss is not finite in the second step."""

    def policy_loss(self, logprobs: Tensor, tokens: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, by_token = super().policy_loss(logprobs, tokens)
        return (loss * math.nan if self.trainer.global_step == 1 else loss), by_token


def test_a_broken_step_of_a_model_in_pieces_is_seen_again_on_one_device(ray_cluster: str, tmp_path: Path) -> None:
    folder, guard = write_model(tmp_path / "model", "qwen3"), NonFiniteGuard(tmp_path / "dumps", max_in_a_row=1)
    module = Broken(folder, ppo=PPOConfig(n_minibatches=1), max_tokens_per_mb=40)
    strategy = RayModelParallelStrategy(tensor_parallel_size=2, num_workers=4)
    with pytest.raises(RayWorkerError, match="not finite"):
        train(tmp_path / "none.pt", module, make_steps(), strategy=strategy, callbacks=[guard])
    (dump,) = (tmp_path / "dumps").iterdir()
    assert sorted(path.name for path in dump.glob("batch_rank*.pt")) == ["batch_rank0.pt", "batch_rank1.pt"]
    again = Broken(folder, ppo=PPOConfig(n_minibatches=1), max_tokens_per_mb=40)
    record = Record(tmp_path / "again.pt")
    make_trainer(callbacks=[record]).fit(again, datamodule=ReplayDataModule(str(dump)), ckpt_path=str(dump / "step.ckpt"))
    before, broken = record.losses  # the checkpoint remembers the step before
    assert math.isfinite(before) and math.isnan(broken)


def test_bf16_computes_in_pieces_with_float32_weights(ray_cluster: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", tie_word_embeddings=False)
    ppo = OBJECTIVES["actor alone"]
    exact, _ = train(tmp_path / "exact.pt", make_module(folder, ppo, dtype="float32"), make_steps())
    strategy = RayModelParallelStrategy(num_workers=2, tensor_parallel_size=1)
    options: dict[str, Any] = {"strategy": strategy, "precision": "bf16-mixed"}
    module = make_module(folder, ppo, dtype="float32", gradient_checkpointing=True)
    half, weights = train(tmp_path / "half.pt", module, make_steps(), **options)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert half.norms != pytest.approx(exact.norms, rel=1e-6)
    assert half.norms == pytest.approx(exact.norms, rel=0.1)


class Killer(Callback):
    """Ends every engine's process at the start of step 2."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step == 2 and trainer.is_global_zero:
            import ray

            data: Any = trainer.datamodule
            for _, handle in data.fleet.call("workers"):
                ray.kill(handle, no_restart=False)


@pytest.mark.parametrize("engine", ["torch", "sglang"])
def test_engines_follow_a_model_in_pieces(ray_cluster: str, tiny_model: Path, tmp_path: Path, engine: str) -> None:
    """Two ranks, each with a piece: the engine samples what the trainer scores, and comes back with weights after a kill."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"batch_timeout_s": 300, "start_timeout_s": 200, "max_head_offpolicyness": 1}
    if engine == "sglang":
        options |= {"engine": SGLangEngine(server_args={"max_total_tokens": 4096}), "weight_transport": "distributed"}
    else:
        options |= {"engine": TorchEngine()}
    data = RolloutDataModule(
        LetterPrompts(16), [WeightedReward(share_of_even_digits)], str(tiny_model), batch_size=4, group_size=2,
        generation=SamplingParams(max_new_tokens=8), **options,
    )  # fmt: skip
    module = AsyncPPOModule(str(tiny_model), optimizer=OptimizerConfig(lr=1e-3), ppo=PPOConfig(n_minibatches=1))
    record, export = Record(tmp_path / "weights.pt"), Export(tmp_path / "models")
    strategy = RayModelParallelStrategy(tensor_parallel_size=2 if engine == "torch" else 1, num_workers=2)
    trainer = make_trainer(strategy=strategy, callbacks=[record, export, Killer()], max_steps=4, max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert len(record.losses) == 4
    assert max(record.differences) < 2e-3, "engine and trainer disagree"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "epoch1epochstep4globalstep4")
    for name, weight in torch.load(record.path).items():
        torch.testing.assert_close(model.get_parameter(name.removeprefix("model.")), weight)


def test_heads_that_cannot_be_split_are_named(ray_cluster: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", num_key_value_heads=1)
    strategy = RayModelParallelStrategy(num_workers=2, tensor_parallel_size=2)
    with pytest.raises(RayWorkerError, match="1 key-value head"):
        train(tmp_path / "none.pt", make_module(folder, {}), make_steps(), strategy=strategy)
