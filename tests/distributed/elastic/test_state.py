"""State and run: which commit all ranks go back to, what a new rank is given, what stops them."""

from __future__ import annotations

import os

import pytest

import dtrain as torch
from dtrain import elastic
from dtrain.distributed.elastic.memory import Memory
from dtrain.distributed.elastic.state import newest_common
from dtrain.testing.distributed import run_distributed

dist = torch.distributed


@pytest.fixture
def slots():
    made = [[os.memfd_create("test") for _ in range(2)] for _ in range(3)]
    yield made
    for descriptor in (descriptor for pair in made for descriptor in pair):
        os.close(descriptor)


def make(slots, **options):
    """A state as each rank has it, with the memory that dtrun would give to it."""
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = elastic.State(model=model, optimizer=optimizer, seen=[], **options)
    if slots is not None:
        state._memory = Memory(slots[dist.get_rank()])
    return state


def advance(state):
    """One step; the weights say how many there were."""
    with torch.no_grad():
        state.model.weight += 1.0
    state.seen = [*state.seen, state.step]


def at(state):
    return state.step, state.model.weight[0, 0].item(), state.seen


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([[], []], -1),
        ([[4, 5], [4, 5]], 5),
        ([[5, 6], [4, 5]], 5),  # one was killed before it could commit
        ([[1], [1, 2]], 1),
        ([[], [4, 5]], 5),  # one is new
        ([[2, 3], [8, 9], [9, 10]], 9),  # one was away
        ([[0], [2]], 2),
        ([[7], [8]], -1),  # no step that all have
    ],
)
def test_the_newest_step_that_all_have(numbers, expected):
    assert newest_common(numbers) == expected


def test_all_go_back_to_the_newest_common_commit(slots):
    def train():
        state = make(slots)
        for _ in range(4 + (dist.get_rank() == 1)):  # rank 1 is one ahead
            advance(state)
            state.commit()
        torch.rand(1)

    def again():
        state = make(slots)
        where = state.restore()
        return where, at(state)

    run_distributed(2, train)
    assert run_distributed(2, again) == [("memory", (4, 4.0, [0, 1, 2, 3]))] * 2


def test_each_rank_has_its_own_random_numbers_again(slots):
    def train():
        state = make(slots)
        state.commit()
        return torch.rand(3).tolist()

    def again():
        torch.manual_seed(99)
        make(slots).restore()
        return torch.rand(3).tolist()

    first = run_distributed(2, train)
    assert first[0] != first[1]
    assert run_distributed(2, again) == first


def test_a_new_rank_is_given_the_state_of_one_that_has_it(slots):
    def train():
        state = make(slots)
        advance(state)
        state.commit()

    def again():
        state = make(slots)
        return state.restore(), at(state)

    run_distributed(2, train)
    slots[:] = [slots[2], *slots[:2]]  # rank 0 is the new one
    assert run_distributed(3, again) == [("memory", (1, 1.0, [0]))] * 3


def test_without_memory_the_newest_whole_checkpoint_counts(tmp_path):
    def train():
        state = make(None, folder=tmp_path, every=2, keep=3)
        for _ in range(7):
            advance(state)
            state.commit()

    def again(steps):
        state = make(None, folder=tmp_path)
        return state.restore(), at(state)

    run_distributed(2, train)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4", "step-6"]
    expected = ("disk", (6, 6.0, [0, 1, 2, 3, 4, 5]))
    assert run_distributed(3, again, 6) == [expected] * 3  # for any number of ranks
    damaged = next((tmp_path / "step-6").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="step-6 is damaged"):
        assert run_distributed(2, again, 4) == [("disk", (4, 4.0, [0, 1, 2, 3]))] * 2
    (tmp_path / "step-4" / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="is damaged"):
        assert run_distributed(2, again, 2)[0] == ("disk", (2, 2.0, [0, 1]))


def test_a_checkpoint_that_is_newer_than_the_memory_wins(slots, tmp_path):
    def train():
        state = make(slots, folder=tmp_path, every=1)
        for _ in range(3):
            advance(state)
            state.commit()
            if state.step == 1:
                state._memory = None

    def again():
        state = make(slots, folder=tmp_path)
        return state.restore(), state.step

    run_distributed(1, train)
    assert run_distributed(1, again) == [("disk", 3)]


def test_run_does_the_steps_that_are_left(slots):
    def train(steps):
        state = make(slots)
        for _ in elastic.run(state, steps):
            advance(state)
        return at(state)

    assert run_distributed(2, train, 3) == [(3, 3.0, [0, 1, 2])] * 2
    assert run_distributed(2, train, 5) == [(5, 5.0, [0, 1, 2, 3, 4])] * 2
    assert run_distributed(2, train, 5) == [(5, 5.0, [0, 1, 2, 3, 4])] * 2


def test_all_stop_behind_the_same_step(slots, tmp_path):
    def train():
        state = make(slots, folder=tmp_path)
        steps = elastic.run(state, 100)
        for _ in range(5):
            next(steps)
            advance(state)
        if dist.get_rank() == 1:
            elastic.request_stop()
        with pytest.raises(SystemExit) as stopped:
            next(steps)
        assert stopped.value.code == 0
        return at(state)

    assert run_distributed(3, train) == [(5, 5.0, [0, 1, 2, 3, 4])] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_should_stop_is_the_same_everywhere():
    def ask():
        before = dist.should_stop()
        if dist.get_rank() == 2:
            dist.request_stop()
        return before, dist.should_stop(), dist.should_stop()

    assert run_distributed(3, ask) == [(False, True, True)] * 3


def test_names_of_its_own_are_refused():
    with pytest.raises(ValueError, match="'commit' is a name of State's own"):
        elastic.State(commit=1)
    with pytest.raises(ValueError, match="'step' is a name"):
        elastic.State(step=1)
    with pytest.raises(ValueError, match="every and keep are at least 1"):
        elastic.State(every=0)
