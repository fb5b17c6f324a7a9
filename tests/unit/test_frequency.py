from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.callbacks.frequency import Frequency


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_ever_due_when_all_are_off():
    frequency = Frequency()
    assert not frequency.enabled
    assert not any(frequency.step(ends_epoch=True) for _ in range(100))


@given(steps=st.integers(1, 7), n=st.integers(1, 50))
def test_steps_are_due_at_multiples(steps: int, n: int):
    frequency = Frequency(steps=steps)
    assert [i for i in range(1, n + 1) if frequency.step()] == list(range(steps, n + 1, steps))


@given(epochs=st.integers(1, 3), steps=st.integers(1, 7), per_epoch=st.integers(1, 5))
def test_each_counter_is_its_own(epochs: int, steps: int, per_epoch: int):
    frequency = Frequency(epochs=epochs, steps=steps)
    due = [i for i in range(1, 31) if frequency.step(ends_epoch=i % per_epoch == 0)]
    assert due == [i for i in range(1, 31) if i % steps == 0 or i % (per_epoch * epochs) == 0]


def test_seconds_count_from_when_they_were_due_last():
    clock = Clock()
    frequency = Frequency(steps=1000, secs=10, clock=clock)
    due = []
    for _ in range(8):
        clock.now += 4
        due.append(frequency.step())
    assert due == [False, False, True, False, False, True, False, False]


def test_start_up_does_not_count():
    clock = Clock()
    frequency = Frequency(secs=10, clock=clock)
    clock.now = 100
    frequency.restart_clock()
    clock.now = 109
    assert not frequency.step()


def test_counting_goes_on_after_a_restart():
    first = Frequency(steps=3)
    first.step(), first.step()
    second = Frequency(steps=3)
    second.load_state_dict(first.state_dict())
    assert second.step()


@pytest.mark.parametrize("name", ["epochs", "steps", "secs"])
def test_zero_is_refused_with_the_way_out(name: str):
    with pytest.raises(ValueError, match=f"{name}=0.*null"):
        Frequency(**{name: 0})
