"""Supervised fine-tuning: loss on answers and their end only, bad data named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_samples import fit, make_trainer, norm_in_float64, padded_logprobs, write_model

from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.sft import SFTModule
from rl_lightning.prompts.sft_datamodule import SFTDataModule, SupervisedLoader
from rl_lightning.prompts.supervised import SupervisedJsonl

EXAMPLES = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters with the end of a sequence as token 1."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate("0123456789+=")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    return write_model(path)


def write_lines(path: Path, lines: list[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def load(path: str, folder: str, **options: Any) -> SupervisedJsonl:
    from rl_lightning.prompts.tokenizer import load_tokenizer

    dataset = SupervisedJsonl(path, **options)
    dataset.setup(load_tokenizer(folder))
    return dataset


def test_loss_is_on_the_answer_and_its_end(tmp_path: Path, folder: str) -> None:
    dataset = load(
        write_lines(tmp_path / "a.jsonl", [{"prompt": "3+4=", "answer": "7"}, {"prompt": "8+9=", "answer": "17<eos>"}]), folder
    )
    batch = dataset.batch([0, 1])
    assert batch.token_ids.tolist() == [5, 12, 6, 13, 9, 1, 10, 12, 11, 13, 3, 9, 1]
    assert torch.nonzero(batch.loss_mask).flatten().tolist() == [4, 5, 10, 11, 12]
    assert batch.cu_seqlens.tolist() == [0, 6, 13] and batch.prompt_lens.tolist() == [4, 4]


def test_training_loss_is_the_mean_over_answer_tokens_however_it_is_cut(tmp_path: Path, folder: str) -> None:
    batch = load(write_lines(tmp_path / "a.jsonl", EXAMPLES), folder).batch(range(25))
    losses = []
    for max_tokens in (1000, 20):
        module = SFTModule(folder, dtype="float64", max_tokens_per_mb=max_tokens)
        module.configure_model()
        norm_in_float64(module.model)
        expected = -padded_logprobs(module.model, batch)[batch.loss_mask].mean().item()
        fit(module, [batch])
        assert module.step_statistics["loss"] == pytest.approx(expected, rel=1e-9)
        losses.append(module.step_statistics["grad_norm"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_gradient_that_is_not_finite_is_counted_and_leaves_the_weights(tmp_path: Path, folder: str) -> None:
    batch = load(write_lines(tmp_path / "a.jsonl", EXAMPLES), folder).batch(range(25))
    module = SFTModule(folder)
    module.configure_model()
    norm = module.model.model.norm.weight
    with torch.no_grad():
        norm.fill_(torch.inf)
    fit(module, [batch])
    assert module.step_statistics["nonfinite_gradients"] == 1 and "grad_norm" not in module.step_statistics
    assert torch.isinf(norm).all()


def test_a_model_learns_and_its_validation_loss_says_so(tmp_path: Path, folder: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", EXAMPLES)
    data = SFTDataModule(path, folder, val_path=path, batch_size=25)
    module = SFTModule(folder, optimizer=OptimizerConfig(lr=1e-2))
    trainer = make_trainer(max_epochs=15)
    first = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    trainer.fit(module, data)
    assert trainer.global_step == 15
    last = trainer.callback_metrics["val_loss"]
    assert last < 0.5 * first
    batch = data.val_set.batch(range(25))  # type: ignore[union-attr]
    assert module._apply_batch_transfer_handler(batch, device=torch.device("meta")) is batch
    assert float(last) == pytest.approx(-float(padded_logprobs(module.model, batch)[batch.loss_mask].mean()), rel=1e-4)


def test_batches_deal_every_example_once_over_ranks_and_epochs_differ(tmp_path: Path, folder: str) -> None:
    dataset = load(write_lines(tmp_path / "a.jsonl", EXAMPLES), folder)
    epochs = []
    for epoch in (0, 1):
        loaders = [SupervisedLoader(dataset, 8, rank, 2, lambda epoch=epoch: epoch) for rank in (0, 1)]  # type: ignore[misc]
        assert len(loaders[0]) == 4
        batches = [list(loader) for loader in loaders]
        seen = [int(i) for pair in zip(*batches, strict=True) for batch in pair for i in batch.group_ids]
        assert sorted(seen) == list(range(25))
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_a_rank_without_an_example_takes_part(tmp_path: Path, folder: str) -> None:
    lines = write_lines(tmp_path / "a.jsonl", EXAMPLES[:1])
    batch = list(SupervisedLoader(load(lines, folder), 4, 1, 2, None))[0]
    module = SFTModule(folder, max_tokens_per_mb=64)
    module.configure_model()
    assert batch.n_seqs == 0 and len(module.batch_logprobs(batch, range(0))) == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "1+1=", "answer": "2"}', "{broken"], r"a.jsonl:2: not valid JSON"),
        ([{"prompt": "1+1="}], r"a.jsonl:1: missing field 'answer'"),
        ([{"prompt": 3, "answer": "2"}], r"a.jsonl:1: field 'prompt' must be a non-empty string"),
        (["[1]"], r"a.jsonl:1: a list where a JSON object was expected"),
        ([], r"a.jsonl holds no line"),
        ([{"prompt": "1" * 90, "answer": "2"}], r"all 1 examples .* longer than max_seq_len=50"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, folder: str, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(write_lines(tmp_path / "a.jsonl", lines), folder, max_seq_len=50)


def test_bad_and_long_lines_are_dropped_and_counted_where_allowed(tmp_path: Path, folder: str) -> None:
    lines = [EXAMPLES[0], "{broken", {"prompt": "1" * 90, "answer": "2"}]
    dataset = load(write_lines(tmp_path / "a.jsonl", lines), folder, max_seq_len=50, allow_bad_lines=True)
    assert len(dataset) == 1 and dataset.counts == {"bad_lines": 1, "too_long": 1}


def test_a_missing_file_is_named(folder: str) -> None:
    with pytest.raises(ValueError, match="no_such.jsonl does not exist"):
        load("no_such.jsonl", folder)


def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    small, wide = (SFTModule(write_model(tmp_path / str(size), intermediate_size=size)) for size in (16, 48))
    for module in (small, wide):
        module.configure_model()
    with pytest.raises(ValueError, match=r"the checkpoint is one of another model than .*/48 .*size mismatch"):
        wide.load_state_dict(small.state_dict())
    assert small.load_state_dict(small.state_dict()).missing_keys == []
