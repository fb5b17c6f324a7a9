"""Every shipped recipe, and every option that the documentation names, exists and resolves."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl_lightning.cli import RLCLI

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GUIDE_RUNS = [f"{kind}_1.7b_gpu8" for kind in ("async_ppo", "sync_ppo", "sft")]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["rl-lightning"])
    monkeypatch.chdir(tmp_path)


def load(name: str, *options: str) -> RLCLI:
    """Everything constructed, nothing started, on whatever this machine has."""
    on_cpu = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    return RLCLI([f"--config={ROOT / 'recipes' / name}.yaml", *on_cpu, *options], run=False)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.ppo.eps_clip": 0.2}`: options as on the command line, without `init_args`."""
    if isinstance(tree, dict) and set(tree) <= {"class_path", "init_args"} and "class_path" in tree:
        return {prefix: tree["class_path"], **flat(tree.get("init_args") or {}, prefix)}
    if isinstance(tree, dict):
        found: dict[str, Any] = {prefix: tree}
        for name, value in tree.items():
            found |= flat(value, f"{prefix}.{name}" if prefix else name)
        return found
    return {prefix: tree}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_one_must_know(path: Path):
    comment = path.read_text().split("\n\n")[0]
    for word in ("command:", "hardware:", "minutes:", "expected:"):
        assert word in comment
    assert f"recipes/{path.name}" in comment or "make quickstart" in comment


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves(path: Path):
    cli = load(path.stem)
    stated = flat(yaml.safe_load(path.read_text()))
    resolved = flat(yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False, skip_unset=False)))
    assert {name for name in stated if "server_args" not in name} <= set(resolved)


@pytest.mark.parametrize("name", ["async_ppo_1.7b_gpu8", "sync_ppo_1.7b_gpu8"])
def test_the_guides_ppo_runs_have_the_guides_values(name: str):
    cli = load(name)
    data, ppo = cli.datamodule, cli.model.ppo
    assert (data.batch_size, data.group_size, data.generation.max_new_tokens) == (512, 16, 27648)
    assert data.gate.max_head_offpolicyness == (4 if name.startswith("async") else 0)
    assert (data.num_engines, cli.trainer.strategy.num_workers) == (4, 4)
    assert (ppo.n_minibatches, ppo.eps_clip, ppo.reward_output_scaling, ppo.use_decoupled_loss) == (4, 0.2, 5, True)
    assert (cli.model.optimizer_config.lr, cli.model.max_tokens_per_mb, cli.trainer.max_epochs) == (2e-5, 30720, 5)


def test_the_guides_fine_tuning_trains_on_all_gpus():
    assert load("sft_1.7b_gpu8").trainer.strategy.num_workers == 8


@pytest.mark.parametrize("name", GUIDE_RUNS)
def test_gpus_that_do_not_add_up_are_refused(name: str):
    with pytest.raises(ValueError, match="n_gpus_per_node=4 = 4"):
        load(name, "--run.n_gpus_per_node=4")


def documented() -> list[tuple[str, str, str]]:
    """(AReaL's name, our option, its default) of every row of docs/options.md that has a default."""
    rows = [line.strip("| ").split("|") for line in (ROOT / "docs/options.md").read_text().splitlines() if line.startswith("| `")]
    found = []
    for areal, ours, *rest in ([cell.strip() for cell in row] for row in rows):
        if rest and re.fullmatch(r"`[\w.]+`", ours):
            found.append((areal, ours.strip("`"), rest[0]))
    return found


def test_every_documented_option_exists_with_its_default():
    cli = load("async_ppo_1.7b_gpu8")
    resolved = flat(yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False, skip_unset=False)))
    stated = flat(yaml.safe_load((ROOT / "recipes/async_ppo_1.7b_gpu8.yaml").read_text()))
    rows = documented()
    assert len(rows) >= 75
    for areal, option, default in rows:
        assert option in resolved, f"{areal} is documented as {option}, which does not exist"
        if option not in stated and default not in ("required", "next free `trial{N}`"):
            assert resolved[option] == yaml.safe_load(default.strip("`")) or float(resolved[option]) == float(default), option


GUIDE = """
actor.path critic.path ref.path actor.optimizer.lr actor.optimizer.warmup_steps_proportion actor.optimizer.eps
actor.optimizer.weight_decay actor.optimizer.gradient_clipping dataset.path dataset.max_prompt_len dataset.train_bs_n_seqs
group_size cluster.fileroot n_nodes n_gpus_per_node allocation_mode exp_ctrl.total_train_epochs exp_ctrl.save_freq_epochs
exp_ctrl.save_freq_steps exp_ctrl.save_freq_secs exp_ctrl.ckpt_freq_epochs exp_ctrl.ckpt_freq_steps exp_ctrl.ckpt_freq_secs
recover_mode recover_retries actor_train.mb_spec.max_tokens_per_mb actor_inf.mb_spec.max_tokens_per_mb ppo.ppo_n_minibatches
ppo.recompute_logprob ppo.use_decoupled_loss ppo.eps_clip ppo.c_clip ppo.behav_imp_weight_cap ppo.value_eps_clip
ppo.early_stop_imp_ratio ppo.kl_ctl ppo.use_adaptive_kl_ctl ppo.discount ppo.gae_lambda ppo.adv_norm ppo.group_adv_norm
ppo.disable_value ppo.value_norm ppo.reward_output_scaling ppo.reward_output_bias ppo.max_reward_clip mask_no_eos_with_zero
mask_too_long ppo.gen.max_new_tokens ppo.gen.min_new_tokens ppo.gen.temperature ppo.gen.top_p ppo.gen.top_k ppo.gen.greedy
max_head_offpolicyness max_concurrent_rollouts new_tokens_per_chunk flush_request_timeout schedule_policy success_rate_lb
success_rate_ub ref_ema_eta shuffle_dataset seed wandb.mode tensorboard.path sglang.* mode
"""


def test_every_option_of_the_guide_is_documented():
    text = (ROOT / "docs/options.md").read_text()
    assert [name for name in GUIDE.split() if f"`{name}`" not in text] == []
