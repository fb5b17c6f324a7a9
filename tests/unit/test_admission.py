import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.rollout.admission import StalenessGate


def test_capacity_follows_the_formula():
    gate = StalenessGate(batch_size=4, max_head_offpolicyness=1, max_concurrent_rollouts=6)
    assert gate.capacity(version=0, accepted=0, running=0) == 6
    assert gate.capacity(version=0, accepted=0, running=6) == 0
    assert gate.capacity(version=0, accepted=6, running=0) == 2
    assert gate.capacity(version=0, accepted=8, running=0) == 0
    assert gate.capacity(version=1, accepted=8, running=1) == 3


@given(st.integers(1, 50), st.integers(0, 9), st.integers(1, 99), st.integers(0, 50), st.integers(0, 999), st.integers(0, 99))
def test_capacity_is_never_negative_and_never_breaks_a_bound(batch, eta, concurrent, version, accepted, running):
    gate = StalenessGate(batch, eta, concurrent)
    room = gate.capacity(version=version, accepted=accepted, running=running)
    assert room >= 0
    if room:
        assert accepted + running + room <= (version + eta + 1) * batch
        assert running + room <= concurrent


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_senseless_gates_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        StalenessGate(*wrong)
