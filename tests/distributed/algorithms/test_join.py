"""Join on a joinable that counts: who shadows whom, who is last, what is raised where."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms import Join, Joinable, JoinHook, join
from dtrain.testing.distributed import run_distributed


class Counter(Joinable):
    """Counts the inputs of all ranks; the log says which calls were made here, in which order."""

    def __init__(self, group=None, log=None, name="c"):
        super().__init__()
        self.group, self.name = group, name
        self.total, self.seen = 0, []
        self.log = [] if log is None else log

    def __call__(self):
        votes = Join.notify_join_context(self)
        self.seen.append(None if votes is None else votes.result()[0].tolist())
        self.add(1, "call")

    def add(self, value, what):
        one = torch.tensor([value])
        dist.all_reduce(one, group=self.group)
        self.total += one.item()
        self.log.append(f"{self.name} {what}")

    def join_hook(self, **kwargs):
        return CounterHook(self, kwargs)

    @property
    def join_device(self):
        return torch.device("cpu")

    @property
    def join_process_group(self):
        return self.group


class CounterHook(JoinHook):
    def __init__(self, counter, kwargs):
        self.counter, self.kwargs = counter, kwargs

    def main_hook(self):
        self.counter.add(0, "main")

    def post_hook(self, is_last_joiner):
        self.counter.log.append(f"{self.counter.name} post {is_last_joiner} {self.kwargs}")


def count(inputs, group=None, **options):
    """Rank r has inputs[r]; what it counted, saw and did."""
    counter = Counter(group)
    with Join([counter], **options):
        for _ in range(inputs[dist.get_rank()]):
            counter()
    return counter.total, counter.seen, counter.log


def test_a_rank_that_is_through_makes_the_calls_of_the_others():
    long, short, none = run_distributed(3, count, [3, 1, 0])
    assert long[0] == short[0] == none[0] == 4
    assert long[1] == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert long[2] == ["c call"] * 3 + ["c post True {}"]
    assert short[2] == ["c call", "c main", "c main", "c post False {}"]
    assert none[2] == ["c main"] * 3 + ["c post False {}"]


def test_ranks_that_end_together_are_all_last():
    for total, _, log in run_distributed(2, count, [2, 2]):
        assert (total, log) == (4, ["c call", "c call", "c post True {}"])


@pytest.mark.parametrize("inputs", [[2, 2], [0, 0]])
def test_even_inputs_do_not_throw(inputs):
    for total, _, _ in run_distributed(2, partial(count, inputs, throw_on_early_termination=True)):
        assert total == sum(inputs)


def throw(inputs):
    with pytest.raises(RuntimeError) as caught:
        count(inputs, throw_on_early_termination=True)
    return str(caught.value)


def test_throwing_names_the_ranks_that_ended_on_every_rank():
    words = run_distributed(4, throw, [5, 2, 5, 2])
    active = (
        "Detected at least one rank that exhausted inputs. Throwing across all ranks. "
        "Exhausted: ranks 1, 3"
    )
    assert words[0] == words[2] == active
    assert words[1] == "Rank 1 exhausted all inputs. Still active: ranks 0, 2"


def check_two_joinables():
    log = []
    first, second = Counter(log=log, name="a"), Counter(log=log, name="b")
    with Join([first, second], flavour="x"):
        for _ in range(2 - dist.get_rank()):
            first()
            second()
    assert (first.total, second.total) == (3, 3)
    assert second.seen == [None] * (2 - dist.get_rank())  # only the first votes
    return log


def test_hooks_of_several_joinables_run_in_order():
    _, short = run_distributed(2, check_two_joinables)
    last = [f"{name} post False {{'flavour': 'x'}}" for name in "ab"]
    assert short == ["a call", "b call", "a main", "b main", *last]


def check_outside():
    """After a block, in one that is not enabled, and after one that raised, nobody votes."""
    counter = Counter()
    with Join([counter], enable=False):
        counter()
    with contextlib.suppress(KeyError), Join([counter]):
        counter()
        raise KeyError("of the loop")
    with Join([counter]):
        pass
    counter()
    assert [votes is None for votes in counter.seen] == [True, False, True]


def test_outside_of_a_block_nobody_votes():
    run_distributed(2, check_outside)


def check_refusals():
    everyone, alone = (
        dist.group.WORLD,
        dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )
    with pytest.raises(ValueError, match="requires at least one joinable"):
        Join([])
    with pytest.raises(ValueError, match=r"multiple process groups: Counter has .*, Counter"):
        Join([Counter(everyone), Counter(alone)])
    forgetful = object.__new__(Counter)
    with pytest.raises(AssertionError, match="constructor calls the ``Joinable`` constructor"):
        Join.notify_join_context(forgetful)
    with pytest.raises(TypeError, match="abstract"):
        Joinable()


def test_what_join_refuses():
    run_distributed(2, check_refusals)


def check_skew():
    if dist.get_rank() == 0:
        return count([5, 0])[0]
    with pytest.warns(UserWarning, match="rank 1 has at least 3 fewer inputs than") as seen:
        total = count([5, 0])[0]
    assert len(seen) == 1
    return total


def test_a_large_skew_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(join, "WARN_THRESHOLD", 3)
    assert run_distributed(2, check_skew) == [5, 5]


def check_group():
    """In a sub-group names are global ranks."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    with pytest.raises(RuntimeError) as caught:
        count([0, 1, 2], group, throw_on_early_termination=True)
    return str(caught.value)


def test_ranks_are_named_by_their_global_numbers():
    _, first, second = run_distributed(3, check_group)
    assert first == "Rank 1 exhausted all inputs. Still active: rank 2"
    assert second.endswith("Exhausted: rank 1")
