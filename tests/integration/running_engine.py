"""An engine with a tiny random model on an event loop of its own, for integration tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_lightning.engines.engine import Engine
from rl_lightning.models.tiny import CHARACTERS
from rl_lightning.types import Completion, GenerationRequest, SamplingParams
from rl_lightning.weights.disk import DiskTransport
from rl_lightning.weights.distributed import DistributedTransport
from rl_lightning.weights.object_store import ObjectStoreTransport
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.tensor import TensorTransport

VOCABULARY = CHARACTERS + "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
"""So large that a random model almost never samples the end of sequence by itself."""

PROMPT = (5, 6, 7, 8, 9)
TRANSPORTS = {
    "disk": DiskTransport,
    "distributed": DistributedTransport,
    "object_store": ObjectStoreTransport,
    "tensor": TensorTransport,
}


class Running:
    """An engine on an event loop of its own, as in a worker, and the reference models of the versions it was given."""

    def __init__(self, engine: Engine, folders: list[Path]) -> None:
        from transformers import AutoModelForCausalLM

        self.engine, self.folders, self.version = engine, folders, 0
        self.models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
        self.live = {0: self.models[0]}
        self.transports: dict[str, Any] = {}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 120.0) -> Any:
        return self.submit(coroutine).result(timeout_s)

    def ask(self, count: int = 1, prompt: tuple[int, ...] = PROMPT, **params: Any) -> Any:
        """Futures' results of `count` requests at once."""
        return [future.result(120) for future in self.ask_later(count, prompt, **params)]

    def ask_later(self, count: int = 1, prompt: tuple[int, ...] = PROMPT, **params: Any) -> list[Any]:
        sampling = SamplingParams(**params)
        return [self.submit(self.engine.generate(GenerationRequest(f"r{i}", prompt, sampling, seed=i))) for i in range(count)]

    def publish(self, model: int, transport: str | None = None, tamper: bool = False) -> float:
        """Makes the weights of `models[model]` the next version, as the trainer does; seconds of stopped generation."""
        name = transport or self.engine.transports[0]
        sender = self.transports.setdefault(name, TRANSPORTS[name]())
        weights = [(n, p.detach()) for n, p in self.models[model].named_parameters()]
        [update] = sender.stage(self.version + 1, NamedWeights(weights), [self.engine.target])
        if tamper:
            key, sample = next(iter(update.fingerprint.items()))
            update = replace(update, fingerprint={**update.fingerprint, key: sample._replace(values=(9.0, *sample.values[1:]))})
        self.version += 1
        self.live[self.version] = self.models[model]
        taken = self.submit(self.engine.update_weights(update))
        try:
            sender.send(30.0)
            return taken.result(60)
        finally:
            sender.release()

    def logprobs(
        self, version: int, completion: Completion, temperature: float = 1.0, prompt: tuple[int, ...] = PROMPT
    ) -> np.ndarray:
        """What Hugging Face says of each token under the weights of `version`."""
        ids = torch.tensor([*prompt, *completion.token_ids.tolist()])
        with torch.no_grad():
            scaled = self.live[version](ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
        return scaled.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()

    def close(self) -> None:
        self.run(self.engine.stop())
        for transport in self.transports.values():
            transport.close()
        self.loop.call_soon_threadsafe(self.loop.stop)


def mixed_logprobs(models: Mapping[int, Any], completion: Completion, prompt: tuple[int, ...]) -> np.ndarray:
    """What Hugging Face says of each token where a kept cache is met: no position is computed again under later weights.

    Args:
        models: by version.
        completion: whose versions say how far each model comes.
        prompt: before it.
    """
    ids, first = torch.tensor([[*prompt, *completion.token_ids.tolist()]]), len(prompt) - 1
    starts = [0, *(1 + np.flatnonzero(np.diff(completion.versions))).tolist()]
    logits, past = [], None
    for start, end in pairwise([*starts, len(completion)]):
        inputs = ids[:, first + start if start else 0 : first + end]  # a token's weights computed the position before it
        with torch.no_grad():
            out = models[int(completion.versions[start])](inputs, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits[0, start - end :])
    return torch.cat(logits).log_softmax(-1).gather(1, ids[0, first + 1 :, None])[:, 0].numpy()
