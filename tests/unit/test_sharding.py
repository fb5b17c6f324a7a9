"""Cutting a model into pieces on a mesh of one rank, and reading it block by block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from training_samples import make_batch, write_model

from rl_lightning.batching.micro_batch import make_micro_batch
from rl_lightning.models import sharded_loading
from rl_lightning.models.operations import Operations
from rl_lightning.models.packed_model import load_packed, score_targets
from rl_lightning.models.sharding import Sharding, by_mesh, is_sharded, piece_of, piece_size, whole
from rl_lightning.models.value_model import ValueModel


@pytest.fixture(scope="module")
def sharding() -> Iterator[Sharding]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Sharding(dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_pieces_scores_as_a_whole_one(sharding: Sharding, tmp_path: Path, tied: bool) -> None:
    folder = write_model(tmp_path / "model", "qwen3", tie_word_embeddings=tied)
    micro = make_micro_batch(make_batch(), range(6))
    plain, _ = load_packed(folder, torch.float64)
    pieces, _ = load_packed(folder, torch.float64, sharding=sharding)
    expected, _ = score_targets(plain, micro, temperature=0.7)
    scored, _ = score_targets(pieces, micro, temperature=0.7)
    torch.testing.assert_close(scored, expected, rtol=1e-12, atol=1e-12)
    expected.sum().backward()
    scored.sum().backward()
    weights = dict(pieces.named_parameters())
    assert weights.keys() == dict(plain.named_parameters()).keys()
    assert all(is_sharded(weight) for weight in weights.values())
    assert Operations.of(pieces) == Operations.of(plain)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(whole(weights[name].grad), weight.grad, rtol=1e-9, atol=1e-12)


def test_no_more_than_a_block_is_whole_at_any_time(sharding: Sharding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", "llama", num_hidden_layers=4)
    read: list[str] = []
    plain = sharded_loading.WeightFiles._read
    monkeypatch.setattr(
        sharded_loading.WeightFiles, "_read", lambda self, name, like: read.append(name) or plain(self, name, like)
    )
    whole_parts: list[int] = []

    def watch(self: Sharding, part: Any) -> None:
        whole_parts.append(sum(not p.is_meta and not is_sharded(p) for p in part.parameters()))
        shard(self, part)

    shard = Sharding._shard
    monkeypatch.setattr(Sharding, "_shard", watch)
    load_packed(folder, torch.float32, sharding=sharding)
    assert len(read) == len(set(read)) == len(load_file(Path(folder) / "model.safetensors"))
    assert whole_parts == [9, 9, 9, 9, 2]  # a block's matrices and norms; then embeddings and the last norm


def test_files_of_several_parts_are_read_where_they_lie(sharding: Sharding, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "model", "qwen2")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    (Path(folder) / "model.safetensors").unlink()
    plain.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(Path(folder).glob("*.safetensors"))) > 1
    pieces, _ = load_packed(folder, torch.float32, sharding=sharding)
    for name, weight in plain.named_parameters():
        assert torch.equal(whole(pieces.get_parameter(name)), weight)


def test_files_with_other_names_are_loaded_as_a_whole(sharding: Sharding, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    expected = weights["model.norm.weight"] = torch.rand(32)
    save_file({name.removeprefix("model."): w for name, w in weights.items()}, file, metadata={"format": "pt"})  # a base model's
    pieces, _ = load_packed(folder, torch.float32, sharding=sharding)
    assert is_sharded(pieces.model.norm.weight) and torch.equal(whole(pieces.model.norm.weight), expected)


def test_a_new_critic_starts_at_zero(sharding: Sharding, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen3")
    critic = ValueModel(folder, torch.float32, sharding=sharding)
    assert not whole(critic.model.score.weight).any()
    assert not critic(make_micro_batch(make_batch(), range(4))).any()


def test_pieces_are_cut_as_their_like(sharding: Sharding, tmp_path: Path) -> None:
    model, _ = load_packed(write_model(tmp_path / "model"), torch.float32, sharding=sharding)
    like, new = model.model.norm.weight, torch.arange(32.0)
    piece = piece_of(new, like.detach())
    assert is_sharded(piece) and torch.equal(whole(piece), new) and piece_size(piece) == 32
    assert piece_of(new, new) is new and piece_size(new) == 32
    assert [len(group) for group in by_mesh([like, new, like])] == [2, 1]
