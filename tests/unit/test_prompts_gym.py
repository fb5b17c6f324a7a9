from __future__ import annotations

import pickle

import pytest

from rl_lightning.prompts.gym import GymPrompts
from rl_lightning.rewards.gym import GymReward
from rl_lightning.testing import FakeTokenizer
from rl_lightning.types import Prompt

pytest.importorskip("reasoning_gym")


def ready(*args: object, **kwargs: object) -> GymPrompts:
    prompts = GymPrompts(*args, **kwargs)  # type: ignore[arg-type]
    prompts.setup(FakeTokenizer())  # type: ignore[arg-type]
    return prompts


def test_items_are_pure_and_the_verifier_knows_them() -> None:
    prompts = ready("chain_sum", size=50, seed=3, options={"min_terms": 2, "max_terms": 2})
    again = pickle.loads(pickle.dumps(prompts))
    assert [prompts[i] for i in (7, 0, 49)] == [again[i] for i in (49, 0, 7)][::-1]
    assert len({prompts[i].text for i in range(50)}) > 40
    prompt = prompts[7]
    assert prompt.task == "chain_sum" and prompt.text.endswith("Answer: ")
    answer = prompt.reference["answer"]
    assert GymReward()(prompt, answer) == 1.0 and GymReward()(prompt, "no idea") < 0
    assert GymReward("first_line")(prompt, f" {answer}\nmore") == 1.0
    assert GymReward("tag", right=5, wrong=0)(prompt, f"so <answer>{answer}</answer>") == 5.0
    assert GymReward("tag")(prompt, str(answer)) < 0
    assert GymReward("boxed")(prompt, rf"\boxed{{{answer}}}") == 1.0


def test_another_seed_has_other_items_and_every_example_is_another_one() -> None:
    options = {"min_digits": 4, "max_digits": 5}
    training, validation = (ready("chain_sum", size=60, seed=seed, options=options) for seed in (0, 1))
    assert not {p.text for p in training} & {p.text for p in validation}
    shots = [text for p in ready("chain_sum", size=30, shots=2, options=options) for text in p.text.split("\n\n")[:-1]]
    assert len(set(shots)) == len(shots) == 60


def test_examples_and_chat() -> None:
    prompts = ready("chain_sum", size=5, shots=2)
    assert prompts[0].text.count("Question: ") == 3
    chat = ready("chain_sum", size=5, shots=1, chat=True, system_prompt="Be brief.")[0].text
    assert chat.startswith("<system>Be brief.\n<user>") and chat.count("<assistant>") == 2 and chat.endswith("<assistant>")


def test_prompts_over_the_limit_are_replaced() -> None:
    lengths = [len(p.token_ids) for p in (lambda d: [d[i] for i in range(30)])(ready("chain_sum", size=30))]
    limit = sorted(lengths)[15]
    short = ready("chain_sum", size=30, max_prompt_len=limit)
    assert all(len(short[i].token_ids) <= limit for i in range(30))
    with pytest.raises(ValueError, match="chain_sum.*max_prompt_len=3"):
        ready("chain_sum", max_prompt_len=3)


def test_wrong_settings_are_told_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="no task 'chain_sums'.*chain_sum"):
        ready("chain_sums")
    with pytest.raises(ValueError, match="refuses the options"):
        ready("chain_sum", options={"min_term": 2})
    with pytest.raises(ValueError, match="set shots=0"):
        ready("rush_hour", shots=1)
    with pytest.raises(ValueError, match="chat=true"):
        GymPrompts("chain_sum", system_prompt="hello")
    with pytest.raises(ValueError, match="does not come from GymPrompts"):
        GymReward()(Prompt("q", "t", (1,)), "1")


def test_an_answer_that_the_verifier_cannot_read_is_wrong() -> None:
    prompt = ready("prime_factorization", size=3)[0]
    assert GymReward()(prompt, "[1,2") == -1.0
