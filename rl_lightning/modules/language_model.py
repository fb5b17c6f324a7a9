"""LanguageModule: a Hugging Face causal language model under training, without padding.

The base of `AsyncPPOModule` and `SFTModule`.  It loads the model, scores tokens of packed sequences, and makes one
optimiser update from any number of micro-batches on any number of ranks; what the loss is, subclasses say.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.checkpointing import Checkpointing, activation_bytes, checkpoint_layers, level_of, plan_levels
from rl_lightning.models.folder import check_model_folder
from rl_lightning.models.layers import compile_layers, compiled_graphs
from rl_lightning.models.lora import LoRAConfig, inject_lora
from rl_lightning.models.memory import keep_freed_memory
from rl_lightning.models.operations import Operations
from rl_lightning.models.packed_model import load_packed, prepare_training, score_targets
from rl_lightning.models.sharding import Sharding
from rl_lightning.modules.counted_step import counted_once
from rl_lightning.modules.cpu_threads import limit_cpu_threads
from rl_lightning.modules.data_parallel import DataParallel
from rl_lightning.modules.hyperparameters import as_config, as_plain
from rl_lightning.modules.micro_batches import deal_micro_batches
from rl_lightning.modules.model_check import check_sharded, check_trainer
from rl_lightning.modules.optimizer import OptimizerConfig, clip_gradients, trained_by
from rl_lightning.modules.prompt_sharing import shares_prompts
from rl_lightning.modules.statistics import StepStatistics
from rl_lightning.types import Batch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MicroLoss = Callable[[MicroBatch], Tensor]
"""Scalar share of a micro-batch in the loss of its minibatch; the shares of all micro-batches on all ranks add up."""

Scorer = Callable[[MicroBatch], Tensor]
"""(M,) numbers, one for each target of a micro-batch."""


class LanguageModule(LightningModule):
    """A causal language model from a Hugging Face folder or hub name, trained on flat batches.

    Args:
        path: folder or hub name of the model.
        optimizer: how weights are updated.
        max_tokens_per_mb: most tokens of one forward and backward pass.
        dtype: type of the weights under training; engines get them in their own.
        gradient_checkpointing: what the backward pass computes again instead of keeping it: `none` (or false), `light` (all but
            matrix products and attention), `selective` (the MLPs' products too), `full` (or true; all of the layers), or
            `auto`: of each layer as little as the GPU's memory allows.
        share_prompts: run the prompt of answers to the same question once; None: on the CPU, and on CUDA where that saves more
            than 15 % of the tokens (half precision without sliding windows only).
        seed: of the order in which sequences are dealt to minibatches, and of new adapters.
        lora: train adapters instead of the model's own weights; None: train all weights.
        compile: compile the decoder layers with torch.compile, in the first step; None: on CUDA only.

    Attributes:
        model: the Hugging Face model, there after `configure_model`.
        step_statistics: numbers of the last training step over all ranks, by the names in the documentation.
        step_histograms: distributions of the last training step over all ranks.
        operations: floating-point operations of this rank's passes so far, see `Operations`; of the whole model where it is
            cut over ranks.
    """

    def __init__(
        self,
        path: str,
        optimizer: OptimizerConfig = OptimizerConfig(),
        max_tokens_per_mb: int = 30720,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        gradient_checkpointing: bool | Checkpointing = False,
        share_prompts: bool | None = None,
        seed: int = 1,
        lora: LoRAConfig | None = None,
        compile: bool | None = None,
    ) -> None:
        super().__init__()
        if max_tokens_per_mb < 2:
            raise ValueError(f"max_tokens_per_mb={max_tokens_per_mb} must hold at least a prompt and an answer token")
        self.automatic_optimization = False
        self.path, self.dtype_name, self.seed = path, dtype, seed
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.max_tokens_per_mb, self.gradient_checkpointing = max_tokens_per_mb, level_of(gradient_checkpointing)
        self.share_prompts, self.compiles = share_prompts, compile
        self.lora = None if lora is None else as_config(LoRAConfig, lora)
        self.ranks = DataParallel()
        self.sharding: Sharding | None = None
        self.temperature = 1.0
        self.model: Any = None
        self.step_statistics: dict[str, float] = {}
        self.step_histograms: dict[str, Tensor] = {}
        self.operations = 0.0
        self._graphs = 0

    def remember(self, **options: Any) -> None:
        """Saves the constructor's `options` as plain data, so that checkpoints load without executing code."""
        self.save_hyperparameters(as_plain(options), logger=False)

    def check_inputs(self, trainer: Trainer) -> None:
        """Finds what is wrong with the model's folder and the Trainer's options, before anything is started.

        Raises:
            ValueError: names the option, the file and the remedy.
        """
        check_trainer(trainer)
        check_model_folder("model.path", self.path)

    # -- LightningModule

    def configure_model(self) -> None:
        """Loads the model. Idempotent.

        Raises:
            ValueError: the model's attention or output layer cannot be trained packed.
        """
        if self.model is not None:
            return
        self.sharding = self._choose_sharding()
        model, _ = load_packed(self.path, self.dtype_of_weights, sharding=self.sharding)
        if self.lora is not None:
            inject_lora(model, self.lora, seed=self.seed)
        self.model = prepare_training(model, gradient_checkpointing=self.gradient_checkpointing)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The weights of a checkpoint.

        Raises:
            ValueError: they are those of another model.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise ValueError(
                f"the checkpoint is one of another model than {self.path} with lora={self.lora} ({first[0].strip()[:150]} ...): "
                f"go on with the options that it was written with, or leave --ckpt_path out"
            ) from error

    def _choose_sharding(self) -> Sharding | None:
        """As the strategy laid out its ranks; None where every rank holds the whole model."""
        if self.device_mesh is None:
            return None
        check_sharded(has_adapters=self.lora is not None, dtype=self.dtype_name)
        precision, strategy = self.trainer.precision, self.trainer.strategy
        compute = torch.bfloat16 if precision == "bf16-mixed" else None
        sharding = Sharding(self.device_mesh, compute, getattr(strategy, "cpu_offload", False))
        self.ranks = DataParallel(sharding.data_group)
        return sharding

    def trained(self) -> list[tuple[torch.nn.Module, OptimizerConfig]]:
        """What is trained, each with its own optimiser; the language model comes first."""
        return [(self.model, self.optimizer_config)]

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule for everything that is trained, stepped by `training_step`."""
        total = self.trainer.estimated_stepping_batches
        configured = []
        for model, config in self.trained():
            optimizer = config.make_optimizer(model)
            scheduler = config.make_scheduler(optimizer, total if total > 0 else math.inf)
            configured.append({"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}})
        return configured

    def on_fit_start(self) -> None:
        """Refuses what manual optimisation cannot do; on the CPU, keeps memory for the next step; beside a GPU, few threads."""
        check_trainer(self.trainer)
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            limit_cpu_threads()
        self._graphs = compiled_graphs()
        self.speed_up([model for model, _ in self.trained()])

    def speed_up(self, models: Sequence[torch.nn.Module]) -> None:
        """Compiles the layers of `models` where wanted, and decides about the activations of those that are trained."""
        on_gpu = self.device.type == "cuda"
        compiles = on_gpu if self.compiles is None else self.compiles
        for model in models:
            if compiles:
                compile_layers(model)
            if on_gpu and self.gradient_checkpointing == "auto" and any(p.requires_grad for p in model.parameters()):
                spare = activation_bytes(models, self.device)
                levels = plan_levels(model, self.max_tokens_per_mb, spare, compiled=compiles)
                checkpoint_layers(model, levels)
                logger.info("activation checkpointing of %d layers: %s", len(levels), dict(Counter(levels)))

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """Type of the weights under training."""
        return getattr(torch, self.dtype_name)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of matrix products and attention."""
        if self.sharding is not None and self.sharding.compute_dtype is not None:
            return self.sharding.compute_dtype
        autocast = torch.is_autocast_enabled(self.device.type)
        return torch.get_autocast_dtype(self.device.type) if autocast else self.dtype_of_weights

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from rl_lightning.prompts.tokenizer import load_tokenizer

        return load_tokenizer(self.path)

    # -- scoring

    def score(self, micro: MicroBatch, *, with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(M,) log-probabilities of the targets of `micro` at the sampling temperature, and the (M,) entropy if wanted."""
        return score_targets(self.model, micro, temperature=self.temperature, with_entropy=with_entropy)

    def batch_logprobs(self, batch: Batch, sequences: Sequence[int], max_tokens: int | None = None) -> Tensor:
        """(T,) float64 log-probabilities under the present weights, NaN at tokens that are not in the loss or not in `sequences`.

        A collective: all ranks call it with their own sequences.
        """
        return self.by_token(batch, sequences, self.model, lambda micro: self.score(micro)[0], max_tokens)

    @torch.no_grad()
    def by_token(
        self, batch: Batch, sequences: Sequence[int], model: torch.nn.Module, scorer: Scorer, max_tokens: int | None = None
    ) -> Tensor:
        """(T,) float64 of what `scorer` says, NaN at tokens that are not in the loss or not in `sequences`. A collective.

        Args:
            batch: on the CPU.
            sequences: this rank's.
            model: what `scorer` runs, whose operations are counted.
            scorer: see `Scorer`.
            max_tokens: most tokens of one pass; None: as in training.
        """
        values = torch.full(batch.loss_mask.shape, math.nan, dtype=torch.float64)
        micro_batches = self.micro_batches(batch, sequences, max_tokens or self.max_tokens_per_mb)
        scored = []
        for micro in micro_batches:
            scored.append((micro.sources, scorer(micro)))
            self.operations += Operations.of(model).forward(micro)
        for sources, found in scored:  # only now, so that the device need not be waited for in between
            values[sources] = found[: len(sources)].double().cpu()
        return values

    def micro_batches(self, batch: Batch, sequences: Sequence[int], max_tokens: int) -> Iterator[MicroBatch]:
        """`sequences` of `batch` packed; see `deal_micro_batches`. A collective."""
        share = self.share_prompts
        if share is None:
            where: dict[str, Any] = {"device": self.device, "dtype": self.compute_dtype, "config": self.model.config}
            share = shares_prompts(batch, sequences, **where)
        return deal_micro_batches(batch, sequences, max_tokens, share_prompts=share, ranks=self.ranks, device=self.device)

    # -- updating

    def update(
        self,
        micro_batches: Iterator[MicroBatch],
        loss: MicroLoss,
        admit: Callable[[], bool] | None = None,
        *,
        of: int = 0,
    ) -> float | None:
        """One optimiser update from the sum of `loss` over all micro-batches of all ranks. A collective.

        Args:
            micro_batches: the minibatch, as many on every rank.
            loss: see `MicroLoss`.
            admit: asked after the backward passes, with the same answer on every rank; false leaves the weights alone.
            of: which of `trained` is updated.

        Returns:
            The gradient's norm before clipping; None if nothing was updated because there was nothing to learn from or
            `admit` refused. Weights stay as they are as well where the norm is not finite.
        """
        (model, config), optimizer = self.trained()[of], self._optimizers()[of]
        optimizer.zero_grad()
        if not self._accumulate(model, micro_batches, loss) or (admit is not None and not admit()):
            return None
        trained = trained_by(optimizer.optimizer)
        if self.sharding is None:
            self.ranks.sum_gradients(trained)
        else:
            self.sharding.sum_gradients(model)
        norm = clip_gradients(trained, config.gradient_clipping)
        if math.isfinite(norm):
            optimizer.step()
        else:
            logger.warning("the gradient's norm is %s: the weights stay as they are", norm)
        return norm

    def _accumulate(self, model: torch.nn.Module, micro_batches: Iterator[MicroBatch], loss: MicroLoss) -> bool:
        """Backward passes over all micro-batches, gradients left on their rank; whether there was any."""
        is_any = False
        # DDP would share gradients in every backward pass, and wait for those of models that took no part in it
        with getattr(self.trainer.strategy, "block_backward_sync", nullcontext)():
            for micro in micro_batches:
                self.manual_backward(loss(micro))
                self.operations += Operations.of(model).training(micro)  # found out while the GPU is at work
                is_any = True
        return is_any

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers: Any = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def one_counted_step(self) -> AbstractContextManager[None]:
        """Whatever updates happen inside, or none at all, the Trainer counts one global step: the version of the weights."""
        schedulers: Any = self.lr_schedulers()
        return counted_once(self._optimizers(), schedulers if isinstance(schedulers, list) else [schedulers])

    def count_update(self, name: str, norm: float | None, statistics: StepStatistics) -> None:
        """Adds to `statistics` what `update` returned: the gradient's norm as `name`, or that nothing was updated."""
        is_finite = norm is not None and math.isfinite(norm)
        first_rank = self.ranks.index == 0  # every rank knows the same: counted once
        statistics.add_sum("skipped_minibatches", float(first_rank and norm is None))
        statistics.add_sum("nonfinite_gradients", float(first_rank and norm is not None and not is_finite))
        if norm is not None and is_finite:
            statistics.add_mean(name, norm, 1.0)

    def record(self, statistics: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """Publishes the step's statistics: to loggers at the finished step's number, and as attributes for callbacks.

        Not by `self.log`, which takes a millisecond for each number, and on a GPU waits for it.
        """
        graphs, self._graphs = compiled_graphs() - self._graphs, compiled_graphs()
        self.step_statistics, self.step_histograms = {**statistics, "compiled_graphs": float(graphs)}, dict(histograms)
        numbers = {name: torch.tensor(value) for name, value in self.step_statistics.items()}
        trainer: Any = self.trainer  # Any: it sets some of its attributes outside of its class
        trainer.callback_metrics.update(numbers)
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            trainer.logged_metrics.update(numbers)
            for target in trainer.loggers:
                target.log_metrics(dict(self.step_statistics), step=trainer.global_step)
                target.save()

    @property
    def learning_rate(self) -> float:
        """The rate of this step's updates."""
        return float(self._optimizers()[0].param_groups[0]["lr"])
