"""A server on the trainer's GPU: weights through CUDA IPC, and memory that it lets go of. Skipped where there is no GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.types import GenerationRequest, SamplingParams
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.tensor import TensorTransport
from rl_lightning.weights.transport import WeightTarget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SERVER = {
    "attention_backend": "fa3",
    "cuda_graph_max_bs": 16,
    "mm_feature_transport": "cpu",
    "cuda_graph_backend_prefill": "disabled",
}
UPDATES = 50


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def test_weights_come_through_the_trainers_memory_and_the_server_makes_room(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "model", hidden=256, layers=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    engine, transport = SGLangEngine(server_args=SERVER, colocated=True), TensorTransport("127.0.0.1", bucket_bytes=2**20)

    async def publish(version: int) -> float:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        [update] = transport.stage(version, NamedWeights(model.named_parameters()), [engine.target])
        taken = asyncio.create_task(engine.update_weights(update))
        await asyncio.to_thread(transport.send, 60.0)
        stopped_s = await taken
        transport.release()
        return stopped_s

    async def logprob_difference(version: int) -> float:
        completion = await engine.generate(GenerationRequest("r", (5, 6, 7), SamplingParams(max_new_tokens=64), seed=1))
        assert set(completion.versions.tolist()) == {version}
        ids = torch.tensor([5, 6, 7, *completion.token_ids.tolist()], device="cuda")
        with torch.no_grad():
            expected = model(ids[None]).logits[0, 2:-1].log_softmax(-1).gather(1, ids[3:, None])[:, 0].cpu()
        return float((torch.from_numpy(completion.logprobs) - expected).abs().mean())

    async def scenario() -> dict[str, Any]:
        await engine.start(str(folder))
        try:
            seen: dict[str, Any] = {"stopped_s": await publish(1), "difference": await logprob_difference(1)}
            seen["awake_gib"] = used_gib()
            await engine.yield_memory()
            seen["asleep_gib"] = used_gib()
            await publish(2)
            seen["difference_again"] = await logprob_difference(2)
            seen["again_gib"] = used_gib()
            seen["by_update_gib"] = []
            for version in range(3, 3 + UPDATES):
                await publish(version)
                seen["by_update_gib"].append(used_gib())
            return seen
        finally:
            transport.close()
            await engine.stop()

    seen = asyncio.run(scenario())
    print(seen)
    assert seen["difference"] < 0.05 and seen["difference_again"] < 0.05, "bfloat16 engine against float32 model"
    if engine._yields:
        assert seen["asleep_gib"] < seen["awake_gib"] - 4, "0.4 of a GPU should have been given back"
    assert abs(seen["again_gib"] - seen["awake_gib"]) < 0.5
    early, late = seen["by_update_gib"][: UPDATES // 2], seen["by_update_gib"][UPDATES // 2 :]
    assert max(late) <= max(early), "updates keep memory"


def test_memory_of_a_transfer_that_was_given_up_is_freed() -> None:
    """It is counted who has yet to open it, and nobody ever will."""
    weights, transport = [(name, torch.ones(2**26, device="cuda")) for name in "ab"], TensorTransport("127.0.0.1")
    before, seen = torch.cuda.memory_allocated(), []
    for version in range(3):
        transport.stage(version, NamedWeights(weights), [WeightTarget("x"), WeightTarget("y", ranks=2)])
        with pytest.raises(TimeoutError, match="engines to copy bucket 0"):
            transport.send(0.2)
        transport.release()
        seen.append(torch.cuda.memory_allocated())
    transport.close()
    assert seen == [before] * 3
