"""Hooks of a group: what they are told, when, and what their own errors do."""

from __future__ import annotations

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.errors import GroupAborted
from dtrain.testing.distributed import run_distributed


def watched():
    """The default group and the list that its hooks fill."""
    group, seen = dist.group.WORLD, []
    group.register_pre_hook(1, lambda args: seen.append(args))
    group.register_post_hook(1, lambda args: seen.append(args))
    return group, seen


def check_arguments():
    _, seen = watched()
    x, out = torch.ones(2), torch.zeros(2)
    dist.broadcast(x, 1)
    dist.reduce_scatter(out, [x, x])
    before, after, second, _ = seen
    assert (before.name, before.async_op, before.root, before.op_id) == ("broadcast", False, 1, 0)
    assert before.input_tensors[0] is before.output_tensors[0] is x
    assert after == dist.PostHookArgs("broadcast", 0, None)
    assert (second.name, second.root, second.op_id) == ("reduce_scatter", None, 1)
    assert [t is x for t in second.input_tensors] == [True, True]
    assert second.output_tensors[0] is out


def check_async_and_messages():
    _, seen = watched()
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert seen[0].async_op
    work.wait()
    dist.barrier()  # the group's thread has called the hook before it runs the next call
    assert dist.PostHookArgs("all_reduce", 0, None) in seen
    seen.clear()
    got = torch.zeros(1)
    if dist.get_rank() == 0:
        dist.send(torch.ones(1), 1)
    else:
        dist.recv(got, 0)
        assert seen[0].output_tensors[0] is got
    assert (seen[0].name, seen[0].root) == (("send", 1), ("recv", 0))[dist.get_rank()]


def check_a_pre_hook_stops_the_call():
    group, seen = watched()

    def refuse(args):
        if args.name == "all_reduce":
            raise RuntimeError("injected")

    group.register_pre_hook(2, refuse)
    with pytest.raises(RuntimeError, match="injected"):
        dist.all_reduce(torch.ones(1))
    dist.barrier()  # nothing was sent: the group still works
    group.unregister_pre_hook(2)
    dist.all_reduce(torch.ones(1))
    with pytest.raises(ValueError, match="id 1 is already registered"):
        group.register_post_hook(1, print)
    group.unregister_post_hook(1)
    group.unregister_pre_hook(1)
    count = len(seen)
    dist.barrier()
    assert len(seen) == count


def check_failures_and_aborts():
    group, seen = watched()
    aborted = []
    group.register_abort_hook(7, lambda: aborted.append(True))
    if dist.get_rank() == 0:
        group.abort("enough")
        assert aborted == [True]
    with pytest.raises(GroupAborted):
        dist.all_reduce(torch.ones(1))
    assert isinstance(seen[-1].exception, GroupAborted)
    group.unregister_abort_hook(7)
    group.abort("again")
    assert len(aborted) == (dist.get_rank() == 0)


@pytest.mark.parametrize(
    "check",
    [
        check_arguments,
        check_async_and_messages,
        check_a_pre_hook_stops_the_call,
        check_failures_and_aborts,
    ],
)
def test_hooks(check):
    run_distributed(2, check)
