"""The Optimizer base class: groups, errors, state_dict, hooks."""

from __future__ import annotations

import copy

import pytest

import dtrain as torch
from dtrain.optim import SGD, Adam, AdamW, Optimizer
from dtrain.optim.optimizer import required


def leaf(*values):
    return torch.tensor(values or (1.0, 2.0), requires_grad=True)


def with_grad(*values):
    param = leaf(*values)
    param.grad = torch.ones_like(param)
    return param


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: SGD([]), ValueError, "optimizer got an empty parameter list"),
        (lambda: SGD(leaf()), TypeError, "should be an iterable of Tensors or dicts"),
        (lambda: SGD([1.0]), TypeError, "can only optimize Tensors, but one of the params is fl"),
        (lambda: SGD([leaf() * 2]), ValueError, "can't optimize a non-leaf Tensor"),
        (lambda: SGD([{"params": {leaf()}}]), TypeError, "organized in ordered collections"),
        (lambda: SGD([leaf()], lr=-1), ValueError, "Invalid learning rate: -1"),
        (lambda: SGD([leaf()], lr=float("nan")), ValueError, "Invalid learning rate: nan"),
        (lambda: SGD([leaf()], lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
        (lambda: SGD([leaf()], momentum=-1), ValueError, "Invalid momentum value: -1"),
        (lambda: SGD([leaf()], weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
        (lambda: SGD([leaf()], nesterov=True), ValueError, "Nesterov momentum requires a mom"),
        (lambda: Adam([leaf()], eps=-1), ValueError, "Invalid epsilon value: -1"),
        (lambda: Adam([leaf()], betas=(1, 0.9)), ValueError, "beta parameter at index 0: 1"),
        (lambda: Adam([leaf()], betas=(0.9, -1)), ValueError, "beta parameter at index 1: -1"),
        (lambda: Adam([leaf()], capturable=True), RuntimeError, "capturable=True is not supp"),
        (lambda: Adam([leaf()], differentiable=True), RuntimeError, "differentiable=True is not"),
        (lambda: Adam([leaf()], fused=True, foreach=True), RuntimeError, "cannot be `True` tog"),
        (lambda: Optimizer([leaf()], {"lr": required}), ValueError, "required optimization par"),
        (lambda: SGD([("a", leaf()), leaf()]), ValueError, "Some param names are missing"),
    ],
)
def test_what_is_refused(build, error, sentence):
    with pytest.raises(error, match=sentence):
        build()


def test_a_parameter_belongs_to_one_group():
    a, b = leaf(), leaf()
    optimizer = SGD([a], lr=0.1)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": [b, a]})
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer.add_param_group({"params": [b, b]})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([b])
    with pytest.raises(ValueError, match="cannot add param group with names"):
        optimizer.add_param_group({"params": [("c", leaf())]})


def test_groups_have_their_own_options():
    a, b = with_grad(1.0), with_grad(1.0)
    optimizer = SGD([{"params": a, "lr": 0.5}, {"params": [b]}], lr=0.25)
    optimizer.step()
    assert (a.item(), b.item()) == (0.5, 0.75)
    optimizer.param_groups[1]["lr"] = 0.5
    optimizer.step()
    assert (a.item(), b.item()) == (0.0, 0.25)


def test_options_that_change_nothing_and_tensor_options():
    results = []
    for options in ({}, {"foreach": True}, {"fused": True}, {"foreach": False}):
        param = with_grad()
        AdamW([param], lr=0.1, **options).step()
        results.append(param.tolist())
    param = with_grad()
    AdamW([param], torch.tensor(0.1, dtype=torch.float64), (torch.tensor(0.9), 0.999)).step()
    assert results.count(results[0]) == 4
    assert param.tolist() == pytest.approx(results[0], rel=1e-6)


def test_zero_grad():
    param = with_grad()
    held = param.grad
    optimizer = SGD([param, leaf()])
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is held
    assert held.tolist() == [0, 0]
    optimizer.zero_grad()
    assert param.grad is None


def test_zeros_reach_what_a_gradient_is_a_view_of_and_its_graph_is_left():
    buffer, param = torch.ones(5), leaf()
    param.grad = buffer[1:3]
    optimizer = SGD([param])
    optimizer.zero_grad(set_to_none=False)
    assert buffer.tolist() == [1, 0, 0, 1, 1]
    param.grad = None
    (param**2).sum().backward(create_graph=True)
    assert param.grad.requires_grad
    optimizer.zero_grad(set_to_none=False)
    assert not param.grad.requires_grad
    assert param.grad.tolist() == [0, 0]


def test_a_gradient_may_be_a_view_of_a_flat_buffer():
    buffer = torch.arange(6, dtype=torch.float32)
    params = [torch.zeros(2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    params[0].grad, params[1].grad = buffer[:2], buffer[2:].view(2, 2)
    SGD(params, lr=1).step()
    assert params[1].tolist() == [[-2, -3], [-4, -5]]
    assert buffer.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_read_only_parameter_is_refused_before_anything_changes():
    array = torch.ones(3).numpy()
    array.setflags(write=False)
    param = torch.from_numpy(array.view()).requires_grad_()
    param.grad = torch.ones(3)
    optimizer = Adam([param])
    with pytest.raises(RuntimeError, match="read-only"):
        optimizer.step()
    assert not optimizer.state


def test_closure_is_run_with_gradients_recorded():
    param = leaf(3.0)
    optimizer = SGD([param], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 9
    assert param.item() == 0


def test_names_are_saved_and_kept():
    optimizer = SGD([("w", leaf()), ("b", leaf())])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["w", "b"]
    optimizer.load_state_dict(SGD([leaf(), leaf()], lr=0.5).state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["w", "b"]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_state_dict_numbers_parameters_over_all_groups():
    params = [with_grad() for _ in range(3)]
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:], "lr": 1.0}])
    params[1].grad = None
    optimizer.step()
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2]]
    assert sorted(saved["state"]) == [0, 2]


def test_loading_what_does_not_fit_changes_nothing():
    optimizer = SGD([leaf(), leaf()], lr=0.5)
    with pytest.raises(ValueError, match="different number of parameter groups: expected 1, got 2"):
        optimizer.load_state_dict(SGD([{"params": leaf()}, {"params": leaf()}]).state_dict())
    with pytest.raises(ValueError, match="group 0 has 2 parameters, the loaded one 1"):
        optimizer.load_state_dict(SGD([leaf()]).state_dict())
    wrong = Adam([with_grad(1.0, 2.0, 3.0)])
    wrong.step()
    right = Adam([leaf()])
    with pytest.raises(ValueError, match=r"exp_avg.*\[3\].*\[2\]"):
        right.load_state_dict(wrong.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not right.state


def test_loaded_state_is_a_copy_in_the_parameters_dtype():
    source = Adam([with_grad()])
    source.step()
    param = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    loaded = Adam([param])
    loaded.load_state_dict(source.state_dict())
    state = loaded.state[param]
    assert state["exp_avg"].dtype is torch.float64
    assert state["step"].dtype is torch.float32
    state["exp_avg"].zero_()
    assert source.state_dict()["state"][0]["exp_avg"].tolist() != [0, 0]


def test_adamw_stays_decoupled_whatever_is_loaded():
    optimizer = AdamW([leaf()])
    optimizer.load_state_dict(Adam([leaf()]).state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def test_hooks_run_in_order_and_can_be_taken_off():
    optimizer, calls = SGD([with_grad()]), []
    for number in (1, 2):
        optimizer.register_step_pre_hook(lambda o, a, k, n=number: calls.append(("pre", n)))
    handle = optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert calls == [("pre", 1), ("pre", 2), "post", ("pre", 1), ("pre", 2)]
    calls.clear()
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("late"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    saved = optimizer.state_dict()
    assert calls == ["first", "late"]
    assert saved["extra"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append(d["extra"]))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o is optimizer))
    optimizer.load_state_dict(saved)
    assert calls == ["first", "late", 1, True]


def test_a_pre_hook_may_replace_the_arguments():
    optimizer = SGD([with_grad()])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((lambda: 7,), {}))
    assert optimizer.step() == 7
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def test_a_subclass_with_its_own_step():
    class Twice(SGD):
        def step(self, closure=None):
            super().step()
            return super().step(closure)

    param, calls = with_grad(1.0), []
    optimizer = Twice([param], lr=0.25)
    optimizer.register_step_post_hook(lambda o, a, k: calls.append(1))
    optimizer.step()
    assert param.item() == 0.5
    assert calls == [1]
    with pytest.raises(NotImplementedError, match="Optimizer does not define step"):
        Optimizer([leaf()], {}).step()


def test_a_copy_has_its_own_parameters_and_no_hooks():
    param, calls = with_grad(1.0), []
    optimizer = SGD([param], lr=0.5, momentum=0.9)
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append(1))
    optimizer.step()
    other = copy.deepcopy(optimizer)
    other.step()
    assert param.item() == 0.5
    assert other.param_groups[0]["params"][0].item() == pytest.approx(0.5 - 0.5 * 1.9)
    assert calls == [1]


def test_repr_lists_the_options():
    text = repr(SGD([leaf()], lr=0.5))
    assert text.startswith("SGD (\nParameter Group 0\n    dampening: 0\n")
    assert "    lr: 0.5\n" in text
