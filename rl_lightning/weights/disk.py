"""DiskTransport: weights through safetensors files, in memory (/dev/shm) where engines share the trainer's machine."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rl_lightning.owned_folder import OwnedFolder, remove_abandoned
from rl_lightning.weights.buckets import fill_buckets, gathered_to_the_end, plan_buckets
from rl_lightning.weights.cast import in_dtype_of
from rl_lightning.weights.fingerprint import FingerprintTaker
from rl_lightning.weights.source import WeightSource
from rl_lightning.weights.transport import Fingerprint, Refusal, WeightTarget, WeightUpdate, no_refusal

SHARD_BYTES = 2**30
PREFIX = "rl-lightning-weights-"
SHARED_MEMORY = Path("/dev/shm")


class DiskTransport:
    """The trainer's side. `stage` writes a folder, whole or not at all; `send` has nothing left to do.

    A folder holds safetensors files with an index; the newest stays until the next one is written, so that an engine that
    comes late costs no second write.  The payload is `{"path": folder}`.

    Args:
        folder: made if needed; engines on other machines must see it under the same path. By default a new one, in shared
            memory if there is room for two versions, else in the temporary directory.
        shard_bytes: size of one file.
    """

    name = "disk"

    def __init__(self, folder: str | Path | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        self._given = None if folder is None else Path(folder)
        self._folder: Path | None = None
        self._owned: OwnedFolder | None = None
        self._shard_bytes = shard_bytes
        self._newest: tuple[int, Path, Fingerprint] | None = None

    def stage(self, version: int, weights: WeightSource, targets: Sequence[WeightTarget]) -> list[WeightUpdate]:
        """Writes the weights unless this version was the last one written; the same folder for all `targets`."""
        if self._newest is None or self._newest[0] != version:
            self._write(version, in_dtype_of(targets, weights))
        assert self._newest is not None
        _, path, proof = self._newest
        return [WeightUpdate(version, self.name, {"path": str(path)}, proof) for _ in targets]

    def send(self, timeout_s: float, refusal: Refusal = no_refusal) -> None:
        """Nothing: engines read what `stage` wrote."""

    def release(self) -> None:
        """Removes every folder but the newest."""
        if self._folder is not None and self._newest is not None:
            for path in self._folder.glob("version*"):
                if path != self._newest[1]:
                    shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Removes all that was written."""
        if self._folder is None:
            return
        for path in self._folder.glob("version*"):
            shutil.rmtree(path, ignore_errors=True)
        if self._owned is not None:
            self._owned.remove()
        else:
            with contextlib.suppress(OSError):  # not ours alone
                self._folder.rmdir()
        self._folder = self._newest = self._owned = None

    def _write(self, version: int, weights: WeightSource) -> None:
        folder = self._open_folder(sum(spec.nbytes for spec in weights.specs()))
        path, staging = folder / f"version{version}", folder / f"version{version}.part"
        for old in (path, staging):
            shutil.rmtree(old, ignore_errors=True)
        staging.mkdir()
        proof = write_shards(staging, weights, self._shard_bytes)
        staging.rename(path)
        self._newest = (version, path, proof)

    def _open_folder(self, n_bytes: int) -> Path:
        if self._folder is None:
            if self._given is None:
                self._owned = _temporary_folder(n_bytes)
                self._folder = self._owned.path
            else:
                self._given.mkdir(parents=True, exist_ok=True)
                self._folder = self._given
        return self._folder


def write_shards(folder: Path, weights: WeightSource, shard_bytes: int) -> Fingerprint:
    """Safetensors files and their index, as `transformers` and SGLang read them, one file in memory at a time."""
    from safetensors.torch import save_file

    files: dict[str, str] = {}
    specs = weights.specs()
    taker = FingerprintTaker(specs)
    with gathered_to_the_end(fill_buckets(plan_buckets(specs, shard_bytes), weights)) as buckets:
        for i, bucket in enumerate(buckets, start=1):
            file = f"model-{i:05d}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in bucket}, folder / file, metadata={"format": "pt"})
            files.update({name: file for name, _ in bucket})
            taker.look(bucket)
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return taker.fingerprint()


def _temporary_folder(n_bytes: int) -> OwnedFolder:
    """In memory if two versions fit, else on disk."""
    for parent in (SHARED_MEMORY, None):
        remove_abandoned(PREFIX, parent)
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 3 * n_bytes
    return OwnedFolder(PREFIX, SHARED_MEMORY if roomy else None)
