from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.rewards.exact import ExactMatchReward, exact_match
from rl_lightning.rewards.extract import first_line, last_boxed, tagged
from rl_lightning.rewards.math import MathReward, explodes, math_score, number
from rl_lightning.rewards.reward import Reward, WeightedReward
from rl_lightning.types import Prompt


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        (r"The answer is $\boxed{\frac{1}{2}}$", r"\boxed{0.5}"),
        ("The answer is 42.", "42"),
        ("42", r"\boxed{42}"),
        (r"\boxed{1,000}", r"\boxed{1000}"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{0.333333}", r"\boxed{1/3}"),
        (r"\boxed{A}", r"\boxed{\text{(A)}}"),
        (r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}"),
        (r"\boxed{50\%}", r"\boxed{0.5}"),
        (r"\boxed{\{1,2\}}", r"\boxed{\{2,1\}}"),
        (r"\boxed{-\frac12}", r"\boxed{-0.5}"),
        (r"\boxed{5\text{ cm}}", r"\boxed{5}"),
        (r"\boxed{x=5}", r"\boxed{5}"),
        (r"\boxed{90^\circ}", r"\boxed{90}"),
        (r"\boxed{18.9}", r"\$18.90"),
        (r"\boxed{5}", r"$\$5$"),
        (r"\boxed{2^{10}3^{5}}", r"\boxed{248832}"),
        (r"first \boxed{1}, no: \boxed{\frac{6}{8}}", r"\boxed{\dfrac{3}{4}}"),
        (r"\boxed{\left( 1, 2 \right)}", r"\boxed{(1,2)}"),
    ],
)
def test_equal(answer: str, solution: str) -> None:
    assert math_score(answer, ["\\boxed{123454321}", solution]) == 1.0


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("", r"\boxed{1}"),
        (r"\boxed{}", r"\boxed{1}"),
        (r"\boxed{1} so \boxed{2}", r"\boxed{1}"),
        (r"\boxed{3}", r"\boxed{1/3}"),
        (r"\boxed{(1,2)}", r"\boxed{(2,1)}"),
        (r"\boxed{\pi}", r"\boxed{3.14159}"),
        (r"\boxed{\frac{1}{0}}", r"\boxed{1}"),
        ("I do not know", r"\boxed{5}"),
        (r"\boxed{\text{", r"\boxed{5}"),
        ("\\boxed{" + "9" * 5000 + "}", r"\boxed{7}"),
    ],
)
def test_not_equal(answer: str, solution: str) -> None:
    assert math_score(answer, [solution]) == 0.0


@pytest.mark.parametrize("monster", ["3^{3^{3^{3}}}", "9^{9^9}", "(9^9)^{9^9}", "99999999!", "2^{99999999}", "10^{10^{10}}"])
def test_numbers_that_no_machine_can_spell_out_are_wrong_at_once(monster: str) -> None:
    began = time.monotonic()
    assert explodes(monster) and math_score(rf"\boxed{{{monster}}}", ["1"]) == 0.0
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("harmless", ["2^{1024}", "2^{2^{10}}", "2^{10}3^{5}7^{2}", "100!", "x^{2^{3}}"])
def test_large_but_ordinary_expressions_are_not_refused(harmless: str) -> None:
    assert not explodes(harmless)


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_numbers_keep_their_value_in_every_spelling(top: int, bottom: int) -> None:
    value = Fraction(top, bottom)
    assert number(f"{top}/{bottom}") == value
    assert number(rf"\frac{{{top}}}{{{bottom}}}") == value
    assert number(rf"-\frac{{{top}}}{{{bottom}}}") == -value
    assert number(f"{top:,}") == top
    assert number(f"{top}.50") == Fraction(f"{top}.5")
    assert math_score(rf"\boxed{{{top}}}", [str(top)]) == 1.0 and math_score(rf"\boxed{{{top}}}", [str(top + 1)]) == 0.0


@given(st.text(alphabet=r"\boxed{}^_123+-/$x ,.!", max_size=40), st.text(alphabet=r"\boxed{}123x", max_size=20))
def test_extraction_never_fails_and_finds_what_was_boxed(noise: str, inside: str) -> None:
    last_boxed(noise)
    explodes(noise)
    if inside.count("{") == inside.count("}") == inside.count("\\") == 0 and inside:
        assert last_boxed(rf"{noise} \boxed{{{inside}}}") == inside


def test_other_threads_can_score_too() -> None:
    seen: list[float] = []
    thread = threading.Thread(target=lambda: seen.append(math_score(r"\boxed{\sqrt{8}}", [r"\boxed{2\sqrt{2}}"])))
    thread.start()
    thread.join(30)
    assert seen == [1.0]


def test_math_reward_is_plus_or_minus_one() -> None:
    prompt = Prompt("q", "t", (1,), "math", {"solutions": [r"\boxed{2}"]})
    reward = MathReward()
    assert isinstance(reward, Reward) and WeightedReward(reward).name == "MathReward"
    assert (reward(prompt, r"\boxed{2}"), reward(prompt, r"\boxed{3}"), reward(prompt, "it is 2")) == (1.0, -1.0, 1.0)
    assert MathReward(require_boxed=True)(prompt, "it is 2") == -1.0
    with pytest.raises(ValueError, match="no 'solutions'"):
        reward(Prompt("q", "t", (1,)), "2")


def test_exact_match() -> None:
    prompt = Prompt("q", "t", (1,), "math", {"answer": "12"})
    assert (exact_match(prompt, " 12\n"), exact_match(prompt, "12\n3+4=7")) == (1.0, -1.0)
    lenient = ExactMatchReward(right=2.0, wrong=0.0, first_line=True)
    assert (lenient(prompt, "\n12 \n3+4=7"), lenient(prompt, "1"), lenient(prompt, "")) == (2.0, 0.0, 0.0)
    either = Prompt("q", "t", (1,), "math", {"solutions": ["yes", "Yes."]})
    assert exact_match(either, "Yes.") == 1.0 and ExactMatchReward(ignore_case=True)(either, "YES") == 1.0
    with pytest.raises(ValueError, match="neither 'answer' nor 'solutions'"):
        exact_match(Prompt("q7", "t", (1,)), "2")


def test_extraction() -> None:
    assert last_boxed(r"\boxed{\frac{1}{2}} and \boxed{a\}b} \boxed{open") == r"a\}b"
    assert last_boxed(r"so $\boxed 7$") == "7" and last_boxed("none") is None
    assert tagged("<answer>a</answer><answer> b\n</answer>") == "b" and tagged("a") is None
    assert first_line("\n  x \ny") == "x" and first_line(" ") == ""
    assert last_boxed(r"\boxed{a \boxed$ b}") == r"a \boxed$ b" and last_boxed(r"\boxed{1} \boxed{\boxed{2") == "1"


@pytest.mark.parametrize("opened", [r"\boxed{", "<answer>", r"\boxed{<answer>"])
def test_an_answer_that_opens_without_end_is_read_in_no_time(opened: str) -> None:
    began = time.process_time()
    assert last_boxed(opened * 10000) is None and tagged(opened * 10000) is None
    assert time.process_time() - began < 1
