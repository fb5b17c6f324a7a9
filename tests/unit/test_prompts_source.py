from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.prompts.arithmetic import ArithmeticPrompts
from rl_lightning.prompts.source import PromptSource
from rl_lightning.prompts.tokenizer import encode_texts, load_tokenizer
from rl_lightning.rewards.exact import ExactMatchReward
from rl_lightning.testing import FakePrompts, FakeTokenizer


@given(size=st.integers(1, 40), seed=st.integers(-(2**31), 2**31), epoch=st.integers(0, 1000), shuffle=st.booleans())
def test_every_epoch_holds_every_prompt_once(size: int, seed: int, epoch: int, shuffle: bool) -> None:
    source = PromptSource(FakePrompts(size), seed, shuffle)
    located = [source.locate(epoch * size + offset) for offset in range(size)]
    assert {e for e, _ in located} == {epoch}
    assert sorted(item for _, item in located) == list(range(size))
    assert shuffle or [item for _, item in located] == list(range(size))


@given(indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_a_prompt_depends_on_nothing_but_seed_and_index(indices: list[int], seed: int) -> None:
    first, other = PromptSource(FakePrompts(17), seed), pickle.loads(pickle.dumps(PromptSource(FakePrompts(17), seed)))
    assert [first.prompt(i) for i in indices] == [other.prompt(i) for i in reversed(indices)][::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    source, other = PromptSource(FakePrompts(50), 1), PromptSource(FakePrompts(50), 2)
    orders = {tuple(s.locate(i)[1] for i in range(start, start + 50)) for s in (source, other) for start in (0, 50, 100)}
    assert len(orders) == 6


def test_an_empty_dataset_and_a_negative_index_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        PromptSource(FakePrompts(0))
    with pytest.raises(IndexError):
        PromptSource(FakePrompts(2)).prompt(-1)


@pytest.mark.parametrize(("operator", "digits"), [("+", 1), ("-", 2), ("*", 1)])
def test_arithmetic_prompts_are_right_and_reproducible(operator: str, digits: int) -> None:
    prompts, again = (ArithmeticPrompts(digits, 3, operator, size=20, seed=5) for _ in range(2))  # type: ignore[arg-type]
    for dataset in (prompts, again):
        dataset.setup(FakeTokenizer())  # type: ignore[arg-type]
    for i in range(20):
        prompt = prompts[i]
        assert prompt == again[i] and len(prompt.text.split("\n")) == 4
        *examples, question = prompt.text.split("\n")
        for example in examples:
            left, right = example.split("=")
            assert eval(left) == int(right)
        answer = str(eval(question.removesuffix("=")))
        assert ExactMatchReward(first_line=True)(prompt, f" {answer}\n1+1=2") == 1.0
    other = ArithmeticPrompts(digits, 3, operator, size=20, seed=6)  # type: ignore[arg-type]
    assert [other.question(i) for i in range(20)] != [prompts.question(i) for i in range(20)]
    with pytest.raises(IndexError):
        prompts[20]


def test_arithmetic_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="operator='/'"):
        ArithmeticPrompts(operator="/")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="digits=0"):
        ArithmeticPrompts(digits=0)


def test_beginning_of_sequence_is_added_once_where_the_tokenizer_adds_it() -> None:
    class Llama(FakeTokenizer):
        bos_token_id = 1

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1] * add_special_tokens + [ord(c) for c in text]

        def __call__(self, text: list[str], add_special_tokens: bool = False) -> dict[str, list[list[int]]]:  # type: ignore[override]
            return {"input_ids": [self.encode(t, add_special_tokens) for t in text]}

    assert encode_texts(Llama(), ["a", "\x01b"]) == [[1, 97], [1, 98]]  # type: ignore[arg-type]
    assert encode_texts(FakeTokenizer(), ["a"]) == [[97]]  # type: ignore[arg-type]


def test_a_missing_tokenizer_is_one_sentence(tmp_path: object) -> None:
    with pytest.raises(ValueError, match="no tokenizer could be loaded from model path"):
        load_tokenizer(str(tmp_path))
