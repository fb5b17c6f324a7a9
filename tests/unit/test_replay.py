"""What a dump holds comes back as it was, on one rank or on as many as it was written by."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_samples import make_batch, make_groups

from rl_lightning.batching.collate import collate
from rl_lightning.rollout.replay import ReplayDataModule
from rl_lightning.rollout.saved_step import SavedStep, merge
from rl_lightning.types import Batch, Prompt, SamplingParams

PARAMS = SamplingParams(temperature=0.7, stop=("\n",), stop_token_ids=(3,))


def assert_equal(one: Batch, other: Batch) -> None:
    for name in (f.name for f in fields(Batch) if f.name != "groups"):
        a, b = getattr(one, name), getattr(other, name)
        assert (torch.equal(a, b) and a.dtype == b.dtype) if isinstance(a, torch.Tensor) else a == b, name
    assert len(one.groups) == len(other.groups)
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        assert mine.prompt == theirs.prompt and (mine.index, mine.worker, mine.seconds) == (
            theirs.index,
            theirs.worker,
            theirs.seconds,
        )
        for a, b in zip(mine.rollouts, theirs.rollouts, strict=True):
            assert (a.text, a.reward, a.reward_parts, a.reward_failure) == (b.text, b.reward, b.reward_parts, b.reward_failure)
            for x, y in ((a.loss_mask, b.loss_mask), (a.completion.logprobs, b.completion.logprobs)):
                np.testing.assert_array_equal(x, y)
                assert x.dtype == y.dtype
            assert a.completion.finish_reason == b.completion.finish_reason


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_a_step_comes_back_as_it_was_saved(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("step") / "batch.pt"
    saved = SavedStep(replace(make_batch(seed, version=3), wait_s=0.5), 4, 19, PARAMS)
    saved.save(path)
    loaded = SavedStep.load(path)
    assert_equal(loaded.batch, saved.batch)
    assert (loaded.batch_idx, loaded.n_batches, loaded.generation) == (4, 19, PARAMS)


def test_references_that_are_not_plain_data_are_kept_as_text(tmp_path: Path) -> None:
    group = make_groups(n_groups=1)[0]
    group = replace(group, prompt=Prompt("q", "x", (1,), "math", {"solutions": ["4"], "where": Path("a/b")}))
    SavedStep(collate([group]), 0, float("inf")).save(tmp_path / "batch.pt")
    loaded = SavedStep.load(tmp_path / "batch.pt")
    assert loaded.batch.groups[0].prompt.reference == {"solutions": ["4"], "where": "a/b"}
    assert loaded.n_batches == float("inf") and loaded.generation is None


def test_arrays_that_may_not_be_written_are_saved_too(tmp_path: Path) -> None:
    group = make_groups(n_groups=1)[0]
    for rollout in group.rollouts:
        rollout.completion.logprobs.flags.writeable = rollout.loss_mask.flags.writeable = False
    SavedStep(collate([group]), 0, 1).save(tmp_path / "batch.pt")
    assert_equal(SavedStep.load(tmp_path / "batch.pt").batch, collate([group]))


def test_ranks_merge_into_the_batch_that_one_rank_would_have_had() -> None:
    groups = make_groups(n_groups=5)
    assert_equal(merge([collate(groups[:2]), collate(groups[2:])]), collate(groups))


def write_dump(folder: Path, n_ranks: int) -> list[Batch]:
    batches = [make_batch(seed=rank) for rank in range(n_ranks)]
    for rank, batch in enumerate(batches):
        SavedStep(batch, 2, 9, PARAMS).save(folder / f"batch_rank{rank}.pt")
    return batches


def replay(folder: Path, rank: int = 0, world_size: int = 1) -> tuple[ReplayDataModule, Any]:
    data, trainer = ReplayDataModule(str(folder)), SimpleNamespace(global_rank=rank, world_size=world_size, should_stop=False)
    data.trainer = trainer  # type: ignore[assignment]
    data.setup("fit")
    return data, trainer


def test_every_rank_gets_its_own_batch_again_once(tmp_path: Path) -> None:
    batches = write_dump(tmp_path, 2)
    for rank in range(2):
        data, trainer = replay(tmp_path, rank, 2)
        loader = data.train_dataloader()
        assert len(loader) == 9 and data.generation == PARAMS
        (batch,) = loader
        assert_equal(batch, batches[rank])
        assert trainer.should_stop


def test_one_rank_gets_the_sequences_of_all(tmp_path: Path) -> None:
    batches = write_dump(tmp_path, 3)
    data, _ = replay(tmp_path)
    (batch,) = data.train_dataloader()
    assert_equal(batch, merge(batches))


def test_other_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    write_dump(tmp_path, 2)
    with pytest.raises(ValueError, match="3 ranks cannot replay a step that 2 ranks trained: set trainer.devices to 1 or 2"):
        replay(tmp_path, 0, 3)


def test_a_folder_that_is_no_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.path=.* holds no batch_rank0.pt"):
        ReplayDataModule(str(tmp_path)).check_inputs()
