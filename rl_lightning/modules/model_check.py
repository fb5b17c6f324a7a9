"""What options and models only know together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def check_models(
    ppo: PPOConfig,
    *,
    critic_path: str | None,
    init_critic_from_actor: bool,
    critic_optimizer: OptimizerConfig,
    critic_max_tokens_per_mb: int | None,
    ref_path: str | None,
    ref_max_tokens_per_mb: int | None,
) -> None:
    """Refuses models that nothing would use, and uses without a model.

    Raises:
        ValueError: names both options and the way out.
    """
    of_critic = {
        f"critic_path={critic_path}": critic_path is not None,
        f"init_critic_from_actor={str(init_critic_from_actor).lower()}": init_critic_from_actor,
        f"critic_optimizer.lr={critic_optimizer.lr}": critic_optimizer != OptimizerConfig(),
        f"critic_max_tokens_per_mb={critic_max_tokens_per_mb}": critic_max_tokens_per_mb is not None,
    }
    option = next((option for option, given in of_critic.items() if given), None)
    if option is not None and ppo.disable_value:
        raise ValueError(f"{option} is about a critic, which ppo.disable_value=true leaves out: set that to false, or drop it")
    if critic_path is not None and init_critic_from_actor:
        raise ValueError(f"critic_path={critic_path} and init_critic_from_actor=true are two starts for one critic: set only one")
    if not ppo.disable_value and critic_path is None and not init_critic_from_actor:
        raise ValueError("ppo.disable_value=false needs a critic to start from: set critic_path, or init_critic_from_actor=true")
    of_reference = {"ref_path": ref_path, "ref_max_tokens_per_mb": ref_max_tokens_per_mb}
    for name, value in of_reference.items():
        if value is not None and not ppo.kl_ctl:
            raise ValueError(
                f"{name}={value} is about a reference, which ppo.kl_ctl=0 makes no use of: set kl_ctl, or leave {name} at null"
            )
    for name, value in (("critic_max_tokens_per_mb", critic_max_tokens_per_mb), ("ref_max_tokens_per_mb", ref_max_tokens_per_mb)):
        if value is not None and value < 2:
            raise ValueError(f"{name}={value} must hold at least a prompt and an answer token")


def check_trainer(trainer: Trainer) -> None:
    """Refuses options of the Trainer that manual optimisation does not follow.

    Raises:
        ValueError: names the option and ours.
    """
    if trainer.precision in ("16-mixed", "16-true"):
        raise ValueError(f"trainer.precision={trainer.precision} needs loss scaling, use bf16-mixed or 32-true instead")
    if trainer.precision in ("bf16-true", "64-true"):
        dtype = "bfloat16" if trainer.precision == "bf16-true" else "float64"
        raise ValueError(f"trainer.precision={trainer.precision}: use model.dtype={dtype} instead, and trainer.precision=32-true")
    if trainer.gradient_clip_val is not None:
        raise ValueError(f"trainer.gradient_clip_val={trainer.gradient_clip_val}: use model.optimizer.gradient_clipping instead")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: use a larger data.batch_size instead, which "
            f"model.max_tokens_per_mb cuts to micro-batches"
        )


def check_sharded(*, has_adapters: bool, dtype: str) -> None:
    """Refuses what a model that is cut over ranks cannot have.

    Raises:
        ValueError: names the option and the way out.
    """
    if has_adapters:
        raise ValueError("lora does not work on a model that is cut over ranks: use trainer.strategy=ray, or lora: null")
    if dtype == "bfloat16":
        raise ValueError(
            "dtype=bfloat16 does not work on a model that is cut over ranks: use dtype: float32 and trainer.precision: "
            "bf16-mixed, which gathers, computes and multiplies in bfloat16"
        )
