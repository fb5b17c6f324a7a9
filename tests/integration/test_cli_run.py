"""Whole runs as a user starts them: YAML, own classes, RayStrategy, and what is left on disk afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

USER_CODE = '''
import os
import signal
from pathlib import Path

from rl_lightning import AsyncPPOModule


class Reinforce(AsyncPPOModule):
    """REINFORCE: no ratio, no clipping."""

    def policy_loss(self, logprobs, tokens):
        gain = tokens.advantages * logprobs * tokens.loss_mask
        return -gain.sum() / tokens.normalizer, {"surprise": -logprobs.detach()}


class Signalled(Reinforce):
    """Gets the signal in `signal.txt` in the middle of its third step, when it is tried for the first time."""

    def policy_loss(self, logprobs, tokens):
        file = Path("signal.txt")
        if self.global_step == 2 and file.exists():
            signum = int(file.read_text())
            file.unlink()
            os.kill(os.getpid(), signum)
        return super().policy_loss(logprobs, tokens)


class FailsOnce(Reinforce):
    """Its third step, when it is tried for the first time."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 2 and not Path("failed").exists():
            Path("failed").touch()
            raise RuntimeError("no such luck")


def even_digits(prompt, answer):
    return sum(c in "02468" for c in answer) / max(1, len(answer))
'''


def write_recipe(folder: Path, model: Path, **run: object) -> Path:
    (folder / "mine.py").write_text(USER_CODE)
    ray = {
        "address": "local",
        "num_cpus": 4,
        "include_dashboard": False,
        "object_store_memory": 100 * 2**20,
        "_temp_dir": f"{folder}/ray",
    }
    recipe = {
        "run": {"fileroot": str(folder / "runs"), "experiment": "mine", "save_freq_epochs": None, **run},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "strategy": {"class_path": "RayStrategy", "init_args": {"num_workers": 1, "ray_init": ray}},
        },
        "model": {
            "class_path": "mine.Reinforce",
            "init_args": {"path": str(model), "optimizer": {"lr": 1e-3}, "ppo": {"n_minibatches": 1, "group_adv_norm": True}},
        },
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "prompts": {"class_path": "tests.samples.LetterPrompts", "init_args": {"size": 24}},
                "rewards": [{"reward": "mine.even_digits"}],
                "engine": {"class_path": "rl_lightning.engines.torch.TorchEngine"},
                "batch_size": 4,
                "group_size": 4,
                "max_head_offpolicyness": 0,
                "generation": {"max_new_tokens": 8},
            },
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{folder}:{root}", "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rl_lightning", *args]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, *args: str) -> str:
    process = start(folder, *args)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def losses(log: str) -> list[float]:
    return [float(x) for x in re.findall(r"actor_loss (\S+)", log)]


@pytest.mark.slow
def test_a_users_loss_and_reward_by_class_path_and_the_saved_config_repeats_the_run(folder: Path, tiny_model: Path) -> None:
    output = run(folder, "fit", "--config", str(write_recipe(folder, tiny_model)))
    logs, checkpoints = folder / "runs/logs/mine/trial0", folder / "runs/checkpoints/mine/trial0"
    main_log = (logs / "main.log").read_text()
    assert "Epoch 1/1 step 6/6 (global step 6) finishes." in main_log and "Epoch 1/1 step 6/6" in output
    assert "surprise" in main_log, "what the user's loss returns is logged"
    assert list(logs.glob("events.out.tfevents*"))
    answers = [json.loads(line) for path in sorted((logs / "rollouts").glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert len(answers) == 6 * 4 * 4 and {"prompt", "answer", "reward"} <= answers[0].keys()
    assert_loads(next(checkpoints.glob("epoch*globalstep6")))
    run(folder, "fit", "--config", str(logs / "config.yaml"))
    repeated = (folder / "runs/logs/mine/trial1/main.log").read_text()
    assert losses(repeated) == pytest.approx(losses(main_log), abs=1e-4) and len(losses(repeated)) == 6


@pytest.mark.slow
def test_an_attempt_after_a_failure_has_the_prompts_of_a_file_too(folder: Path, tiny_model: Path) -> None:
    recipe = write_recipe(folder, tiny_model, ckpt_freq_steps=1)
    options = yaml.safe_load(recipe.read_text())
    lines = [json.dumps({"query_id": str(i), "prompt": f"{i}=", "task": "digits"}) for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    init = {"path": "prompts.jsonl", "max_prompt_len": 8, "extra_tasks": ["digits"]}
    options["data"]["init_args"]["prompts"] = {"class_path": "rl_lightning.prompts.jsonl.JsonlPrompts", "init_args": init}
    options["model"]["class_path"] = "mine.FailsOnce"
    recipe.write_text(yaml.safe_dump(options))
    output = run(folder, "fit", "--config", str(recipe))
    assert "Failure 1" in output and "no such luck" in output
    assert re.findall(r"step \d/6 \(global step (\d)\)", output) == list("123456")


def assert_loads(exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("abc=", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape[1] == ids.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_process_and_goes_on_from_last(folder: Path, tiny_model: Path, signum: int) -> None:
    recipe = write_recipe(folder, tiny_model, ckpt_freq_steps=1)
    process = start(folder, "fit", "--config", str(recipe), "--trainer.max_epochs", "1000", "--trainer.max_steps", "2000")
    main_log = folder / "runs/logs/mine/trial0/main.log"
    wait_until(lambda: main_log.exists() and "(global step 3)" in main_log.read_text(), 120, process)
    family = [process_info for process_info in psutil.Process(process.pid).children(recursive=True)]
    started = time.monotonic()
    process.send_signal(signum)
    process.wait(timeout=20)
    took = time.monotonic() - started
    gone, alive = psutil.wait_procs(family, timeout=max(0.0, 15 - took))
    survivors = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert took < 15 and not survivors, (took, survivors)
    assert psutil_mentions(str(folder)) == []
    if signum == signal.SIGTERM:
        stopped_at = max(int(x) for x in re.findall(r"\(global step (\d+)\)", main_log.read_text()))
        more = ["--ckpt_path", "last", "--run.trial", "trial0", "--trainer.max_epochs", "1000"]
        run(folder, "fit", "--config", str(recipe), *more, "--trainer.max_steps", str(stopped_at + 2))
        steps = [int(x) for x in re.findall(r"\(global step (\d+)\)", main_log.read_text())]
        assert steps[-2:] == [stopped_at + 1, stopped_at + 2] and sorted(set(steps)) == list(range(1, stopped_at + 3))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_step_in_which_a_signal_comes_is_finished_without_ray_strategy_too(
    folder: Path, tiny_model: Path, signum: int, status: int
) -> None:
    recipe = write_recipe(folder, tiny_model)
    options = yaml.safe_load(recipe.read_text())
    options["data"]["init_args"]["ray_init"] = options["trainer"].pop("strategy")["init_args"]["ray_init"]
    options["model"]["class_path"] = "mine.Signalled"
    recipe.write_text(yaml.safe_dump(options))
    (folder / "signal.txt").write_text(str(int(signum)))
    process = start(folder, "fit", "--config", str(recipe))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    assert "Saved the restart checkpoint of global step 3" in output and psutil_mentions(str(folder)) == []
    output = run(folder, "fit", "--config", str(recipe), "--ckpt_path", "last")
    assert re.findall(r"step \d/6 \(global step (\d)\)", output) == list("456")


def psutil_mentions(text: str) -> list[str]:
    """Command lines of living processes that mention `text`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if text in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def wait_until(condition: object, timeout_s: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, "it did not come within the deadline"
        time.sleep(0.2)
