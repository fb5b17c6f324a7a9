"""SGLang on CUDA against the trainer: log-probabilities at equal versions, and weights that are proven to have arrived.

One server for all tests of this file: its start takes a minute, each test seconds.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_lightning.batching.collate import collate
from rl_lightning.batching.micro_batch import make_micro_batch
from rl_lightning.engines.engine import WeightMismatchError
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.types import Completion, GenerationRequest, Prompt, Rollout, RolloutGroup, SamplingParams
from rl_lightning.weights.distributed import DistributedTransport
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.transport_choice import make_transport
from tests.integration.running_engine import VOCABULARY, mixed_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
OPTIONS: dict[str, Any] = {
    "server_args": {
        "mem_fraction_static": 0.2,
        "attention_backend": "fa3",
        "cuda_graph_max_bs": 64,
        "mm_feature_transport": "cpu",
        "cuda_graph_backend_prefill": "disabled",
    }
}
N_ANSWERS, N_TOKENS = 32, 64
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two CUDA devices")


class Served:
    """An engine on an event loop of its own, as in a worker, and the trainer's modules of the versions that it may hold."""

    def __init__(self, root: Path) -> None:
        # of so many characters that answers hardly end by themselves, which they must not before new weights come
        shape: dict[str, Any] = {"characters": VOCABULARY, "hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2}
        self.folders = [write_tiny_model(root / f"seed{seed}", seed=seed, **shape) for seed in range(2)]
        self.modules = [AsyncPPOModule(str(folder)) for folder in self.folders]
        for module in self.modules:
            module.configure_model()
            module.to(DEVICE)
        self.engine, self.version, self.transports = SGLangEngine(**OPTIONS), 0, dict[str, Any]()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run(self.engine.start(str(self.folders[0])), 300)

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
        return self.submit(coroutine).result(timeout_s)

    def ask_later(self, seed: int = 0, n_tokens: int = N_TOKENS) -> list[tuple[Prompt, Any]]:
        """Prompts, and futures of their answers."""
        rng = np.random.default_rng(seed)
        prompts = [Prompt(str(i), "", tuple(rng.integers(3, 48, 20).tolist())) for i in range(N_ANSWERS)]
        params = SamplingParams(max_new_tokens=n_tokens)
        requests = [GenerationRequest(f"{seed}-{p.query_id}", p.token_ids, params, seed=i) for i, p in enumerate(prompts)]
        return [(p, self.submit(self.engine.generate(r))) for p, r in zip(prompts, requests, strict=True)]

    def publish(self, model: int, transport: str, device: str = DEVICE, tamper: bool = False) -> float:
        """Makes the weights of `modules[model]` the next version; seconds that generation stood still."""
        sender = self.transports.setdefault(transport, make_transport(transport))
        weights = NamedWeights((name, p.to(device)) for name, p in self.modules[model].model.named_parameters())
        self.version += 1
        [update] = sender.stage(self.version, weights, [self.engine.target])
        if tamper:
            name, sample = next(iter(update.fingerprint.items()))
            wrong = sample._replace(values=(9.0, *sample.values[1:]))
            update = replace(update, fingerprint={**update.fingerprint, name: wrong})
        taken = self.submit(self.engine.update_weights(update))
        try:
            sender.send(60.0)
            return taken.result(60)
        finally:
            sender.release()

    def differences(self, answers: list[tuple[Prompt, Completion]], by_version: dict[int, int]) -> torch.Tensor:
        """abs(engine - trainer) of every token, the trainer's by the module that `by_version` names for the token's version."""
        groups = [
            RolloutGroup(i, prompt, (Rollout(c, "", 0.0, {}, np.ones(len(c), dtype=bool)),))
            for i, (prompt, c) in enumerate(answers)
        ]
        batch = collate(groups)
        micro = make_micro_batch(batch, range(batch.n_seqs), share_prompts=False, device=DEVICE)
        ours = torch.full(batch.loss_mask.shape, torch.nan)
        for version, model in by_version.items():
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                said, _ = self.modules[model].score(micro)
            said = torch.full(ours.shape, torch.nan).index_put((micro.sources.cpu(),), said.float().cpu())
            ours = torch.where(batch.versions == version, said, ours)
        return (ours - batch.behav_logprobs)[batch.loss_mask].abs()

    def close(self) -> None:
        self.run(self.engine.stop())
        for transport in self.transports.values():
            transport.close()
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    started = Served(tmp_path_factory.mktemp("models"))
    yield started
    started.close()


def answers_of(asked: list[tuple[Prompt, Any]]) -> list[tuple[Prompt, Completion]]:
    return [(prompt, future.result(120)) for prompt, future in asked]


def test_the_engine_says_what_the_trainer_says(served: Served) -> None:
    served.publish(0, "disk")
    differences = served.differences(answers_of(served.ask_later()), {served.version: 0})
    assert differences.mean() < 0.05 and differences.max() < 0.5, (differences.mean(), differences.max())


@pytest.mark.parametrize("transport", ["disk", "tensor", pytest.param("distributed", marks=two_gpus)])
def test_weights_arrive_while_answers_are_generated(served: Served, transport: str) -> None:
    device = "cuda:1" if transport == "distributed" else DEVICE
    served.publish(0, transport, device)
    before = served.version
    asked = served.ask_later(seed=1, n_tokens=600)
    stopped_s = served.publish(1, transport, device)
    answers = answers_of(asked)
    seen = {int(v) for _, completion in answers for v in completion.versions}
    assert before + 1 in seen, "the answers were over before the new weights came"
    differences = served.differences(answers, {before: 0, before + 1: 1})
    assert differences.isfinite().all() and differences.mean() < 0.05, differences.mean()
    wrong = served.differences(answers, {before: 1, before + 1: 0})
    assert wrong.mean() > 10 * differences.mean(), "the two models are too alike to tell by their log-probabilities"
    assert stopped_s < 10


@two_gpus
def test_an_engine_that_joins_and_does_not_receive_is_given_up_in_time(served: Served) -> None:
    """NCCL connects in a group's first broadcast, and has no deadline there."""
    sender, over = DistributedTransport(), asyncio.Event()
    weights = NamedWeights((name, p.to("cuda:1")) for name, p in served.modules[0].model.named_parameters())
    [update] = sender.stage(served.version + 1, weights, [served.engine.target])

    async def join() -> None:
        assert served.engine._receiver is not None
        async with served.engine._receiver.prepared(update):
            await over.wait()

    joined, started = served.submit(join()), time.monotonic()
    try:
        with pytest.raises(TimeoutError, match="a broadcast of"):
            sender.send(10.0)
    finally:
        served.loop.call_soon_threadsafe(over.set)
        sender.close()
    assert time.monotonic() - started < 30
    joined.result(60)
    served.publish(1, "distributed", "cuda:1")  # and the next group is formed and used
    differences = served.differences(answers_of(served.ask_later(seed=5)), {served.version: 1})
    assert differences.mean() < 0.05


def test_answers_go_on_with_the_keys_they_have(served: Served) -> None:
    """Their versions change at the very token: one earlier or later is much farther from what the mixture says."""
    from transformers import AutoModelForCausalLM

    served.publish(0, "disk")
    before = served.version
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in served.folders]
    by_version = {before + i: model for i, model in enumerate(models)}
    served.engine.keep_cache = True
    try:
        asked = served.ask_later(seed=3, n_tokens=900)
        answers_of(served.ask_later(seed=4, n_tokens=30))
        served.publish(1, "disk")
        answers = answers_of(asked)
    finally:
        served.engine.keep_cache = False
    errors: dict[int, list[float]] = {-1: [], 0: [], 1: []}
    for prompt, completion in answers:
        at = int((completion.versions == before).sum())
        if 1 < at < len(completion) - 1:
            for shift, found in errors.items():
                versions = np.where(np.arange(len(completion)) < at + shift, before, before + 1)
                said = mixed_logprobs(by_version, replace(completion, versions=versions), prompt.token_ids)
                found += np.abs(said - completion.logprobs)[at - 1 : at + 1].tolist()
    means = {shift: np.mean(found) for shift, found in errors.items()}
    assert len(errors[0]) >= N_ANSWERS and means[0] < 0.05, means  # two tokens each, of half of the answers
    assert min(means[-1], means[1]) > 5 * means[0], means


def test_weights_that_differ_are_refused(served: Served) -> None:
    with pytest.raises(WeightMismatchError, match=f"version {served.version + 1}"):
        served.publish(0, "disk", tamper=True)
    served.publish(1, "disk")  # and the engine goes on with what is proven
    differences = served.differences(answers_of(served.ask_later(seed=2)), {served.version: 1})
    assert differences.mean() < 0.05
