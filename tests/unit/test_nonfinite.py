"""A run whose gradients stay not finite ends with a dump, and the dump trains the same step again without an engine."""

from __future__ import annotations

import logging
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from training_samples import Alone, Batches, make_batch, make_trainer, write_model

from rl_lightning.callbacks.nonfinite import NonFiniteGuard, is_nonfinite, replay_config
from rl_lightning.cli import RLCLI, main
from rl_lightning.failure import NonFiniteError, may_be_mended_by_restart
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.rollout.replay import ReplayDataModule
from rl_lightning.types import Batch, SamplingParams

OPTIONS: dict[str, Any] = {"ppo": PPOConfig(n_minibatches=2), "optimizer": OptimizerConfig(lr=1e-2, schedule="linear")}
WITH_MODELS_BESIDE: dict[str, Any] = {
    "ppo": PPOConfig(n_minibatches=2, disable_value=False, kl_ctl=0.1, use_adaptive_kl_ctl=True, ref_ema_eta=0.5),
    "optimizer": OptimizerConfig(lr=1e-2),
    "init_critic_from_actor": True,
}
TEMPERATURE = 0.7
MEASURED = ("time/", "throughput/")


class PoisonedData(pl.LightningDataModule):
    """`n_steps` batches; at the steps in `bad` one answer has a log-probability that no engine can report.

    Args:
        n_steps: of an epoch.
        bad: positions.
    """

    def __init__(self, n_steps: int = 6, bad: tuple[int, ...] = (2, 3, 4)) -> None:
        super().__init__()
        self.n_steps, self.bad = n_steps, bad
        self.generation = SamplingParams(temperature=TEMPERATURE)

    def batch(self, position: int) -> Batch:
        batch = make_batch(seed=position)
        if position in self.bad:
            logprobs = batch.behav_logprobs.clone()
            logprobs[-1] = math.nan
            batch = replace(batch, behav_logprobs=logprobs)
        return batch

    def train_dataloader(self) -> Batches:
        return Batches([self.batch(i) for i in range(self.n_steps)])


class Kept(pl.Callback):
    """What every step reported."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps.append(dict(pl_module.step_statistics))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def run(folder: str, dumps: Path, data: pl.LightningDataModule, **guard: Any) -> Kept:
    kept = Kept()
    make_trainer(callbacks=[kept, NonFiniteGuard(dumps, **guard)]).fit(Alone(folder, **OPTIONS), datamodule=data)
    return kept


def replayed(folder: str, dump: Path, options: dict[str, Any] = OPTIONS) -> dict[str, float]:
    """The statistics of the one step that a replay trains."""
    kept = Kept()
    trainer = make_trainer(callbacks=[kept, NonFiniteGuard(dump.parent / "again", max_in_a_row=1)], max_epochs=3)
    trainer.fit(Alone(folder, **options), datamodule=ReplayDataModule(str(dump)), ckpt_path=dump / "step.ckpt")
    assert len(kept.steps) == 1 and trainer.global_step == int(dump.name.removeprefix("nonfinite_globalstep"))
    assert not (dump.parent / "again").exists()
    return kept.steps[0]


def assert_same(one: dict[str, float], other: dict[str, float]) -> None:
    """Bit for bit, but for seconds."""
    one, other = ({k: v for k, v in s.items() if not k.startswith(MEASURED)} for s in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == other[name] or (math.isnan(value) and math.isnan(other[name])), name


@pytest.mark.parametrize("options", [OPTIONS, WITH_MODELS_BESIDE], ids=["actor", "critic and reference"])
def test_the_third_step_in_a_row_ends_the_run_and_is_trained_again_exactly(
    folder: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    dumps, kept = tmp_path / "dumps", Kept()
    trainer = make_trainer(callbacks=[kept, NonFiniteGuard(dumps)])
    with pytest.raises(NonFiniteError, match=r"in 3 training steps in a row, the last of them global step 5; .*ReplayDataModule"):
        trainer.fit(Alone(folder, **options), datamodule=PoisonedData())
    (dump,) = dumps.iterdir()
    assert dump.name == "nonfinite_globalstep5"
    assert sorted(p.name for p in dump.iterdir()) == ["batch_rank0.pt", "step.ckpt"]
    assert_same(replayed(folder, dump, options), kept.steps[-1])


def test_a_step_with_one_bad_minibatch_has_moved_the_weights_which_the_dump_has_not(folder: str, tmp_path: Path) -> None:
    kept, module = Kept(), Alone(folder, **OPTIONS)
    with pytest.raises(NonFiniteError):
        make_trainer(callbacks=[kept, NonFiniteGuard(tmp_path)]).fit(module, datamodule=PoisonedData())
    assert kept.steps[-1]["nonfinite_gradients"] == 1 and kept.steps[-1]["grad_norm"] > 0
    saved = torch.load(tmp_path / "nonfinite_globalstep5" / "step.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(saved[name], value) for name, value in module.state_dict().items())


def test_a_healthy_step_in_between_starts_the_count_again(folder: str, tmp_path: Path) -> None:
    kept = run(folder, tmp_path / "dumps", PoisonedData(bad=(0, 1, 3, 4)))
    assert [step["nonfinite_gradients"] for step in kept.steps] == [1, 1, 0, 1, 1, 0]
    assert list((tmp_path / "dumps").iterdir()) == [], "starts that were saved in vain are gone"


@pytest.mark.parametrize("options", [OPTIONS, WITH_MODELS_BESIDE], ids=["actor", "critic and reference"])
def test_a_healthy_step_is_trained_again_exactly(folder: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """As well as an unhealthy one, whose statistics are mostly NaN."""

    class Claims(Alone):
        def record(self, statistics: Any, histograms: Any) -> None:
            late = self.trainer.global_step == 4 and not isinstance(self.trainer.datamodule, ReplayDataModule)
            super().record({**statistics, "nonfinite_gradients": float(late)}, histograms)

    kept = Kept()
    trainer = make_trainer(callbacks=[kept, NonFiniteGuard(tmp_path / "dumps", max_in_a_row=1)])
    with pytest.raises(NonFiniteError):
        trainer.fit(Claims(folder, **options), datamodule=PoisonedData(bad=()))
    (dump,) = (tmp_path / "dumps").iterdir()
    again = replayed(folder, dump, options)
    assert again["actor_loss"] == kept.steps[-1]["actor_loss"] != kept.steps[-2]["actor_loss"]
    assert_same(again, {**kept.steps[-1], "nonfinite_gradients": 0.0})


def test_a_loss_that_is_not_finite_counts_without_a_gradient() -> None:
    assert is_nonfinite({"nonfinite_gradients": 0.0, "actor_loss": math.nan})
    assert is_nonfinite({"loss": math.inf}) and is_nonfinite({"nonfinite_gradients": 2.0})
    assert not is_nonfinite({"nonfinite_gradients": 0.0, "actor_loss": -1.0, "importance_weight": math.inf})
    assert not is_nonfinite({})


def test_no_restart_mends_it() -> None:
    error = NonFiniteError("3 in a row")
    assert not may_be_mended_by_restart(error) and not may_be_mended_by_restart(pickle.loads(pickle.dumps(error)))
    assert may_be_mended_by_restart(RuntimeError("out of memory"))


def test_it_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(args: Any) -> None:
        raise RuntimeError("training worker rank 0 raised NonFiniteError") from NonFiniteError("3 in a row; replay it")

    monkeypatch.setattr("rl_lightning.cli.RLCLI", fail)
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 1
    assert caplog.records[-1].getMessage() == "3 in a row; replay it" and caplog.records[-1].brief


def test_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="max_in_a_row of at least 1 step, got 0"):
        NonFiniteGuard("dumps", max_in_a_row=0)


def test_a_run_by_command_line_is_replayed_by_its_dump_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["rl-lightning"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder = write_tiny_model(tmp_path / "model")
    model = ["--model=AsyncPPOModule", f"--model.path={folder}", "--model.ppo.n_minibatches=2", "--model.optimizer.lr=1e-2"]
    options = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--run.experiment=e"]
    kept, again = Kept(), Kept()
    with caplog.at_level(logging.INFO, "rl_lightning"), pytest.raises(NonFiniteError) as error:
        run_command(kept, ["fit", *model, "--data=test_nonfinite.PoisonedData", *options])
    assert caplog.text.count("(global step 5) finishes") == 1, "the last step is logged as well"
    dump = Path("runs/checkpoints/e/trial0/nonfinite_globalstep5")
    assert f"`rl-lightning fit --config {dump}/config.yaml`" in str(error.value)
    for name in ("ray", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    run_command(again, ["fit", f"--config={dump}/config.yaml"])
    assert len(again.steps) == 1
    assert_same(again.steps[0], kept.steps[-1])
    assert sorted(p.name for p in Path("runs/logs/e").iterdir()) == ["trial0"], "a replay writes below its dump"


def run_command(kept: Kept, args: list[str]) -> None:
    """The command line with one more callback."""

    class CLI(RLCLI):
        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.insert(0, kept)  # type: ignore[attr-defined]
            return trainer

    CLI(args)


def test_a_replay_takes_one_device_and_nothing_of_the_cluster() -> None:
    config = {
        "seed_everything": 1,
        "model": {"class_path": "AsyncPPOModule"},
        "data": {"class_path": "RolloutDataModule", "init_args": {"num_engines": 4}},
        "trainer": {"strategy": "ray", "devices": 8, "precision": "bf16-mixed"},
        "run": {"allocation_mode": "sglang.d4p1m1+d4p1m1", "experiment": "e", "wandb_mode": "online"},
        "ckpt_path": None,
    }
    changed = yaml.safe_load(yaml.safe_dump(replay_config(config, Path("dump"))))
    assert changed["model"] == config["model"] and changed["seed_everything"] == 1
    assert changed["data"] == {"class_path": "rl_lightning.rollout.replay.ReplayDataModule", "init_args": {"path": "dump"}}
    assert {k: changed["trainer"][k] for k in ("strategy", "devices", "precision")} == {
        "strategy": "auto", "devices": 1, "precision": "bf16-mixed",
    }  # fmt: skip
    assert changed["run"]["allocation_mode"] is None and changed["run"]["wandb_mode"] == "disabled"
    assert changed["ckpt_path"] == "dump/step.ckpt"
