"""The walk through the graph: order, hooks, completeness, depth, threads, errors, memory.

What the gradients are is tested against PyTorch in test_programs.py; here is when things happen.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

import dtrain as torch
from dtrain.autograd import Function, backward, grad
from dtrain.autograd.engine import queue_callback


def leaf(*values):
    return torch.tensor(values or (1.0, 2.0), requires_grad=True)


# --- hooks ---------------------------------------------------------------------------------------


def test_a_hook_can_be_removed_also_by_itself():
    x, seen = leaf(), []
    handle = x.register_hook(lambda g: seen.append("first"))

    def once(g):
        seen.append("once")
        own.remove()

    own = x.register_hook(once)
    x.sum().backward()
    handle.remove()
    handle.remove()
    x.sum().backward()
    assert seen == ["first", "once"]
    with x.register_hook(lambda g: seen.append("inside")):
        x.sum().backward()
    x.sum().backward()
    assert seen[2:] == ["inside"]


def test_a_leaf_hook_sees_the_whole_gradient_once():
    """x is used three times: the hook gets 2x + 3, not its parts."""
    x, seen = leaf(1.0, 2.0), []
    x.register_hook(lambda g: seen.append(g.tolist()))
    (x * x + x * 3).sum().backward()
    assert seen == [[5, 7]]


def test_post_accumulate_hooks_run_once_a_pass_when_grad_is_complete():
    x, seen = leaf(1.0, 2.0), []
    x.register_hook(lambda g: seen.append("hook"))
    x.register_post_accumulate_grad_hook(lambda t: seen.append((t is x, t.grad.tolist())))
    (x * x + x).sum().backward()
    assert seen == ["hook", (True, [3, 5])]
    x.sum().backward()
    assert seen[2:] == ["hook", (True, [4, 6])]
    grad(x.sum(), x)
    assert seen[4:] == ["hook"], "grad() accumulates nothing"


def test_a_leaf_whose_other_uses_get_no_gradient_is_complete():
    """The first result of split is used, the branch through detach is not: nobody waits."""
    x, seen = leaf(1.0, 2.0), []
    x.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.tolist()))

    class NoGradient(Function):
        @staticmethod
        def forward(ctx, value):
            return value * 2

        @staticmethod
        def backward(ctx, g):
            return None

    (NoGradient.apply(x * 3) + x).sum().backward()
    assert seen == [[1, 1]]
    (found,) = grad((NoGradient.apply(x * 3) + x).sum(), x)
    assert found.tolist() == [1, 1]


def test_gradients_are_delivered_newest_first():
    x, y, seen = leaf(), leaf(), []
    for tensor, name in ((x, "x"), (y, "y")):
        tensor.register_post_accumulate_grad_hook(lambda t, name=name: seen.append(name))
    first = x * 2
    (first + y * 3).sum().backward()
    assert seen == ["y", "x"]


def test_callbacks_run_at_the_end_in_order():
    x, seen = leaf(), []

    def hook(t):
        queue_callback(lambda: seen.append("one") or queue_callback(lambda: seen.append("three")))
        queue_callback(lambda: seen.append(("two", y.grad is not None)))

    y = leaf()
    x.register_post_accumulate_grad_hook(hook)
    (y * 1 + x * 2).sum().backward()
    assert seen == ["one", ("two", True), "three"]
    with pytest.raises(RuntimeError, match="Final callbacks can only be installed during backward"):
        queue_callback(lambda: None)


def test_hooks_need_a_callable():
    with pytest.raises(TypeError, match="hook must be callable, got int"):
        leaf().register_hook(3)


def test_hooks_of_leaves_nobody_asked_for_do_not_run():
    x, w, seen = leaf(), leaf(), []
    w.register_hook(lambda g: seen.append("w"))
    grad((x * w).sum(), x)
    assert seen == []


def test_rules_do_not_compute_what_nobody_asked_for():
    """grad(y, x) through a product runs no rule for w and leaves w.grad alone."""
    x, w, asked = leaf(), leaf(), []

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return g * b, g * a

    class Watch(Function):
        @staticmethod
        def forward(ctx, a):
            return a * 1

        @staticmethod
        def backward(ctx, g):
            asked.append("w")
            return g

    (found,) = grad(Product.apply(x, Watch.apply(w)).sum(), x)
    assert found.tolist() == w.tolist()
    assert asked == []
    assert w.grad is None


# --- accumulation --------------------------------------------------------------------------------


def test_gradients_are_added_in_place():
    """DDP's buckets and optimizers hold views of `.grad`: its memory must stay the same."""
    x = leaf()
    x.sum().backward()
    memory = x.grad.data_ptr()
    (x * 3).sum().backward()
    assert x.grad.data_ptr() == memory
    assert x.grad.tolist() == [4, 4]
    x.grad = torch.zeros(4)[1:3]
    view = x.grad
    x.sum().backward()
    assert x.grad is view
    assert view.tolist() == [1, 1]


def test_a_gradient_of_ones_own_is_not_shared():
    """The array a user starts from, and one gradient that two leaves get, are copied."""
    x, y, start = leaf(), leaf(), torch.ones(2)
    (x + y).backward(start)
    x.grad.mul_(5)
    assert (start.tolist(), y.grad.tolist()) == ([1, 1], [1, 1])
    z = leaf()
    (z * 1).backward(start, create_graph=True)
    z.grad.data.mul_(5)
    assert start.tolist() == [1, 1]


def test_post_hooks_also_run_for_named_inputs():
    x, w, seen = leaf(), leaf(), []
    for t in (x, w):
        t.register_post_accumulate_grad_hook(seen.append)
    (x * w).sum().backward(inputs=[x])
    assert len(seen) == 1
    assert seen[0] is x


def test_next_functions_lead_to_the_leaves():
    x = leaf()
    y = x * 2
    ((node, place), (nothing, _)) = y.grad_fn.next_functions
    assert (node.variable is x, node.name(), place, nothing) == (True, "AccumulateGrad", 0, None)
    assert (y + 1).grad_fn.next_functions[0][0] is y.grad_fn
    assert y.grad_fn.name() == "MulBackward0"


# --- size, threads, errors, memory ---------------------------------------------------------------


def test_a_hundred_thousand_operations_deep():
    """Nothing recurses: neither the walk nor the freeing of the graph."""
    x = leaf(1.0)
    y = x
    for _ in range(100_000):
        y = y + 1
    y.backward()
    assert x.grad.tolist() == [1]
    del y
    z = x
    for _ in range(100_000):
        z = z * 1
    del z  # a graph that never ran backward


def test_threads_run_backward_of_their_own():
    results = {}

    def work(k):
        x = torch.tensor([float(k)], requires_grad=True)
        seen = []
        x.register_post_accumulate_grad_hook(lambda t: queue_callback(lambda: seen.append(k)))
        with torch.no_grad():
            results[k, "mode"] = torch.is_grad_enabled()
            barrier.wait(10)
        for _ in range(50):
            x.grad = None
            y = x
            for _ in range(20):
                y = y * 1.1
            y.sum().backward()
        results[k] = (round(x.grad.item(), 2), set(seen), torch.is_grad_enabled())

    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert [results[k] for k in range(4)] == [(6.73, {k}, True) for k in range(4)]


def test_an_error_in_backward_leaves_no_state_behind():
    x = leaf()

    def fails(g):
        queue_callback(lambda: seen.append("never"))
        raise KeyError("mine")

    seen = []
    y = x * 2
    y.register_hook(fails)
    with torch.enable_grad(), pytest.raises(KeyError, match="mine"):
        y.sum().backward()
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="Final callbacks"):
        queue_callback(lambda: None)
    x.sum().backward()
    assert x.grad.tolist() == [1, 1]
    assert seen == []


def test_hooks_run_with_the_mode_of_the_pass():
    x, seen = leaf(), []
    x.register_hook(lambda g: seen.append(torch.is_grad_enabled()))
    x.sum().backward()
    x.sum().backward(create_graph=True)
    assert seen == [False, True]


def test_saved_arrays_are_let_go_while_backward_runs():
    """The array that exp saved dies before the hook of what lies below it runs."""
    x, seen = leaf(), []
    middle = x * 1
    y = middle.exp()
    held = weakref.ref(y._data)
    middle.register_hook(lambda g: seen.append(held() is None))
    total = y.sum()
    del y
    total.backward()
    assert seen == [True]


def test_a_retained_graph_is_kept_and_freed_with_its_result():
    x = leaf()
    y = (x * 1).exp()
    held = weakref.ref(y.grad_fn)
    total = y.sum()
    del y
    gc.disable()
    try:
        total.backward(retain_graph=True)
        assert held() is not None
        total.backward()
        del total
        assert held() is None
    finally:
        gc.enable()
    assert x.grad.tolist() == pytest.approx([2 * 2.718282, 2 * 7.389056])


def test_number_of_gradients_must_fit():
    x = leaf()
    with pytest.raises(RuntimeError, match="got 1 tensors and 2 gradients"):
        backward([x.sum()], [None, None])
    with pytest.raises(NotImplementedError, match="needs vmap"):
        grad(x.sum(), x, is_grads_batched=True)


def test_the_gradient_of_a_non_leaf_warns():
    y = leaf() * 2
    with pytest.warns(UserWarning, match="not a leaf Tensor is being accessed"):
        assert y.grad is None
    y.retain_grad()
    assert y.grad is None
