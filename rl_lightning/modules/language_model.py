"""LanguageModule: a Hugging Face causal language model under training, without padding.

The base of `AsyncPPOModule` and `SFTModule`.  It loads the model, scores tokens of packed sequences, and makes one
optimiser update from any number of micro-batches on any number of ranks; what the loss is, subclasses say.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch, make_micro_batch, pack_micro_batches
from rl_lightning.models.attention import register_packed_attention
from rl_lightning.models.linear import accelerate_linears
from rl_lightning.models.logprobs import token_logprobs
from rl_lightning.models.memory import keep_freed_memory
from rl_lightning.modules.data_parallel import DataParallel
from rl_lightning.modules.optimizer import OptimizerConfig, clip_gradients
from rl_lightning.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
MicroLoss = Callable[[MicroBatch], Tensor]
"""Scalar share of a micro-batch in the loss of its minibatch; the shares of all micro-batches on all ranks add up."""

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class LanguageModule(LightningModule):
    """A causal language model from a Hugging Face folder or hub name, trained on flat batches.

    Args:
        path: folder or hub name of the model.
        optimizer: how weights are updated.
        max_tokens_per_mb: most tokens of one forward and backward pass.
        dtype: type of the weights under training; engines get them in their own.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        share_prompts: run the prompt of answers to the same question once; None: on the CPU only.
        seed: of the order in which sequences are dealt to minibatches.

    Attributes:
        model: the Hugging Face model, there after `configure_model`.
        step_statistics: numbers of the last training step over all ranks, by the names in the documentation.
        step_histograms: distributions of the last training step over all ranks.
    """

    def __init__(
        self,
        path: str,
        optimizer: OptimizerConfig = OptimizerConfig(),
        max_tokens_per_mb: int = 30720,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        gradient_checkpointing: bool = False,
        share_prompts: bool | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if max_tokens_per_mb < 2:
            raise ValueError(f"max_tokens_per_mb={max_tokens_per_mb} must hold at least a prompt and an answer token")
        self.automatic_optimization = False
        self.path, self.dtype_name, self.seed = path, dtype, seed
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.max_tokens_per_mb, self.gradient_checkpointing = max_tokens_per_mb, gradient_checkpointing
        self.share_prompts = share_prompts
        self.ranks = DataParallel()
        self.temperature = 1.0
        self.model: Any = None
        self.step_statistics: dict[str, float] = {}
        self.step_histograms: dict[str, Tensor] = {}

    def remember(self, **options: Any) -> None:
        """Saves the constructor's `options` as plain data, so that checkpoints load without executing code."""
        plain = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in options.items()}
        self.save_hyperparameters(plain, logger=False)

    # -- LightningModule

    def configure_model(self) -> None:
        """Loads the model. Idempotent.

        Raises:
            ValueError: the model's attention or output layer cannot be trained packed.
        """
        if self.model is not None:
            return
        from transformers import AutoModelForCausalLM

        attention = register_packed_attention()
        dtype = getattr(torch, self.dtype_name)
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, attn_implementation=attention)
        check_supported(model)
        turn_off_dropout(model)
        accelerate_linears(model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model.train()

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped by `training_step`."""
        optimizer = self.optimizer_config.make_optimizer(self.model)
        total = self.trainer.estimated_stepping_batches
        scheduler = self.optimizer_config.make_scheduler(optimizer, total if total > 0 else math.inf)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuses what manual optimisation cannot do; on the CPU, keeps memory for the next step."""
        if self.trainer.precision in ("16-mixed", "16-true"):
            raise ValueError(f"trainer.precision={self.trainer.precision} needs loss scaling, use bf16-mixed or 32-true instead")
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from rl_lightning.prompts.tokenizer import load_tokenizer

        return load_tokenizer(self.path)

    # -- scoring

    def score(self, micro: MicroBatch, *, with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(M,) log-probabilities of the targets of `micro` at the sampling temperature, and the (M,) entropy if wanted."""
        output = self.model.base_model(
            input_ids=micro.token_ids.unsqueeze(0),
            position_ids=micro.layout.positions.unsqueeze(0),
            layout=micro.layout,
            use_cache=False,
        )
        hidden = output.last_hidden_state.squeeze(0).index_select(0, micro.predictors)
        head = self.model.get_output_embeddings()
        return token_logprobs(
            hidden,
            head.weight,
            micro.targets,
            rows=micro.rows,
            bias=head.bias,
            temperature=self.temperature,
            with_entropy=with_entropy,
        )

    @torch.no_grad()
    def batch_logprobs(self, batch: Batch, sequences: Sequence[int], max_tokens: int | None = None) -> Tensor:
        """(T,) float64 log-probabilities under the present weights, NaN at tokens that are not in the loss or not in `sequences`.

        A collective: all ranks call it with their own sequences.
        """
        logprobs = torch.full(batch.loss_mask.shape, math.nan, dtype=torch.float64)
        for micro in self.micro_batches(batch, sequences, max_tokens or self.max_tokens_per_mb):
            scored, _ = self.score(micro)
            if not micro.is_empty:
                logprobs[micro.sources] = scored.double().cpu()
        return logprobs

    def micro_batches(self, batch: Batch, sequences: Sequence[int], max_tokens: int) -> Iterator[MicroBatch]:
        """`sequences` of `batch` packed; equally many micro-batches on every rank, those without work get stand-ins."""
        share = self.device.type == "cpu" if self.share_prompts is None else self.share_prompts
        packed = pack_micro_batches(batch, sequences, max_tokens, share_prompts=share)
        wanted = self.ranks.max(len(packed), self.device)
        if 0 < len(packed) < wanted:
            finer = pack_micro_batches(batch, sequences, max_tokens, min_groups=wanted, share_prompts=share)
            packed = finer if len(finer) <= wanted else packed
        for chosen in packed:
            yield make_micro_batch(batch, chosen, share_prompts=share, device=self.device)
        for _ in range(wanted - len(packed)):
            yield MicroBatch.empty(self.device)

    # -- updating

    def update(
        self, micro_batches: Iterator[MicroBatch], loss: MicroLoss, admit: Callable[[], bool] | None = None
    ) -> float | None:
        """One optimiser update from the sum of `loss` over all micro-batches of all ranks. A collective.

        Args:
            micro_batches: the minibatch, as many on every rank.
            loss: see `MicroLoss`.
            admit: asked after the backward passes, with the same answer on every rank; false leaves the weights alone.

        Returns:
            The gradient's norm before clipping; None if nothing was updated because there was nothing to learn from or
            `admit` refused. Weights stay as they are as well where the norm is not finite.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        if not self._accumulate(micro_batches, loss) or (admit is not None and not admit()):
            return None
        norm = clip_gradients(self.model.parameters(), self.optimizer_config.gradient_clipping)
        if math.isfinite(norm):
            optimizer.step()
        else:
            logger.warning("the gradient's norm is %s: the weights stay as they are", norm)
        return norm

    def _accumulate(self, micro_batches: Iterator[MicroBatch], loss: MicroLoss) -> bool:
        """Backward passes over all micro-batches, gradients shared in the last; whether there was any."""
        micro = next(micro_batches, None)
        is_any = micro is not None
        while micro is not None:
            following = next(micro_batches, None)
            with self._gradient_sync(following is None):
                # ranks' gradients are averaged by the strategy, ours add up
                self.manual_backward(loss(micro) * self.ranks.size)
            micro = following
        return is_any

    def _gradient_sync(self, wanted: bool) -> AbstractContextManager[Any]:
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if wanted or block is None else block()

    @contextmanager
    def one_counted_step(self) -> Iterator[None]:
        """Whatever updates happen inside, or none at all, the Trainer counts one global step: the version of the weights."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        before, after = optimizer._on_before_step, optimizer._on_after_step
        optimizer._on_before_step = optimizer._on_after_step = lambda: None
        try:
            yield
        finally:
            optimizer._on_before_step, optimizer._on_after_step = before, after
        before()
        after()
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def record(self, statistics: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """Publishes the step's statistics: to loggers at the finished step's number, and as attributes for callbacks."""
        self.step_statistics, self.step_histograms = dict(statistics), dict(histograms)
        step = float(self.trainer.global_step)
        self.log_dict({**statistics, "step": step}, on_step=True, on_epoch=False, batch_size=1)

    @property
    def learning_rate(self) -> float:
        """The rate of this step's updates."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return float(optimizer.param_groups[0]["lr"])


def as_config(kind: type[Config], value: Any) -> Config:
    """`value` as a configuration of `kind`: hyper-parameters come back from checkpoints as plain dictionaries."""
    return kind(**value) if isinstance(value, Mapping) else value


def check_supported(model: PreTrainedModel) -> None:
    """Refuses models whose forward pass `LanguageModule.score` would not reproduce."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not use transformers' attention interface, so it cannot be trained without padding")
    transforms = [key for key in LOGIT_TRANSFORMS if getattr(model.config, key, None) not in (None, 1.0)]
    if transforms:
        raise ValueError(f"{name} transforms its logits ({', '.join(transforms)}), which packed scoring does not do")


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Log-probabilities of the trainer must be those of the engine, which drops nothing."""
    layer: Any
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.0
