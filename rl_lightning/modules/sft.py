"""SFTModule: supervised fine-tuning on given answers, as a LightningModule."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.checkpointing import Checkpointing
from rl_lightning.models.lora import LoRAConfig
from rl_lightning.modules.language_model import LanguageModule
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.statistics import StepStatistics
from rl_lightning.types import Batch


class SFTModule(LanguageModule):
    """Minimises the negative log-likelihood of answer tokens, their mean over the whole batch of all ranks.

    Args:
        path: folder or hub name of the model.
        optimizer: how weights are updated.
        max_tokens_per_mb: most tokens of one forward and backward pass.
        dtype: type of the weights under training.
        gradient_checkpointing: what the backward pass computes again instead of keeping it: `none` (or false), `light` (all but
            matrix products and attention), `selective` (the MLPs' products too), `full` (or true; all of the layers), or
            `auto`: of each layer as little as the GPU's memory allows.
        lora: train adapters instead of the model's own weights; None: train all weights.
        compile: compile the decoder layers with torch.compile, in the first step; None: on CUDA only.
    """

    def __init__(
        self,
        path: str,
        optimizer: OptimizerConfig = OptimizerConfig(),
        max_tokens_per_mb: int = 30720,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        gradient_checkpointing: bool | Checkpointing = False,
        lora: LoRAConfig | None = None,
        compile: bool | None = None,
    ) -> None:
        speed: dict[str, Any] = {"gradient_checkpointing": gradient_checkpointing, "compile": compile}
        super().__init__(path, optimizer, max_tokens_per_mb, dtype, share_prompts=False, lora=lora, **speed)
        self.remember(
            path=path,
            optimizer=self.optimizer_config,
            max_tokens_per_mb=max_tokens_per_mb,
            dtype=dtype,
            lora=self.lora,
            **speed,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update on one batch."""
        batch = batch.to("cpu")  # from another data module; micro-batches go to the device when their turn comes
        statistics, started, rate = StepStatistics(), time.perf_counter(), self.learning_rate
        n_tokens = batch.loss_mask.sum().double()
        normalizer = max(1.0, float(self.ranks.sum(n_tokens, self.device)))

        def micro_loss(micro: MicroBatch) -> torch.Tensor:
            logprobs, _ = self.score(micro)
            if micro.is_empty:
                return logprobs.sum() * 0.0
            statistics.add_mean("packing_efficiency", micro.layout.n_tokens, self.max_tokens_per_mb)
            statistics.add_sum("loss", -logprobs.detach().double().sum() / normalizer)
            return -logprobs.sum() / normalizer

        with self.one_counted_step():
            norm = self.update(self.micro_batches(batch, range(batch.n_seqs), self.max_tokens_per_mb), micro_loss)
        self.count_update("grad_norm", norm, statistics)
        statistics.add_sum("n_seqs", batch.n_seqs)
        statistics.add_sum("n_tokens", len(batch.token_ids))
        statistics.add_sum("n_valid_tokens", n_tokens)
        statistics.add_values("avg_seq_len", batch.cu_seqlens.diff())
        reduced, histograms = statistics.reduce(self.ranks)
        self.record({**reduced, "lr": rate, "time/update": time.perf_counter() - started}, histograms)
        self.log("train_loss", reduced["loss"], prog_bar=True, logger=False, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        """Nothing is counted yet."""
        self._validated = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch's answer tokens."""
        batch = batch.to("cpu")
        logprobs = self.batch_logprobs(batch, range(batch.n_seqs))[batch.loss_mask]
        self._validated = self._validated + torch.stack([-logprobs.sum(), torch.tensor(float(len(logprobs)))])

    def on_validation_epoch_end(self) -> None:
        """Logs the mean over all answer tokens of all ranks as `val_loss`."""
        total, count = self.ranks.sum(self._validated, self.device).tolist()
        self.log("val_loss", total / max(count, 1.0), prog_bar=True, batch_size=1)
