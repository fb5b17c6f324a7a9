from __future__ import annotations

import errno
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from run_samples import SmallData, SmallModule

from rl_lightning.cli import RLCLI, main
from rl_lightning.gpus import TRAINER_SHARE
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.rewards.exact import exact_match
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.strategies import RayModelParallelStrategy, RayStrategy
from rl_lightning.testing import FakeEngine, FakePrompts
from rl_lightning.types import SamplingParams

SMALL = ["--model=run_samples.SmallModule", "--data=run_samples.SmallData", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A command line of our own, runs below a temporary folder, and no failure counted yet."""
    monkeypatch.setattr(sys, "argv", ["rl-lightning"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.setattr(SmallModule, "failures", [])


def fit(*options: str) -> RLCLI:
    return RLCLI(["fit", *SMALL, *QUIET, *options])


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line by which the command line refuses."""
    with pytest.raises(SystemExit) as exit_:
        RLCLI(["fit", *SMALL, *options])
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line.partition("error: ")[2]


# -- configuration


def test_short_names_defaults_and_shared_values():
    cli = RLCLI(
        [
            "--model=AsyncPPOModule",
            "--model.path=models/m",
            "--seed_everything=7",
            "--data=RolloutDataModule",
            "--data.prompts=rl_lightning.prompts.arithmetic.ArithmeticPrompts",
            '--data.rewards=[{"reward": "rl_lightning.rewards.exact.exact_match"}]',
            "--data.engine=rl_lightning.testing.FakeEngine",
        ],
        run=False,
    )
    assert isinstance(cli.datamodule, RolloutDataModule)
    assert cli.datamodule.model_path == "models/m"
    assert (cli.datamodule.seed, cli.model.seed) == (7, 7)
    assert (cli.trainer.max_epochs, cli.trainer.num_sanity_val_steps) == (5, 0)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("name", "strategy"), [("ray", RayStrategy), ("ray_model_parallel", RayModelParallelStrategy)])
def test_the_cluster_is_named_on_the_command_line_of_a_recipe_that_says_ray(name: str, strategy: type):
    Path("recipe.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": name, "accelerator": "cpu"}}))
    cli = RLCLI([*SMALL[:2], "--config=recipe.yaml", "--trainer.strategy.address=auto"], run=False)
    assert isinstance(cli.trainer.strategy, strategy)
    assert cli.trainer.strategy.ray_init == {"address": "auto"}


@pytest.mark.parametrize("given", [["--trainer.strategy=ray"], ["--trainer.strategy", "ray"]])
def test_the_cluster_is_named_beside_the_strategy(given: list[str]):
    cli = RLCLI([*SMALL, *given, "--trainer.strategy.address=auto", "--trainer.strategy.num_workers=2"], run=False)
    assert isinstance(cli.trainer.strategy, RayStrategy)
    assert (cli.trainer.strategy.ray_init, cli.trainer.strategy.num_workers) == ({"address": "auto"}, 2)


def test_fewer_engines_than_one_or_more_than_all_are_refused():
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"min_engines={wrong} must be between 1 and num_engines=2"):
            RolloutDataModule(
                FakePrompts(), [WeightedReward(exact_match)], "m", engine=FakeEngine(), num_engines=2, min_engines=wrong
            )


def test_from_python_a_bare_reward_and_a_loader_alone_are_told_what_to_write():
    with pytest.raises(ValueError, match=r"rewards holds <function exact_match.*write WeightedReward\(\.\.\.\)"):
        RolloutDataModule(FakePrompts(), [exact_match], "m", engine=FakeEngine())  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"give it whole, trainer\.fit\(model, datamodule=data\)"):
        RolloutDataModule(FakePrompts(), [WeightedReward(exact_match)], "m", engine=FakeEngine()).train_dataloader()


def test_anyones_module_without_the_shared_options_works():
    cli = RLCLI(["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--data=run_samples.SmallData"], run=False)
    assert isinstance(cli.datamodule, SmallData) and cli.datamodule.seed == 1


def test_the_saved_configuration_repeats_the_run():
    first = fit("--model.lr=0.05", "--run.experiment=e", "--seed_everything=3")
    config = Path("runs/logs/e/trial0/config.yaml")
    assert yaml.safe_load(config.read_text())["run"]["trial"] == "trial0"
    second = RLCLI(["fit", f"--config={config}"])
    assert second.model.losses == first.model.losses and second.model.lr == 0.05
    assert second.run_config is not None and second.run_config.trial == "trial1"
    one, two = (yaml.safe_load(Path(f"runs/logs/e/trial{i}/config.yaml").read_text()) for i in range(2))
    assert {**one, "run": None} == {**two, "run": None}


def test_options_are_saved_resolved():
    fit()
    config = yaml.safe_load(Path("runs/logs/experiment/trial0/config.yaml").read_text())
    assert config["run"]["ckpt_freq_secs"] == 600 and config["seed_everything"] == 1
    assert config["model"] == {
        "class_path": "run_samples.SmallModule",
        "init_args": {"path": "models/none", "lr": 0.1, "fail_at": None, "error": "RuntimeError"},
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trainer.max_epoks=3"], "trainer.max_epoks is not an option; did you mean trainer.max_epochs?"),
        (["--run.trail=x"], "run.trail is not an option; did you mean run.trial?"),
        (["--model.lrr=1"], "model.lrr is not an option of SmallModule; did you mean lr?"),
        (["--data.n_stepz=1"], "data.n_stepz is not an option of SmallData; did you mean n_steps?"),
        (["--data.n_steps=many"], "data.n_steps: expected int, got 'many'"),
        (["--trainer.max_epochs=three"], "trainer.max_epochs: expected int, got 'three'"),
        (["--run.recover_mode=sometimes"], "run.recover_mode: expected 'auto' or 'resume' or 'disabled', got 'sometimes'"),
        (["--model=NoModule"], "model: expected an import path or the name of a known class, got 'NoModule'"),
        (["--model=nowhere.Module"], "model: No module named 'nowhere'; give an import path such as package.module.name"),
        (["--config=/none.yaml"], "config: File does not exist: '/none.yaml'"),
        (["recipe.yaml"], "recipe.yaml is not an option; did you mean --config recipe.yaml?"),
        (["--model=AsyncPPOModule"], "model.path is missing, which AsyncPPOModule needs"),
        (["--model=run_samples.SmallData"], "model: run_samples.SmallData is no subclass of LightningModule"),
    ],
)
def test_wrong_options_are_one_sentence(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str):
    assert refused(capsys, *options) == sentence


def test_wrong_options_of_nested_classes_are_one_sentence(capsys: pytest.CaptureFixture[str]):
    rollouts = ["--data=RolloutDataModule", "--data.prompts=rl_lightning.prompts.arithmetic.ArithmeticPrompts"]
    rewards = '--data.rewards=[{"reward": "rl_lightning.rewards.exact.exact_match", "wight": 2}]'
    assert (
        refused(capsys, *rollouts, "--data.prompts.siz=3")
        == "data.prompts.siz is not an option of ArithmeticPrompts; did you mean size?"
    )
    assert refused(capsys, *rollouts, rewards) == "data.rewards.wight is not an option of WeightedReward; did you mean weight?"
    expected = "data.generation.temprature is not an option of RolloutDataModule; did you mean temperature?"
    assert refused(capsys, *rollouts, "--data.generation.temprature=3") == expected
    strategy = ["--trainer.strategy=RayModelParallelStrategy", "--trainer.strategy.colective_timeout=3"]
    asked = "trainer.strategy.colective_timeout is not an option of RayModelParallelStrategy"
    assert refused(capsys, *strategy) == f"{asked}; did you mean collective_timeout_s?"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "the command is missing, one of fit, validate, test, predict: rl-lightning fit --config RECIPE"),
        (["fit"], "--data and --model missing: give a recipe by --config"),
        (["--config=recipe.yaml", "fit"], "options come after the command: rl-lightning fit --config RECIPE"),
    ],
)
def test_wrong_commands_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], sentence: str
):
    monkeypatch.setattr(sys, "argv", ["__main__.py"])  # as in `python -m rl_lightning`
    Path("recipe.yaml").write_text("trainer: {max_epochs: 1}")
    with pytest.raises(SystemExit) as exit_:
        RLCLI(args)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"rl-lightning: error: {sentence}"


def test_classes_and_functions_of_the_wrong_kind_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("with_a_slip.py").write_text("def score(:")
    rollouts = ["--data=RolloutDataModule", "--data.prompts=rl_lightning.prompts.arithmetic.ArithmeticPrompts"]
    own = "run_samples.SmallData is no {}: it lacks its methods, or their annotations"
    workflow = "--data.workflow=run_samples.SmallData"
    assert refused(capsys, *rollouts, workflow) == "data.workflow: " + own.format("Workflow")
    assert refused(capsys, *rollouts, "--data.engine=run_samples.SmallData") == "data.engine: " + own.format("Engine")
    assert refused(capsys, rollouts[0], "--data.prompts=run_samples.SmallData") == "data.prompts: " + own.format("PromptDataset")
    reward = '--data.rewards=[{"reward":"with_a_slip.score"}]'
    assert refused(capsys, *rollouts, reward) == "data.rewards.reward: invalid syntax (with_a_slip.py, line 1)"


def test_wrong_values_are_one_sentence_and_status_2(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    for options, sentence in (
        (["--model.lr=-1"], "lr=-1.0 must be above 0"),
        (["--run.save_freq_steps=0"], "run.save_freq_steps=0 must be positive, or null for never"),
        (["--data.fail_check=true"], "prompts.jsonl line 3: no field `prompt`"),
        (
            ["--ckpt_path=last", "--run.trial=none"],
            "--ckpt_path last: there is no restart checkpoint in runs/checkpoints/experiment/none",
        ),
        (["--ckpt_path=none/last.ckpt"], "--ckpt_path none/last.ckpt: there is no such file or folder"),
        (["--run.fileroot=/proc/none"], "run.fileroot=/proc/none cannot be written to ("),
        (["--run.tensorboard_path=/proc/none"], "run.tensorboard_path=/proc/none cannot be written to ("),
    ):
        caplog.clear()
        with pytest.raises(SystemExit) as exit_:
            main(["fit", *SMALL, *QUIET, *options])
        assert exit_.value.code == 2
        assert caplog.records[-1].getMessage().startswith(sentence)


@pytest.mark.parametrize(
    ("lost", "option", "sentence"),
    [
        ("config.json", [], "model.path=m is a folder without config.json: give one written by save_pretrained"),
        ("model.safetensors", [], "model.path=m is a folder without model.safetensors: give one written"),
        ("", [], "model.path: m/model.safetensors cannot be read ("),
        ("tokenizer.json", [], "no tokenizer could be loaded from model path 'm' ("),
        (None, ["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val=1.0: use model.optimizer.gradient_clipping instead"),
        (None, ["--trainer.precision=bf16-true"], "trainer.precision=bf16-true: use model.dtype=bfloat16 instead"),
        (
            None,
            ["--trainer.accumulate_grad_batches=4"],
            "trainer.accumulate_grad_batches=4: use a larger data.batch_size instead",
        ),
        (None, ["--data.max_concurrent_rollouts=0"], "max_concurrent_rollouts=0 must be at least 1"),
        (None, ["--data.num_engines=0"], "num_engines=0 must be positive"),
        (None, ["--data.reward_timeout_s=-1"], "reward_timeout_s=-1.0 must be positive"),
    ],
)
def test_what_cannot_be_read_or_followed_is_told_before_anything_starts(
    caplog: pytest.LogCaptureFixture, lost: str | None, option: list[str], sentence: str
):
    write_tiny_model(Path("m"))
    if lost:
        for file in Path("m").glob(lost.replace("tokenizer.json", "tokenizer*")):
            file.unlink()
    elif lost is not None:
        Path("m/model.safetensors").write_bytes(Path("m/model.safetensors").read_bytes()[:1000])
    arguments = [
        "--model=AsyncPPOModule",
        "--model.path=m",
        "--data=RolloutDataModule",
        "--data.prompts=rl_lightning.prompts.arithmetic.ArithmeticPrompts",
        '--data.rewards=[{"reward":"rl_lightning.rewards.exact.exact_match"}]',
        "--data.engine=rl_lightning.engines.torch.TorchEngine",
        "--trainer.accelerator=cpu",
    ]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, *option])
    assert exit_.value.code == 2
    assert caplog.records[-1].getMessage().startswith(sentence)


def test_answers_that_the_context_cuts_off_are_told(caplog: pytest.LogCaptureFixture):
    write_tiny_model(Path("m"))
    for length, is_told in ((512, False), (4096, True)):
        generation = SamplingParams(max_new_tokens=length)
        data = RolloutDataModule(FakePrompts(), [WeightedReward(exact_match)], "m", engine=FakeEngine(), generation=generation)
        data.check_inputs()
        assert ("is more than the model's context of 1024" in caplog.text) == is_told


def test_weights_and_biases_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"run.wandb_mode=online needs Weights & Biases: install it .* or set run.wandb_mode=disabled"
    ):
        fit("--run.wandb_mode=online")


# -- files and messages of a run


def test_a_run_says_where_everything_goes_and_puts_it_there(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "rl_lightning"):
        fit("--run.experiment=e", "--run.fileroot=out", "--run.ckpt_freq_steps=1")
    text = caplog.text
    for part in (
        "fit SmallModule with SmallData",
        "Experiment e, trial trial0",
        "out/logs/e/trial0",
        "config.yaml",
        "out/checkpoints/e/trial0",
    ):
        assert part in text
    logs, checkpoints = Path("out/logs/e/trial0"), Path("out/checkpoints/e/trial0")
    main_log = (logs / "main.log").read_text()
    assert "Experiment e, trial trial0" in main_log
    assert main_log.count("Epoch 1/2 step 1/4 (global step 1) finishes.") == 1
    assert (logs / "rollouts/rank0.jsonl").read_text().count("\n") == 16
    assert list(logs.glob("events.out.tfevents.*"))
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "epoch1epochstep4globalstep4",
        "epoch2epochstep4globalstep8",
        "last.ckpt",
    ]


def test_loggers_of_the_user_take_the_place_of_ours():
    cli = fit("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=csv")
    assert [type(target).__name__ for target in cli.trainer.loggers] == ["CSVLogger"]
    assert not list(Path("runs/logs/experiment/trial0").glob("events*"))
    assert Path("runs/logs/experiment/trial0/config.yaml").exists()


def test_no_logger_at_all():
    assert fit("--trainer.logger=false").trainer.loggers == []


def test_callbacks_of_the_user_take_the_place_of_ours():
    own = ["--trainer.callbacks+=rl_lightning.callbacks.export.Export", "--trainer.callbacks.folder=mine"]
    cli = fit(*own, "--trainer.callbacks+=lightning.pytorch.callbacks.ModelSummary")
    names = [type(c).__name__ for c in cli.trainer.callbacks]
    assert names.count("Export") == 1 and "ModelSummary" in names and names.count("RunLog") == 1
    assert len(list(Path("mine").iterdir())) == 2


def test_validate_writes_to_the_run_it_validates(caplog: pytest.LogCaptureFixture):
    fit("--run.ckpt_freq_steps=1")
    with caplog.at_level(logging.INFO, "rl_lightning"):
        RLCLI(["validate", *SMALL, "--ckpt_path=last", "--trainer.enable_progress_bar=false"])
    assert sorted(p.name for p in Path("runs/logs/experiment").iterdir()) == ["trial0"]
    assert "Validation of runs/checkpoints/experiment/trial0/last.ckpt" in caplog.text and "val_reward" in caplog.text


# -- going on


def test_ckpt_path_last_goes_on_in_the_same_run():
    whole = fit("--run.experiment=whole")
    fit("--run.experiment=e", "--trainer.max_steps=3", "--run.ckpt_freq_steps=1")
    resumed = fit("--run.experiment=e", "--ckpt_path=last")
    assert resumed.model.losses == whole.model.losses[3:]
    assert [p.name for p in Path("runs/logs/e").iterdir()] == ["trial0"]
    assert yaml.safe_load(Path("runs/logs/e/trial0/config.yaml").read_text())["ckpt_path"] is None


def test_ckpt_path_last_is_that_of_the_last_run_that_trained():
    fit("--trainer.max_steps=3", "--run.ckpt_freq_steps=1")
    with pytest.raises(ValueError, match=r"prompts\.jsonl line 3"):
        fit("--data.fail_check=true")
    resumed = fit("--ckpt_path=last")
    assert resumed.run_config is not None and resumed.run_config.trial == "trial0"
    assert len(resumed.model.losses) == 5


def test_a_fast_dev_run_saves_nothing_that_ckpt_path_last_could_mean():
    fit("--trainer.max_steps=3", "--run.ckpt_freq_steps=1")
    fit("--trainer.fast_dev_run=true")
    assert Path("runs/logs/experiment/trial1/main.log").exists() and not Path("runs/checkpoints/experiment/trial1").exists()
    resumed = fit("--ckpt_path=last")
    assert resumed.run_config is not None and resumed.run_config.trial == "trial0"


def test_early_stopping_on_a_metric_that_there_is_not_ends_the_run(caplog: pytest.LogCaptureFixture):
    with pytest.raises(RuntimeError, match="Early stopping conditioned on metric `reward`"):
        fit("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=reward", "--trainer.max_epochs=1")
    assert "Starting again" not in caplog.text


def test_resume_starts_from_the_checkpoint_or_the_beginning():
    whole = fit("--run.experiment=whole")
    first = fit("--run.experiment=e", "--run.recover_mode=resume", "--trainer.max_steps=3", "--run.ckpt_freq_steps=1")
    second = fit("--run.experiment=e", "--run.recover_mode=resume")
    assert first.model.losses + second.model.losses == whole.model.losses


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_failure_is_recovered_from(checkpoints: bool, caplog: pytest.LogCaptureFixture):
    whole = fit("--run.experiment=whole")
    every = "--run.ckpt_freq_steps=2" if checkpoints else "--run.ckpt_freq_secs=600"
    recovered = fit("--model.fail_at=5", every)
    assert SmallModule.failures == ["RuntimeError"]
    assert recovered.model.losses == whole.model.losses[4 if checkpoints else 0 :]
    assert recovered.trainer.global_step == 8
    assert "it broke" in caplog.text and "Starting again from" in caplog.text
    assert Path("runs/logs/experiment/trial0/main.log").read_text().count("(global step 8) finishes") == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--run.recover_mode=disabled"], RuntimeError),
        (["--run.recover_retries=0"], RuntimeError),
        (["--model.error=ValueError"], ValueError),
        (["--model.error=KeyboardInterrupt"], SystemExit),
    ],
)
def test_what_is_not_recovered_from(options: list[str], error: type[BaseException]):
    with pytest.raises(error):
        fit("--model.fail_at=5", *options)


def test_a_failure_goes_back_to_the_checkpoint_that_was_named_not_to_that_of_the_run_before(caplog: pytest.LogCaptureFixture):
    fit("--run.ckpt_freq_steps=3", "--trainer.max_steps=3")
    Path("runs/checkpoints/experiment/trial0/last.ckpt").rename("three.ckpt")
    fit("--run.trial=trial0", "--ckpt_path=three.ckpt", "--run.ckpt_freq_steps=3", "--trainer.max_steps=6")
    again = fit("--run.trial=trial0", "--ckpt_path=three.ckpt", "--model.fail_at=4", "--run.ckpt_freq_steps=3")
    assert SmallModule.failures == ["RuntimeError"]
    assert len(again.model.losses) == 5, "steps 4 to 8"
    assert "Starting again from three.ckpt" in caplog.text


def test_retries_are_counted(monkeypatch: pytest.MonkeyPatch):
    class Never(list[str]):
        def __bool__(self) -> bool:
            return False

    failures = Never()
    monkeypatch.setattr(SmallModule, "failures", failures)
    with pytest.raises(RuntimeError, match="it broke"):
        fit("--model.fail_at=1", "--run.recover_retries=2")
    assert len(failures) == 3


@pytest.mark.parametrize(("saves", "attempts"), [(False, 3), (True, 11)])
def test_a_failure_that_comes_again_and_again_is_not_tried_ten_times(
    saves: bool, attempts: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fails(self: SmallModule, batch: Any, batch_idx: int) -> None:
        starts.append(batch_idx)
        if saves:
            self.trainer.save_checkpoint("part.ckpt")
            checkpoints.mkdir(parents=True, exist_ok=True)
            Path("part.ckpt").rename(checkpoints / "last.ckpt")
        raise RuntimeError(f"The size of tensor a ({len(starts)}) must match the size of tensor b (4)")

    starts: list[int] = []
    checkpoints = Path("runs/checkpoints/experiment/trial0")
    monkeypatch.setattr(SmallModule, "training_step", fails)
    with pytest.raises(RuntimeError, match="must match"):
        fit()
    assert len(starts) == attempts
    assert ("no further attempt" in caplog.text) != saves


def test_a_full_disk_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch):
    def fails(self: SmallModule, batch: Any, batch_idx: int) -> None:
        starts.append(batch_idx)
        raise OSError(errno.ENOSPC, "No space left on device", "last.ckpt.part")

    starts: list[int] = []
    monkeypatch.setattr(SmallModule, "training_step", fails)
    with pytest.raises(OSError, match=r"last\.ckpt\.part"):
        fit()
    assert len(starts) == 1


# -- allocation_mode

ROLLOUTS = [
    "--model=AsyncPPOModule",
    "--model.path=m",
    "--data=RolloutDataModule",
    "--data.prompts=rl_lightning.prompts.arithmetic.ArithmeticPrompts",
    '--data.rewards=[{"reward": "rl_lightning.rewards.exact.exact_match"}]',
    "--data.engine=rl_lightning.testing.FakeEngine",
    "--trainer.accelerator=cpu",
]


AUTO_ENGINE = [option for option in ROLLOUTS if "engine" not in option]


def allocate(mode: str, *options: str, model: list[str] = ROLLOUTS) -> RLCLI:
    return RLCLI([*model, f"--run.allocation_mode={mode}", *options], run=False)


def test_allocation_sets_engines_and_workers():
    cli = allocate("sglang.d3p1m1+d5p1m1", "--trainer.strategy=ray")
    assert isinstance(cli.datamodule, RolloutDataModule)
    assert cli.datamodule.num_engines == 3
    assert cli.trainer.strategy.num_workers == 5  # type: ignore[attr-defined]


def test_allocation_of_training_alone():
    cli = allocate("d8p1m1", "--trainer.strategy=ray", model=SMALL)
    assert cli.trainer.strategy.num_workers == 8  # type: ignore[attr-defined]


def test_servers_of_several_gpus_follow_from_the_allocation():
    where = ["--run.n_gpus_per_node=12", "--trainer.strategy=ray", "--trainer.accelerator=auto"]
    data: Any = allocate("sglang.d2p2m2+d4p1m1", *where, model=AUTO_ENGINE).datamodule
    assert (data.num_engines, data.gpus_per_engine, data.transport_name) == (2, 4, "disk")
    assert data.engine.server_args == {"tp_size": 2, "pp_size": 2}


@pytest.mark.parametrize(("n", "transport"), [(1, "tensor"), (4, "disk")])
def test_colocated_engines_and_ranks_share_each_gpu(n: int, transport: str):
    where = [f"--run.n_gpus_per_node={n}", "--trainer.strategy=ray", "--trainer.accelerator=auto"]
    cli = allocate(f"sglang.d{n}p1m1|d{n}p1m1", *where, model=AUTO_ENGINE)
    data: Any = cli.datamodule
    strategy: Any = cli.trainer.strategy
    assert data.engine.colocated and data.transport_name == transport
    assert (data.num_engines, strategy.num_workers) == (n, n)
    assert data.gpus_per_engine + strategy.num_gpus_per_worker == 1.0 and strategy.num_gpus_per_worker > 0.5


def test_colocation_is_for_one_node():
    where = ["--run.n_nodes=2", "--run.n_gpus_per_node=2", "--trainer.strategy=ray"]
    with pytest.raises(ValueError, match="n_nodes=2"):
        allocate("sglang.d4p1m1|d4p1m1", *where, model=AUTO_ENGINE)


def test_a_split_layer_is_trained_by_the_strategy_that_splits_it():
    strategy: Any = allocate("sglang.d4p1m1+d2p1m2", "--trainer.strategy=ray", model=AUTO_ENGINE).trainer.strategy
    assert (type(strategy).__name__, strategy.num_workers, strategy._tensor_parallel_size) == ("RayModelParallelStrategy", 4, 2)


@pytest.mark.parametrize("strategy", [["ray"], ["RayStrategy", "--trainer.strategy.address=auto"]])
@pytest.mark.parametrize(("mode", "gpus"), [("sglang.d2p1m1+d2p1m1", 1.0), ("sglang.d4p1m1|d4p1m1", TRAINER_SHARE)])
def test_a_driver_without_gpus_leaves_them_to_the_ranks(strategy: list[str], mode: str, gpus: float):
    name, *options = strategy
    where = ["--run.n_gpus_per_node=4", f"--trainer.strategy={name}", *options, "--trainer.accelerator=cuda"]
    trained: Any = allocate(mode, *where, "--trainer.precision=bf16-mixed", model=AUTO_ENGINE).trainer.strategy
    assert trained.gpus_per_worker == gpus


def test_without_ray_there_are_no_gpus_but_those_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MisconfigurationException, match="accelerator"):
        RLCLI([*SMALL, "--trainer.accelerator=cuda"], run=False)


def test_the_rank_that_sends_weights_says_how_they_travel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    data: Any = RLCLI([*AUTO_ENGINE, "--trainer.strategy=ray"], run=False).datamodule
    assert data.transport_name == "disk"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # on a node of GPUs, which a driver's need not be
    assert pickle.loads(pickle.dumps(data)).transport_name == "distributed"


def test_on_a_cpu_no_gpus_are_asked_for():
    for mode in ("sglang.d1p1m2+d1p1m1", "sglang.d1p1m1|d1p1m1"):
        gpus = f"--run.n_gpus_per_node={3 if '+' in mode else 1}"
        cli = allocate(mode, gpus, "--trainer.strategy=ray", model=AUTO_ENGINE)
        assert cli.datamodule.gpus_per_engine is None  # type: ignore[attr-defined]
        assert cli.trainer.strategy.num_gpus_per_worker is None  # type: ignore[attr-defined]


def test_the_engine_is_the_one_that_the_allocation_names():
    data: Any = allocate("torch.d4p1m1+d4p1m1", model=AUTO_ENGINE).datamodule
    assert type(data.engine).__name__ == "TorchEngine"


def test_a_model_whose_heads_cannot_be_split_is_refused_before_anything_starts(tmp_path: Path):
    from rl_lightning.models.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match="generation splits every layer over m8 devices"):
        allocate("sglang.d1p1m8+d8p1m1", f"--model.path={folder}", "--run.n_gpus_per_node=16", model=AUTO_ENGINE)


@pytest.mark.parametrize(
    ("mode", "options", "sentence"),
    [
        ("sglang.d4p1m1+d2p1m1", [], r"generation 4 \+ training 2 = 6 GPUs, but n_nodes=1 x n_gpus_per_node=8 = 8"),
        ("sglang.d4p1m1+d4p1m1", ["--data.num_engines=2"], r"needs data.num_engines=4, but it is set to 2"),
        (
            "sglang.d4p1m1+d4p1m1",
            ["--trainer.strategy=RayStrategy", "--trainer.strategy.num_workers=2"],
            r"num_workers of RayStrategy=4",
        ),
        ("sglang.d4p1m1+d4p1m1", ["--trainer.devices=2"], r"needs trainer.devices=4, but it is set to 2"),
        ("d8p1m1", [], r"has no generation part, which .*RolloutDataModule needs: write sglang.d1p1m1\+d8p1m1"),
        ("sglang.d4p1m1+d4", [], "does not parse"),
        ("sglang.d2p1m2+d4p1m1", [], r"engines of 2 GPUs, which only SGLangEngine spans, but data.engine is .*FakeEngine"),
        (
            "sglang.d2p1m2+d4p1m1",
            ["--data.engine=rl_lightning.engines.sglang.SGLangEngine", "--data.engine.server_args={tp: 4}"],
            r"needs tp_size in data.engine.server_args=2, but it is set to 4",
        ),
        ("sglang.d4p1m1+d2p1m2", [], r"splits every layer over m2 ranks.*set trainer.strategy=ray_model_parallel"),
        ("sglang.d4p1m1+d2p2m1", [], "pipeline parallel training is not supported yet"),
    ],
)
def test_allocations_that_do_not_fit(mode: str, options: list[str], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        allocate(mode, *options)


def test_public_names():
    import rl_lightning

    for name in ("AsyncPPOModule", "SFTModule", "RolloutDataModule", "RayStrategy"):
        loaded: Any = getattr(rl_lightning, name)
        assert loaded.__name__ == name and name in dir(rl_lightning)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rl_lightning.Nothing
