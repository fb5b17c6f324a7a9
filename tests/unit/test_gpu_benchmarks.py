"""What the GPU benchmarks make of their measurements; the measurements themselves need GPUs."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU), str(GPU.parent)]

import async_vs_sync  # noqa: E402
import gpu_20_steps  # noqa: E402
import gpu_machine  # noqa: E402
import interrupt  # noqa: E402
import learning  # noqa: E402
import rollout_path  # noqa: E402
import shared_prompts  # noqa: E402
import steps_of_log  # noqa: E402
from learning_imitator import Imitator, write_examples, write_model  # noqa: E402
from long_tail import LongTail, RandomPrompts  # noqa: E402

from rl_lightning.prompts.supervised import SupervisedJsonl  # noqa: E402
from rl_lightning.prompts.tokenizer import load_tokenizer  # noqa: E402


@pytest.mark.parametrize(
    "name",
    [
        "async_vs_sync",
        "dynamic_batching",
        "gpu_20_steps",
        "interrupt",
        "learning",
        "rollout_path",
        "shared_prompts",
        "trainer",
        "weight_sync",
    ],
)
def test_a_benchmark_reads_its_command_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--cpu"])
    args = importlib.import_module(name).parse()
    assert args.cpu and args.out.parent == GPU.parents[1] / "docs" / "benchmarks"


def step(number: int, seconds: float, tokens: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "measured": number > 1, "seconds": seconds, "tokens": tokens, "wait_s": seconds / 4, **more}


def test_a_turn_is_summed_up_over_its_measured_steps() -> None:
    steps = [step(1, 100.0, 1), step(2, 1.0, 100, engine_idle_s=0.5), step(3, 3.0, 700, engine_idle_s=0.5)]
    result = async_vs_sync.summary(steps)
    assert (result["n_steps"], result["tokens_per_s"], result["seconds"]) == (2, 200.0, 2.0)
    assert (result["trainer_idle"], result["engine_idle"]) == (0.25, 0.25)
    assert async_vs_sync.summary(steps[:1]) == {}


def test_the_bound_is_the_slower_side_and_not_known_without_both() -> None:
    engine, trainer = {"engine alone": {"tokens_per_s": 9.0}}, {"trainer alone": {"tokens_per_s": 4.0}}
    assert async_vs_sync.bound({**engine, **trainer}) == 4.0
    assert async_vs_sync.bound(engine) is None and async_vs_sync.bound({**engine, "trainer alone": {}}) is None


def test_the_table_compares_with_eta_0_and_with_the_bound() -> None:
    turns = {"engine alone": 10.0, "trainer alone": 4.0, "0": 1.5, "4": 3.0}
    rows = async_vs_sync.table({name: {"tokens_per_s": rate} for name, rate in turns.items()}).splitlines()
    assert rows[-1].startswith("| eta 4 | 3 |") and rows[-1].endswith("| 2.00 | 0.75 |")
    assert rows[2].startswith("| engine alone | 10 |") and rows[2].endswith("| - | - |")
    assert len({row.count("|") for row in rows}) == 1


def test_turns_are_compared_with_the_rival_where_it_was_measured() -> None:
    rates = {"0": 1.5, "4": 3.0, async_vs_sync.RIVAL: 2.0}
    head, _, *rows = async_vs_sync.table({name: {"tokens_per_s": rate} for name, rate in rates.items()}).splitlines()
    assert head.endswith("| x the rival |")
    assert [row.split("|")[-2].strip() for row in rows] == ["0.75", "1.50", "-"]


def test_the_rival_is_two_gpus_of_one_that_does_both() -> None:
    document = {"command": "python ...", "turns": {"0": {"tokens_per_s": 5.0, "seconds": 2.0}, "4": {"tokens_per_s": 6.0}}}
    assert async_vs_sync.rival(document) == {"tokens_per_s": 10.0, "seconds": 2.0, "command": "python ..."}


def test_only_the_workers_own_lines_are_read() -> None:
    lines = ["Seed set to 1\n", '{"turn": "4", "step": 1}\n', '{"other": 1}\n', '{"turn": "4", "took_s": 2.0}\n']
    assert list(async_vs_sync.reports(lines)) == [{"turn": "4", "step": 1}, {"turn": "4", "took_s": 2.0}]


def test_lengths_are_lognormal_and_a_function_of_the_seed() -> None:
    tail = LongTail(median=256, sigma=0.9, longest=2048)
    lengths = np.array([tail.length(seed) for seed in range(4000)])
    assert [tail.length(seed) for seed in range(4000)] == lengths.tolist()
    assert np.median(lengths) == pytest.approx(256, rel=0.1) and lengths.max() == 2048 and lengths.min() >= 1
    assert np.log(lengths[lengths < 2048]).std() == pytest.approx(0.9, rel=0.1)


def test_prompts_are_of_one_length_and_a_function_of_their_number() -> None:
    prompts = RandomPrompts(10)
    assert len(prompts[3].token_ids) == RandomPrompts.max_prompt_len and prompts[3] == RandomPrompts(10)[3] != prompts[4]


def test_rates_of_steps_are_averaged_over_time() -> None:
    steps = [{"time/step": 1.0, "throughput/mfu": 0.2}, {"time/step": 3.0, "throughput/mfu": 0.4}]
    for measured, rate in zip(steps, (100.0, 200.0), strict=True):
        measured["throughput/trained_tokens_per_s"] = rate
    result = gpu_20_steps.means(steps)
    assert result == {"time/step": 2.0, "throughput/mfu": 0.3, "throughput/trained_tokens_per_s": 175.0}
    assert gpu_20_steps.table([{"step": 1.0, **steps[0]}], result).count("\n") == 3


def test_the_curves_table_tells_when_shares_were_reached() -> None:
    validations = [{"seconds": 10.0 * i, "accuracy": share} for i, share in enumerate((0.2, 0.45, 0.55, 0.7))]
    steps = [{"seconds": 15.0 * i, "head_offpolicyness_max": 3.0} for i in (1, 2)]
    row = learning.table({4: {"validations": validations, "steps": steps}, 0: {"validations": [], "steps": []}}).splitlines()[2:]
    assert row == ["| 4 | 2 | 30.0 | 15.00 | 0.200 | 0.700 | 20.0 | - | 3 |", "| 0 | - | - | - | - | - | - | - | - |"]


def test_the_imitators_accuracy_is_the_probability_of_whole_right_answers(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", cpu=True)
    _, path = write_examples(tmp_path / "examples", 4)
    examples = SupervisedJsonl(path)
    examples.setup(load_tokenizer(str(model)))
    module, logged = Imitator(str(model)), dict[str, float]()
    module.configure_model()
    module.log = lambda name, value, **options: logged.update({name: value})  # type: ignore[method-assign]
    module.on_validation_epoch_start()
    module.validation_step(examples.batch([0, 1, 2]), 0)
    module.on_validation_epoch_end()
    expected = []
    for prompt, answer in (examples[i] for i in range(3)):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logprobs = module.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(float(logprobs.gather(1, ids[0, len(prompt) :, None]).sum().exp()))
    assert logged["val_accuracy"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_what_follows_from_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*words: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["async_vs_sync.py", *words])
        return async_vs_sync.parse()

    apart, together = parsed(), parsed("--layout", "colocated")
    assert (apart.engine_gpu, apart.trainer_gpu, apart.transport) == (0, 1, "distributed")
    assert (together.engine_gpu, together.trainer_gpu, together.transport) == (0, 0, "tensor")
    assert parsed("--cpu").engine_gpu is None and parsed("--shape", "1.7b").checkpointing == "full"


def test_sharing_is_compared_on_one_batch_in_turns() -> None:
    args = argparse.Namespace(group_size=4, tokens=1000, micro_tokens=500, warmup=1, steps=2)
    batch = shared_prompts.make_batch("30:20", args, shared_prompts.SHAPES["tiny"])
    assert (batch.n_seqs, set(batch.prompt_lens.tolist()), len(batch.token_ids)) == (20, {30}, 1000)
    plan = shared_prompts.make_plan(args, {"30:20": batch}, "eager")
    assert [step.case for step in plan.steps] == ["30:20 repeated", "30:20 shared"] * 3
    for step in plan.steps:
        step.seconds = 2.0 if step.case.endswith("repeated") else 1.0
    row = shared_prompts.row("tiny", "30:20", batch, plan, "eager")
    assert (row["saved"], row["gain"], row["repeated"]["tokens_per_s"]) == (0.45, 2.0, 490.0)
    late = [{**row, "shape": "0.6b", "shared": {"failure": "out of memory"}}]
    del late[0]["gain"]
    lines = shared_prompts.table([row, *late]).splitlines()
    assert "| 45% | 490 | 980 | 2.00 | 1.82 |" in lines[2] and "| 490 | out of memory |  | 1.82 |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_lists_every_script() -> None:
    scripts = {path.name for path in GPU.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    page = (GPU.parents[1] / "docs" / "gpu_benchmarks.md").read_text()
    assert scripts == set(re.findall(r"`benchmarks/gpu/(\w+\.py)` \|", page))


def test_steps_are_read_out_of_a_main_log() -> None:
    log = """20:37:12 Epoch 1/1 step 1/20 (global step 1) finishes. This step 3.3 s, total 3.3 s, about 7.1 s remaining.
    actor_loss 0           head_offpolicyness 1.312            lr 2e-05
    throughput/trained_tokens_per_s 2.152e+04  throughput/trainer_idle_share 0.2647  time/step 3.316
20:37:12 Generation throughput: 10895.6 tokens/s
20:37:14 Epoch 1/1 step 2/20 (global step 2) finishes. This step 1.6 s, total 4.9 s, about 0.0 s remaining.
    time/step 1.555
"""
    first = {"step": 1.0, "head_offpolicyness": 1.312, "throughput/trained_tokens_per_s": 21520.0, "time/step": 3.316}
    assert steps_of_log.read_log(log) == [first, {"step": 2.0, "time/step": 1.555}]


def test_ways_of_updating_are_compared_with_none_and_with_waiting() -> None:
    period = {"seconds": 10.0, "drain_s": 0.0, "stopped_s": 0.2}
    periods = [{"way": interrupt.NONE, "tokens": 200, **period}, *2 * [{"way": interrupt.KEEP, "tokens": 180, **period}]]
    none, keep = interrupt.summarise(periods)
    assert (none["share"], keep["share"], keep["updates"]) == (1.0, 0.9, 2) and "updates" not in none and "gain" not in keep
    *_, waits = rows = interrupt.summarise([*periods, {"way": interrupt.WAIT, "tokens": 120, **period, "drain_s": 4.0}])
    assert [row["gain"] for row in rows] == pytest.approx([200 / 120, 1.5, 1.0]) and waits["drain_s"] == 4.0


def test_a_turn_that_hangs_costs_none_that_came_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["rollout_path", "--cpu", "--out", str(tmp_path / "out.json")])
    args, turns = rollout_path.parse(), iter(range(100))

    async def answer_all() -> None:
        if next(turns) == 4:
            raise TimeoutError

    @asynccontextmanager
    async def way(*_: Any) -> AsyncIterator[Any]:
        yield answer_all

    async def flush() -> None:
        pass

    monkeypatch.setattr(rollout_path, "WAYS", {"a": way, "b": way, "c": way})
    engine: Any = SimpleNamespace(_client=SimpleNamespace(flush=flush))
    with pytest.raises(TimeoutError):
        asyncio.run(rollout_path.take_turns(args, "model", engine))
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(row["way"], row["turns"], row["share"]) for row in written["rows"]] == [("a", 1, 1.0)]


def test_commands_name_no_folder_of_the_machine() -> None:
    given = ["--out", "/somewhere/out/table.json", "--transport", "disk", "--rival", "docs/x.json", "-1"]
    assert [gpu_machine.without_folder(x) for x in given] == ["--out", "table.json", *given[2:]]
