"""allocation_mode: everything of the grammar parses, everything else is refused with the place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.strategies.allocation import Layout, check_heads, check_size, check_supported, parse_allocation

SIZES = st.integers(1, 64)
LAYOUTS = st.builds(Layout, SIZES, SIZES, SIZES)


@st.composite
def spelled(draw: st.DrawFn, layout: Layout) -> str:
    tensor = draw(st.sampled_from("mt"))
    terms = [f"d{layout.data}", f"p{layout.pipeline}", f"{tensor}{layout.tensor}"]
    return "".join(draw(st.permutations(terms)))


def test_the_guides_example() -> None:
    allocation = parse_allocation("sglang.d4p1m1+d2p2m1")
    assert allocation.engine == "sglang"
    assert allocation.generation == Layout(data=4, tensor=1, pipeline=1)
    assert allocation.training == Layout(data=2, tensor=1, pipeline=2)
    assert (allocation.generation.size, allocation.training.size, allocation.size) == (4, 4, 8)
    assert dict(allocation.roles) == {"*": allocation.training}


@given(st.data(), LAYOUTS, LAYOUTS, st.sampled_from("+|"), st.booleans())
def test_any_order_of_letters_and_parts(data: st.DataObject, generation: Layout, training: Layout, sign: str, swap: bool) -> None:
    parts = [f"sglang.{data.draw(spelled(generation))}", data.draw(spelled(training))]
    allocation = parse_allocation(sign.join(reversed(parts) if swap else parts))
    assert (allocation.generation, allocation.training) == (generation, training)
    assert allocation.colocated == (sign == "|")
    assert allocation.size == (max if sign == "|" else lambda a, b: a + b)(generation.size, training.size)
    assert parse_allocation(str(allocation)) == allocation


@given(st.data(), LAYOUTS)
def test_training_only(data: st.DataObject, layout: Layout) -> None:
    allocation = parse_allocation(data.draw(spelled(layout)))
    assert (allocation.generation, allocation.engine, allocation.training) == (None, None, layout)
    assert allocation.size == layout.size


def test_roles() -> None:
    allocation = parse_allocation("sglang.d4p1m1+actor_train:d2p1m2,*:d4p1m1")
    assert dict(allocation.roles) == {"actor_train": Layout(2, 2, 1), "*": Layout(4, 1, 1)}
    assert allocation.training == Layout(2, 2, 1)
    assert allocation.size == 8
    assert str(allocation) == "sglang.d4p1m1+actor_train:d2p1m2,*:d4p1m1"
    assert parse_allocation("actor_train:d2p1m1,critic_train:d1p2m1").training == Layout(2, 1, 1)


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("", 1, "lacks d"),
        ("d4", 3, "lacks m"),
        ("d4p1", 5, "lacks m"),
        ("sglang.d4p1m1+", 15, "lacks d"),
        ("sglang.d4p1m1", 1, "no part says how to train"),
        ("sglang.d4p1m1+sglang.d4p1m1", 1, "no part says how to train"),
        ("d4p1m1+d4p1m1", 1, "two parts train"),
        ("d4p1m1x", 7, "'x' is none of d"),
        ("d4p1m1 ", 7, "expected '+'"),
        ("sglang.d4p1m1+d4p1m1+d1p1m1", 21, "nothing may follow"),
        ("sglang.d4p1m1+d4p1m1!", 21, "nothing may follow"),
        ("sglang.d0p1m1+d4p1m1", 8, "positive"),
        ("d4p00m1", 3, "positive"),
        ("d4d2p1m1", 3, "data parallel size is given twice"),
        ("d4p1m1t1", 7, "tensor parallel size is given twice"),
        ("dp1m1", 1, "'d' needs a number"),
        ("sglang-d4p1m1+d4p1m1", 1, "'s' is none of d"),
        ("trt.d4p1m1+d4p1m1", 1, "unknown engine 'trt'"),
        ("D4p1m1", 1, "'D' is none of d"),
        ("d٣p1m1", 1, "'d' needs a number"),
        ("sglang:d4p1m1+d4p1m1", 1, "'sglang' is an engine, not a role"),
        ("a:d1p1m1,a:d1p1m1", 10, "given twice"),
        ("a:d1p1m1,", 10, "expected a role"),
        ("a:d1p1m1,*:d2p1m1", 10, "same GPUs"),
    ],
)
def test_errors_quote_point_and_give_an_example(text: str, position: int, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_allocation(text)
    message = str(caught.value)
    assert problem in message
    assert repr(text) in message
    assert f"position {position}:" in message
    quoted, pointer = message.splitlines()[1:3]
    assert quoted.strip() == text.strip()
    assert pointer.index("^") - 4 == position - 1
    assert "sglang.d4p1m1+d4p1m1" in message


@given(st.text(alphabet="dpmt0123456789sglang.+|,:*_ ", max_size=24))
def test_whatever_parses_is_read_completely(text: str) -> None:
    try:
        allocation = parse_allocation(text)
    except ValueError:
        return
    assert " " not in text
    assert parse_allocation(str(allocation)) == allocation
    assert sum(text.count(letter) for letter in "dpmt") >= 3


def test_the_sum_must_be_the_gpus_asked_for() -> None:
    allocation = parse_allocation("sglang.d4p1m1+d4p1m1")
    check_size(allocation, n_nodes=1, n_gpus_per_node=8)
    check_size(parse_allocation("sglang.d8p1m1|d8p1m1"), n_nodes=2, n_gpus_per_node=4)
    with pytest.raises(ValueError, match=r"generation 4 \+ training 4 = 8 GPUs, but n_nodes=2 x n_gpus_per_node=8 = 16"):
        check_size(allocation, n_nodes=2, n_gpus_per_node=8)


def test_what_cannot_run_yet_is_refused_with_the_way_out() -> None:
    check_supported(parse_allocation("sglang.d4p1m1+d4p1m1"))
    check_supported(parse_allocation("d4p1m1"))
    check_supported(parse_allocation("sglang.d2p2m2+d2p1m4"))
    check_supported(parse_allocation("sglang.d1p1m1|d1p1m1"))
    check_supported(parse_allocation("sglang.d4p1m1|d2p1m2"))
    refused = {
        "sglang.d4p1m1+d2p2m1": "training .* p2; write d4p1m1",
        "sglang.d4p1m1+actor_train:d1p2m2,*:d4p1m1": r"training \(actor_train\) has p2; write d2p1m2",
        "sglang.d2p1m2|d4p1m1": "share GPUs .* write d4p1m1 for generation",
        "sglang.d2p1m1|d4p1m1": "share GPUs .* write d4p1m1 for generation",
        "vllm.d4p1m1+d4p1m1": "no vLLM engine",
    }
    for text, reason in refused.items():
        with pytest.raises(ValueError, match=reason):
            check_supported(parse_allocation(text))


QWEN_1_5B = SimpleNamespace(num_attention_heads=12, num_key_value_heads=2)


@pytest.mark.parametrize("mode", ["sglang.d1p1m4+d2p1m2", "sglang.d1p1m12+d4p1m1", "d2p2m2", "sglang.d2p1m2|actor_train:d2p1m2"])
def test_devices_that_hold_whole_heads_are_accepted(mode: str) -> None:
    check_heads(parse_allocation(mode), QWEN_1_5B)


@pytest.mark.parametrize(
    ("mode", "refusal"),
    [
        ("sglang.d1p1m8+d8p1m1", "generation splits every layer over m8 .* 12 attention heads .*; write m1 or .* m12$"),
        ("sglang.d1p1m3+d3p1m1", "generation splits every layer over m3"),
        ("sglang.d4p1m1+d1p1m4", r"training \(\*\) splits every layer over m4 .* 2 key-value heads; write m1 or m2$"),
        ("actor_train:d1p1m4,*:d4p1m1", r"training \(actor_train\) splits"),
    ],
)
def test_devices_that_would_cut_a_head_are_refused_with_the_sizes_that_fit(mode: str, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal) as caught:
        check_heads(parse_allocation(mode), QWEN_1_5B)
    assert repr(mode) in str(caught.value)


def test_a_model_without_key_value_heads_has_one_for_each_attention_head() -> None:
    for config in (SimpleNamespace(num_attention_heads=12), SimpleNamespace(num_attention_heads=12, num_key_value_heads=None)):
        check_heads(parse_allocation("sglang.d1p1m1+d1p1m12"), config)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 32))
def test_a_size_fits_where_every_device_gets_whole_heads(kv_heads: int, queries: int, tensor: int) -> None:
    """Attention head i reads key-value head i // queries, and devices take the attention heads in turn, equally many each."""
    heads = kv_heads * queries
    each = heads // tensor
    read = [{i // queries for i in range(device * each, (device + 1) * each)} for device in range(tensor)]
    disjoint = heads % tensor == 0 and sum(map(len, read)) == kv_heads
    one_copy = heads % tensor == 0 and max(map(len, read)) == 1
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert fits(f"d1p1m{tensor}", config) == disjoint
    assert fits(f"sglang.d1p1m{tensor}+d1p1m1", config) == (disjoint or one_copy)


def fits(mode: str, config: SimpleNamespace) -> bool:
    try:
        check_heads(parse_allocation(mode), config)
    except ValueError:
        return False
    return True
