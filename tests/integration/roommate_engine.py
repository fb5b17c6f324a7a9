"""An engine that shares its memory with a trainer, for integration tests; importable in workers."""

from __future__ import annotations

from pathlib import Path

from rl_lightning.engines.torch import TorchEngine
from rl_lightning.types import Completion, GenerationRequest
from rl_lightning.weights.transport import WeightUpdate


class RoommateEngine(TorchEngine):
    """Cannot generate while it has yielded its memory, and writes down what it is asked."""

    colocated = True

    def __init__(self, diary: str) -> None:
        super().__init__()
        self.diary = Path(diary)
        self.asleep = False

    async def generate(self, request: GenerationRequest) -> Completion:
        assert not self.asleep, "generated without memory"
        return await super().generate(request)

    async def update_weights(self, update: WeightUpdate) -> float:
        self._note(f"update {update.version}")
        self.asleep = False
        return await super().update_weights(update)

    async def yield_memory(self) -> None:
        self._note("yield")
        self.asleep = True

    def _note(self, what: str) -> None:
        with self.diary.open("a") as file:
            file.write(f"{what}\n")
