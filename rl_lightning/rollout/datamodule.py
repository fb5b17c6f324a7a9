"""RolloutDataModule: prompts in, off-policy batches out, as a LightningDataModule."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.trainer.states import TrainerFn

from rl_lightning.engines.engine import Engine
from rl_lightning.prompts.dataset import PromptDataset
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.engine_choice import choose_transport, make_engine
from rl_lightning.rollout.fleet_owner import FleetOwner
from rl_lightning.rollout.loader import EvaluationLoader, RolloutLoader
from rl_lightning.rollout.roster import SchedulePolicy
from rl_lightning.rollout.share_wait import Resync, ShareWait
from rl_lightning.rollout.workflow import SingleTurnWorkflow, Workflow
from rl_lightning.types import RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from ray.util.placement_group import PlacementGroup

    from rl_lightning.rollout.fleet import Check, RolloutFleet
    from rl_lightning.strategies.demand import Demand

logger = logging.getLogger(__name__)


class RolloutDataModule(FleetOwner):
    """Feeds the trainer with rollouts that engines generate at the same time, at most `max_head_offpolicyness` old.

    Args:
        prompts: the training prompts.
        rewards: what scores an answer; the raw reward is the weighted sum. At least one.
        model_path: folder or hub name that engines and tokenizer load; linked to the model's by the command line.
        batch_size: prompts per training step over all ranks (AReaL: `train_bs_n_seqs`).
        group_size: answers to each prompt.
        generation: how training answers are sampled.
        engine: an Engine, or `auto`: SGLang where it is installed, else TorchEngine.
        num_engines: rollout workers, each with one engine.
        min_engines: as many must be ready before training starts, the others join when Ray has resources for them: where a
            node is added or comes back. null is all of them.
        cpus_per_engine: Ray CPUs of one worker.
        gpus_per_engine: Ray GPUs of one worker; None is 1 where Ray has GPUs, else 0.
        max_head_offpolicyness: eta, most versions between an answer's first token and its training step; 0 is synchronous.
        max_concurrent_rollouts: most prompts in flight; None is `batch_size`.
        schedule_policy: which engine gets the next prompt.
        shuffle: whether each epoch has its own order.
        seed: of the order and of sampling.
        success_rate_lb: groups with a smaller share of successful answers are not trained on.
        success_rate_ub: groups with a larger one are not either.
        group_filter: a function by import path, `(group) -> bool`: groups for which it is false are not trained on. Called
            on the worker's event loop, so it should be quick; what it raises ends the run.
        max_rejections: groups not trained on in a row after which the run stops and says why.
        workflow: how a prompt becomes answers; single turn by default.
        weight_transport: how weights reach the engines; `auto` is the engine's preferred way.
        sync_timeout_s: longest time for one weight update (AReaL: `flush_request_timeout`).
        batch_timeout_s: longest wait for a batch; above `lease_timeout_s`, so that a prompt whose answers hang can be answered
            by another worker.
        lease_timeout_s: longest time for one prompt's answers.
        start_timeout_s: until all engines are ready.
        worker_timeout_s: silence after which a worker's prompts go to others.
        reward_timeout_s: longest time for one reward call.
        reward_memory_gb: memory limit of one reward process.
        reward_processes: reward processes of each worker.
        validation_prompts: answered by the engines at Lightning's validation intervals.
        validation_group_size: answers to each validation prompt.
        validation_generation: how they are sampled; None is as in training.
        ray_init: arguments of `ray.init`, for a trainer whose strategy does not bring a Ray cluster.

    Raises:
        ValueError: options that contradict each other; the message names both.
    """

    def __init__(
        self,
        prompts: PromptDataset,
        rewards: list[WeightedReward],
        model_path: str,
        batch_size: int = 512,
        group_size: int = 16,
        generation: SamplingParams = SamplingParams(),
        engine: Engine | Literal["auto"] = "auto",
        num_engines: int = 1,
        min_engines: int | None = None,
        cpus_per_engine: float = 1,
        gpus_per_engine: float | None = None,
        max_head_offpolicyness: int = 4,
        max_concurrent_rollouts: int | None = None,
        schedule_policy: SchedulePolicy = "least_token_usage",
        shuffle: bool = True,
        seed: int = 1,
        success_rate_lb: float = 0.0,
        success_rate_ub: float = 1.0,
        group_filter: Callable[[RolloutGroup], bool] | None = None,
        max_rejections: int = 1000,
        workflow: Workflow | None = None,
        weight_transport: Literal["auto", "disk", "object_store", "distributed", "tensor"] = "auto",
        sync_timeout_s: float = 300.0,
        batch_timeout_s: float = 10800.0,
        lease_timeout_s: float = 5400.0,
        start_timeout_s: float = 300.0,
        worker_timeout_s: float = 60.0,
        reward_timeout_s: float = 8.0,
        reward_memory_gb: float = 4.0,
        reward_processes: int = 1,
        validation_prompts: PromptDataset | None = None,
        validation_group_size: int = 1,
        validation_generation: SamplingParams | None = None,
        ray_init: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(ray_init)
        if not rewards:
            raise ValueError(
                "rewards is empty: give at least one, e.g. rewards: [{reward: rl_lightning.rewards.exact.exact_match}]"
            )
        if bare := [reward for reward in rewards if not isinstance(reward, WeightedReward)]:
            raise ValueError(f"rewards holds {bare[0]!r}: write WeightedReward(...) of rl_lightning.rewards.reward around it")
        if min_engines is not None and not 1 <= min_engines <= num_engines:
            raise ValueError(f"min_engines={min_engines} must be between 1 and num_engines={num_engines}, or null for all")
        positive = {"num_engines": num_engines, "reward_processes": reward_processes, "reward_memory_gb": reward_memory_gb}
        for name, value in {**positive, "reward_timeout_s": reward_timeout_s}.items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1 answer per prompt")
        if not 0 <= success_rate_lb <= success_rate_ub <= 1:
            raise ValueError(f"need 0 <= success_rate_lb <= success_rate_ub <= 1, got {success_rate_lb} and {success_rate_ub}")
        in_flight = batch_size if max_concurrent_rollouts is None else max_concurrent_rollouts
        self.gate = StalenessGate(batch_size, max_head_offpolicyness, in_flight)
        self.prompts, self.rewards, self.model_path = prompts, rewards, model_path
        self.batch_size, self.group_size, self.generation = batch_size, group_size, generation
        self.engine: Engine = make_engine() if engine == "auto" else engine
        self.num_engines, self.cpus_per_engine, self.gpus_per_engine = num_engines, cpus_per_engine, gpus_per_engine
        self.min_engines = num_engines if min_engines is None else min_engines
        self.shuffle, self.seed, self.schedule_policy = shuffle, seed, schedule_policy
        self.success_rates = (success_rate_lb, success_rate_ub)
        self.group_filter, self.max_rejections = group_filter, max_rejections
        self.workflow = workflow or SingleTurnWorkflow()
        choose_transport(self.engine, weight_transport)  # refuses one that does not work, before anything starts
        self.weight_transport = weight_transport
        self.sync_timeout_s, self.batch_timeout_s, self.lease_timeout_s = sync_timeout_s, batch_timeout_s, lease_timeout_s
        self.start_timeout_s, self.worker_timeout_s = start_timeout_s, worker_timeout_s
        self.reward_timeout_s, self.reward_memory_gb, self.reward_processes = reward_timeout_s, reward_memory_gb, reward_processes
        self.validation_prompts, self.validation_group_size = validation_prompts, validation_group_size
        self.validation_generation = validation_generation or generation
        self.resync: Resync | None = None
        self._loaded = False
        self._warn_of_bias()

    # -- before anything starts

    def check_inputs(self) -> None:
        """Reads and tokenises all prompts, so that bad data is found before Ray or a GPU is taken. Idempotent.

        Raises:
            ValueError: names the file, the line and the remedy.
        """
        if self._loaded:
            return
        from rl_lightning.prompts.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.model_path)
        for name, dataset in (("training", self.prompts), ("validation", self.validation_prompts)):
            if dataset is None:
                continue
            dataset.setup(tokenizer)
            dropped = {k: v for k, v in getattr(dataset, "counts", {}).items() if v}
            logger.info("%d %s prompts%s", len(dataset), name, f" (dropped: {dropped})" if dropped else "")
        self._warn_of_context()
        self._loaded = True

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of one pass over the prompts, the last one filled up from the next epoch."""
        return math.ceil(len(self.prompts) / self.batch_size)

    @property
    def transport_name(self) -> str:
        """How weights travel; `auto` is decided by the rank that sends them, as the driver's node may have no GPU."""
        return choose_transport(self.engine, self.weight_transport)

    # -- FleetOwner

    def check_run(self, stage: str) -> None:
        """What can be wrong with the data, before an engine starts.

        Raises:
            ValueError: names the options that do not go together, or the file and line.
        """
        if stage != "fit" and self.validation_prompts is None:
            raise ValueError("validation_prompts is null: there is nothing to validate with; name a data set as for prompts")
        self.check_inputs()
        world_size = self._ranks()[1]
        self._check_shares(world_size)
        module: Any = self._trainer.lightning_module
        if stage == "fit" and hasattr(module, "check_data"):
            module.check_data(self, world_size)

    def demand(self) -> Demand:
        """What the engines need that must be there; those of an earlier attempt have theirs, as far as they live."""
        from rl_lightning.strategies.demand import Demand

        each = {"CPU": self.cpus_per_engine, "GPU": self._gpus_per_engine()}
        options = "data.num_engines, min_engines, cpus_per_engine, gpus_per_engine"
        colocated = getattr(self.engine, "colocated", False)
        return Demand("engine", self.min_engines if self.fleet is None else 1, each, options, beside_ranks=colocated)

    def launch(self, check: Check, places: PlacementGroup | None = None) -> RolloutFleet:
        """See `FleetOwner.launch`."""
        from rl_lightning.prompts.source import PromptSource
        from rl_lightning.rewards.pool import RewardPool
        from rl_lightning.rollout.fleet import FleetSettings, RolloutFleet
        from rl_lightning.rollout.worker import WorkerSettings

        settings = FleetSettings(
            self.num_engines, self.min_engines, self.cpus_per_engine, self._gpus_per_engine(), self.start_timeout_s
        )
        room = math.ceil(self.gate.max_concurrent_rollouts / self.min_engines)
        pool = RewardPool(self.rewards, self.reward_processes, self.reward_timeout_s, self.reward_memory_gb)
        return RolloutFleet.launch(
            settings,
            self._controller_settings(),
            WorkerSettings("worker", self.model_path, room, group_filter=self.group_filter, folder=os.getcwd()),
            PromptSource(self.prompts, self.seed, self.shuffle),
            self.validation_prompts,
            self.engine,
            self.workflow,
            pool,
            getattr(self._trainer.strategy, "env_vars", {}),
            check,
            places,
        )

    # -- LightningDataModule

    def train_dataloader(self) -> RolloutLoader:
        """This rank's batches of one epoch.

        Raises:
            ValueError: asked for by a user, before a Trainer has started the engines.
        """
        if self.fleet is None:
            raise ValueError("a RolloutDataModule has no loader of its own: give it whole, trainer.fit(model, datamodule=data)")
        rank, world_size = self._ranks()
        return RolloutLoader(self.fleet, self._step, self.steps_per_epoch, rank, world_size, self._share_wait())

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """This rank's share of the validation prompts, answered; nothing where there are none."""
        if self.validation_prompts is None:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        assert self.fleet is not None
        rank, world_size = self._ranks()
        return EvaluationLoader(self.fleet, self._step, len(self.validation_prompts), rank, world_size, self._share_wait())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """A synchronous trainer has the GPU to itself while it works, as far as an engine on it can make room."""
        synchronous = self._trainer.training and self.gate.max_head_offpolicyness == 0
        if synchronous and getattr(self.engine, "colocated", False):
            self._clear_gpu()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts and which of them are open."""
        if self.fleet is None:
            return {}
        return {"rollouts": self.fleet.call("state_dict", self._step())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on at the saved position; open prompts are answered again first. Validation alone begins at step 0."""
        is_fit = self._trainer.state.fn == TrainerFn.FITTING
        if is_fit and self.fleet is not None and "rollouts" in state_dict and self._trainer.is_global_zero:
            self.fleet.call("load_state_dict", state_dict["rollouts"])
            self.fleet.state = state_dict["rollouts"]

    # -- for callbacks

    def statistics(self) -> dict[str, float]:
        """The controller's counters and gauges, see `RolloutController.statistics`."""
        return self.fleet.call("statistics") if self.fleet is not None else {}

    # -- inside

    def _check_shares(self, world_size: int) -> None:
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size={self.batch_size} prompts cannot be shared by {world_size} trainer ranks (num_workers or devices): "
                f"make one a multiple of the other"
            )
        if self.validation_prompts is not None and len(self.validation_prompts) < world_size:
            raise ValueError(
                f"validation_prompts holds {len(self.validation_prompts)} prompts, too few for {world_size} trainer ranks "
                f"(num_workers or devices): give each rank at least one, or set validation_prompts to null"
            )

    def _controller_settings(self) -> ControllerSettings:
        return ControllerSettings(
            gate=self.gate,
            group_size=self.group_size,
            params=self.generation,
            seed=self.seed,
            n_groups=self._total_groups(),
            success_rate_lb=self.success_rates[0],
            success_rate_ub=self.success_rates[1],
            max_rejections=self.max_rejections,
            lease_timeout_s=self.lease_timeout_s,
            worker_timeout_s=self.worker_timeout_s,
            policy=self.schedule_policy,
            evaluation_group_size=self.validation_group_size,
            evaluation_params=self.validation_generation,
        )

    def _total_groups(self) -> int | None:
        """Groups that the whole run trains on, None if it has no end: no prompt is answered that nobody will train on."""
        trainer, limit = self._trainer, self._trainer.limit_train_batches
        per_epoch = min(self.steps_per_epoch, limit) if isinstance(limit, int) else int(self.steps_per_epoch * (limit or 1.0))
        steps = [trainer.max_steps] if trainer.max_steps > 0 else []
        epochs = [trainer.max_epochs * per_epoch] if trainer.max_epochs is not None and trainer.max_epochs > 0 else []
        return min(steps + epochs) * self.batch_size if steps or epochs else None

    def _gpus_per_engine(self) -> float:
        import ray

        if self.gpus_per_engine is not None:
            return self.gpus_per_engine
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0

    def _clear_gpu(self) -> None:
        import ray

        assert self.fleet is not None
        asked = [handle.yield_memory.remote(self.sync_timeout_s) for _, handle in self.fleet.call("workers")]
        _, late = ray.wait(asked, num_returns=len(asked), timeout=self.sync_timeout_s) if asked else ([], [])
        if late:
            logger.warning("%d engines did not let go of their memory within %.0f s", len(late), self.sync_timeout_s)

    def _ranks(self) -> tuple[int, int]:
        """(rank, world size) of data parallelism."""
        kwargs = getattr(self._trainer.strategy, "distributed_sampler_kwargs", None)
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (self._trainer.global_rank, self._trainer.world_size)

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "the data module is not attached to a Trainer"
        return self.trainer

    def _step(self) -> int:
        return self._trainer.global_step

    def _share_wait(self) -> ShareWait:
        """Where each trainer rank holds a piece of the model, all of them take part in sending it, and wait together."""
        is_in_pieces = getattr(self._trainer.lightning_module, "sharding", None) is not None
        return ShareWait(self.batch_timeout_s, self._resync, self._trainer.strategy.broadcast if is_in_pieces else None)

    def _resync(self, workers: Any) -> None:
        if self.resync is not None:
            self.resync(workers)

    def _warn_of_context(self) -> None:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.model_path).get_text_config()
        except (OSError, ValueError):  # a folder with nothing but a tokenizer; the model's own check names what is missing
            return
        context, longest = getattr(config, "max_position_embeddings", None), getattr(self.prompts, "max_prompt_len", 1)
        wanted = f"generation.max_new_tokens={self.generation.max_new_tokens} after prompts of up to {longest} tokens"
        if context is not None and longest + self.generation.max_new_tokens > context:
            logger.warning("%s is more than the model's context of %d: answers are cut off at its end", wanted, context)

    def _warn_of_bias(self) -> None:
        params = self.generation
        if params.greedy or params.top_p < 1 or params.top_k != -1:
            logger.warning(
                "generation with greedy=%s, top_p=%s, top_k=%s samples from another distribution than the one whose "
                "log-probabilities are trained on: importance weights are biased; top_p=1, top_k=-1 avoid it",
                params.greedy, params.top_p, params.top_k,
            )  # fmt: skip
