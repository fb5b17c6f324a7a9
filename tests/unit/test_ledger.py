import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.ledger import RolloutLedger


def make_ledger(batch=2, eta=1, concurrent=100, **kwargs):
    return RolloutLedger(StalenessGate(batch, eta, concurrent), **kwargs)


def submit_all(ledger, worker="w"):
    return [ledger.submit(worker, 0.0).index for _ in range(ledger.capacity())]


def finish(ledger, *indices):
    for index in indices:
        ledger.finish(index, n_tokens=1, content=index)


def taken(ledger):
    batch = ledger.take()
    return None if batch is None else [g.index for g in batch]


def test_synchronous_training_runs_one_batch_at_a_time():
    ledger = make_ledger(batch=2, eta=0)
    assert submit_all(ledger) == [0, 1]
    finish(ledger, 1)
    assert taken(ledger) is None
    finish(ledger, 0)
    assert taken(ledger) == [0, 1] and ledger.capacity() == 0
    ledger.advance(1)
    assert submit_all(ledger) == [2, 3]


def test_a_batch_is_the_oldest_finished_groups():
    ledger = make_ledger(batch=2, eta=2)
    assert submit_all(ledger) == [0, 1, 2, 3, 4, 5]
    finish(ledger, 5, 2, 3)
    assert taken(ledger) == [2, 3]


def test_a_straggler_may_be_overtaken_only_while_it_can_still_meet_its_step():
    ledger = make_ledger(batch=1, eta=1)
    assert submit_all(ledger) == [0, 1]
    finish(ledger, 1)
    assert taken(ledger) == [1]
    ledger.advance(1)
    assert submit_all(ledger) == [2]
    finish(ledger, 2)
    assert taken(ledger) is None, "group 0 is due now: taking 2 would make it 2 versions old"
    finish(ledger, 0)
    assert taken(ledger) == [0]


def test_a_returned_group_is_leased_first_and_rejection_frees_a_place():
    ledger = make_ledger(batch=2, eta=0)
    submit_all(ledger)
    assert ledger.give_back(1) and submit_all(ledger) == [1]
    ledger.reject(0)
    assert submit_all(ledger) == [2]


def test_a_group_that_keeps_failing_is_abandoned_but_not_for_its_workers_deaths():
    ledger = make_ledger(batch=1, eta=0, max_attempts=2)
    for _ in range(5):
        submit_all(ledger)
        assert ledger.give_back(0, counts=False)
    submit_all(ledger)
    assert ledger.give_back(0)
    submit_all(ledger)
    assert not ledger.give_back(0)
    assert ledger.abandoned == 1 and submit_all(ledger) == [1]


def test_a_late_answer_to_an_earlier_lease_is_told_apart():
    ledger = make_ledger(batch=1, eta=0)
    first = ledger.submit("a", 0.0)
    ledger.give_back_all("a")
    second = ledger.submit("a", 0.0)
    assert first.index == second.index
    assert not ledger.holds("a", first.index, first.submission) and ledger.holds("a", second.index, second.submission)


def test_nothing_is_submitted_beyond_the_run():
    ledger = make_ledger(batch=2, eta=4, n_groups=3)
    assert submit_all(ledger) == [0, 1, 2]
    ledger.reject(1)
    assert submit_all(ledger) == [3]


def test_a_resumed_ledger_answers_open_groups_first_and_no_other_twice():
    ledger = make_ledger(batch=2, eta=1)
    submit_all(ledger)
    finish(ledger, 0, 2)
    assert taken(ledger) == [0, 2]
    interrupted = make_ledger(batch=2, eta=1)
    interrupted.load_state_dict(ledger.state_dict(version=0))
    assert submit_all(interrupted) == [0, 1, 2, 3], "the step was not finished: its batch is still open"
    finished = make_ledger(batch=2, eta=1)
    finished.load_state_dict(ledger.state_dict(version=1))
    assert submit_all(finished) == [1, 3, 4, 5] and finished.consumed == 2


def train(ledger, steps):
    """Ages of the oldest group of each step; what may be leased is answered when a step waits for it."""
    ages = []
    for _ in range(steps):
        if (batch := ledger.take()) is None:
            finish(ledger, *submit_all(ledger))
            batch = ledger.take()
        assert batch is not None, f"no batch of step {ledger.version + 1}: {len(ledger.finished)} groups are finished"
        ages.append(ledger.version - min(group.version for group in batch))
        ledger.advance(ledger.version + 1)
    return ages


@pytest.mark.parametrize("eta", [0, 1, 4])
@pytest.mark.parametrize(("before", "now"), [(4, 8), (8, 4)])
def test_a_run_goes_on_with_another_batch_size(before, now, eta):
    first = make_ledger(before, eta)
    train(first, 10)
    resumed = make_ledger(now, eta)
    resumed.load_state_dict(first.state_dict(version=10))
    assert max(train(resumed, 10)) == eta


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_a_run_goes_on_from_a_checkpoint_without_rollouts(eta):
    ledger = make_ledger(4, eta)
    ledger.advance(10)
    assert max(train(ledger, 10)) == eta


@pytest.mark.parametrize("eta", [0, 1])
def test_fewer_prompts_than_the_run_began_with_do_not_end_it_early(eta):
    """Lightning counts the epochs that are left, and 3 of 4 long ones are more steps than 4 short ones."""
    first = make_ledger(2, eta, n_groups=4 * 2 * 10)
    train(first, 30)
    resumed = make_ledger(2, eta, n_groups=4 * 2 * 5)
    resumed.load_state_dict(first.state_dict(version=30))
    assert max(train(resumed, 5)) == eta


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 12), st.integers(0, 10**6))
def test_staleness_never_exceeds_eta_and_every_group_is_trained_once(batch, eta, concurrent, seed):
    """Random finishing orders, deaths, losses, rejections and resumes: the bound holds exactly and waiting always ends."""
    rng, steps = random.Random(seed), 12
    ledger = make_ledger(batch, eta, concurrent, n_groups=steps * batch)
    versions, trained, rejected, held = {}, [], [], []
    while ledger.version < steps:
        for _ in range(ledger.capacity()):
            group = ledger.submit(f"w{rng.randrange(2)}", 0.0)
            versions[group.index] = group.version
        if (got := ledger.take(batch - len(held))) is not None:
            assert all(0 <= ledger.version - versions[g.index] <= eta for g in got)
            lost = [g.index for g in got if rng.random() < 0.05]
            held += [g.index for g in got if g.index not in lost]
            ledger.lose(lost)
            if not lost:
                trained, held = trained + held, []
                ledger.advance(ledger.version + 1)
        elif ledger.running:
            index, fate = rng.choice(list(ledger.running)), rng.random()
            if fate < 0.05:
                ledger.give_back_all("w0")
            elif fate < 0.1:
                rejected.append(index)
                ledger.reject(index)
            else:
                finish(ledger, index)
        else:
            pytest.fail("nothing running and no batch: a hang")
        if rng.random() < 0.05:
            state, ledger = ledger.state_dict(ledger.version), make_ledger(batch, eta, concurrent, n_groups=steps * batch)
            ledger.load_state_dict(state)
            held = []
    assert len(trained) == len(set(trained)) == steps * batch
    assert sorted(trained + rejected) == list(range(len(trained) + len(rejected))), "no prompt lost"
