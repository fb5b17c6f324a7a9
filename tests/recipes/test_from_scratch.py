"""The recipes from scratch, shrunk: imitation, then PPO on what it saved, as a user starts them; adapters on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl_lightning.models.tiny import write_tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"


def run(folder: Path, *command: str) -> str:
    """Runs Python in `folder`; returns what it logged."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0", "RAY_TMPDIR": str(folder / "ray")}
    (folder / "ray").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.slow
def test_from_scratch(folder: Path):
    run(folder, str(RECIPES / "tiny_from_scratch.py"))
    fit = ("-m", "rl_lightning", "fit", "--config")
    run(folder, *fit, f"{RECIPES}/tiny_from_scratch_sft.yaml", "--trainer.max_epochs=1")
    imitator = "runs/checkpoints/tiny-sft/trial0/epoch1epochstep32globalstep32"
    log = run(folder, *fit, f"{RECIPES}/tiny_from_scratch_ppo.yaml", f"--model.path={imitator}", "--trainer.max_steps=3")
    assert "Epoch 1/1 step 3/150 (global step 3) finishes." in (folder / "runs/logs/tiny-ppo/trial0/main.log").read_text()
    assert (folder / "runs/checkpoints/tiny-ppo/trial0/epoch1epochstep3globalstep3/model.safetensors").exists()
    assert (folder / "runs/logs/tiny-ppo/trial0/rollouts/rank0.jsonl").read_text().count("\n") == 3 * 32 * 8
    assert "RayStrategy on Ray" in log
    run(folder, *fit, f"{RECIPES}/tiny_critic_kl_ppo.yaml", f"--model.path={imitator}", "--trainer.max_steps=3")
    log = (folder / "runs/logs/tiny-critic-kl-ppo/trial0/main.log").read_text()
    assert "(global step 3) finishes" in log
    assert min(log.count(name) for name in (" value_loss ", " critic_grad_norm ", " ref_kl ", " kl_reward ")) == 3


@pytest.mark.slow
def test_adapters(folder: Path):
    """What is exported as a whole is the base model with the exported adapter merged."""
    write_tiny_model(folder / "tiny")
    (folder / "mine.py").write_text("def digits(prompt, answer):\n    return sum(map(str.isdigit, answer)) / 4\n")
    shrunk = ["--model.path=tiny", "--trainer.max_steps=2", '--data.rewards=[{"reward": "mine.digits"}]']
    run(folder, "-m", "rl_lightning", "fit", f"--config={RECIPES}/lora_arithmetic.yaml", *shrunk)
    (exported,) = (folder / "runs/checkpoints/lora_arithmetic/trial0").glob("epoch*")
    base, merged = (load_file(path / "model.safetensors") for path in (folder / "tiny", exported))
    adapter = load_file(exported / "adapter" / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if re.search(r"(self_attn|mlp)\..*_proj\.weight", name)}
    for name in changed:
        a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(merged[name], base[name] + 32 / 16 * b @ a)
