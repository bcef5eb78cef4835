"""What nn.Module promises beyond PyTorch's records: errors that help, copies, pickles, dtypes."""

from __future__ import annotations

import copy
import difflib
import inspect
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dtrain
from dtrain import nn
from dtrain.autograd.handle import RemovableHandle
from dtrain.utils import hooks
from tests.recorded import load_json

SIGNATURES = load_json("module_signatures")
DEPRECATED = {"Hardtanh": ("min_value", "max_value")}  # by PyTorch, since 2017: we leave them out
CLASSES = [name for name in nn.modules.__all__ if name not in ("Module", "Sequential")]


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.fc = inner

    def forward(self, x):
        return self.fc(self.norm(x))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_pytorchs_home_and_signature(name):
    kind, recorded = getattr(nn, name), SIGNATURES[name]
    assert kind.__module__ == recorded["home"].replace("torch", "dtrain", 1)
    assert kind.__qualname__ == name
    ours = [
        [p.name, None if p.default is inspect.Parameter.empty else repr(p.default)]
        for p in inspect.signature(kind).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert ours == [p for p in recorded["__init__"] if p[0] not in DEPRECATED.get(name, ())]
    if kind.forward is not nn.Module.forward:
        assert list(inspect.signature(kind.forward).parameters) == recorded["forward"]


def test_every_module_is_found_by_name_and_listed():
    assert set(nn.modules.__all__) <= set(dir(nn)) & set(vars(nn))
    assert set(nn.modules.__all__) <= set(SIGNATURES)
    with pytest.raises(AttributeError, match=r"module 'dtrain.nn' has no attribute 'Nonesuch'"):
        _ = nn.Nonesuch


def test_the_handle_of_a_hook_is_where_scripts_look_for_it():
    assert hooks.RemovableHandle is RemovableHandle
    assert isinstance(nn.ReLU().register_forward_hook(print), hooks.RemovableHandle)


# --- errors --------------------------------------------------------------------------------------


def test_a_missing_attribute_names_the_nearest_one():
    with pytest.raises(AttributeError) as caught:
        _ = nn.Linear(2, 3).wieght
    text = "'Linear' object has no attribute 'wieght'. Did you mean: 'weight'?"
    assert str(caught.value) == text
    assert type(caught.value) is AttributeError
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    with pytest.raises(AttributeError, match=r"has no attribute `layr1`. Did you mean: 'layer1'\?"):
        nn.ModuleDict({"layer1": nn.ReLU()}).get_submodule("layr1")


def test_asking_for_an_attribute_does_not_look_for_the_nearest_one(monkeypatch):
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_, **__: 1 / 0)
    assert not hasattr(nn.Linear(2, 3), "wieght")
    assert getattr(nn.Linear(2, 3), "wieght", 5) == 5


def notes_of(model, *args):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        model(*args)
    return caught.value.__notes__


def test_a_failed_call_says_in_which_module():
    linear = nn.Linear(4, 2)
    about = "Linear(in_features=4, out_features=2, bias=True)"
    assert notes_of(linear, dtrain.ones(3)) == [f"in module {about}"]
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"b": Block(linear)})["b"])
    assert notes_of(model, dtrain.ones(2, 3)) == [f"in module '1.fc' of Sequential: {about}"]
    model[0].register_forward_hook(lambda *_: linear(dtrain.ones(3)))
    assert notes_of(model, dtrain.ones(2, 3)) == [f"in module '1.fc' of Sequential: {about}"]


def test_a_module_that_is_not_below_the_outer_one_is_named_without_a_path():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Linear(4, 2)]  # not registered

        def forward(self, x):
            return self.hidden[0](x)

    assert notes_of(Holds(), dtrain.ones(3))[0].startswith("in module Linear(in_features=4")


# --- copies and pickles --------------------------------------------------------------------------


def tied_model():
    model = nn.Sequential(Block(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].fc.weight
    model.log = []
    model[1].register_forward_hook(lambda module, args, out: out + 1)
    model(dtrain.randn(4, 3)).sum().backward()
    return model


def test_a_deep_copy_is_independent_and_keeps_ties_and_hooks():
    model = tied_model()
    other = copy.deepcopy(model)
    x = dtrain.randn(2, 3)
    assert np.array_equal(other.eval()(x).detach(), model.eval()(x).detach())
    assert other[2].weight is other[0].fc.weight
    assert all(p.grad is None for p in other.parameters())
    for p in other.parameters():
        p.data.zero_()
    assert any((p != 0).any() for p in model.parameters())
    assert type(other[2].weight) is nn.Parameter


def test_a_module_can_be_pickled():
    model = nn.Sequential(Block(nn.Linear(3, 3)), nn.BatchNorm1d(3)).eval()
    other = pickle.loads(pickle.dumps(model))
    x = dtrain.randn(2, 3)
    assert not other.training
    assert np.array_equal(other(x).detach(), model(x).detach())
    assert repr(other) == repr(model)
    other.register_forward_hook(lambda *_: 5)
    assert other(x) == 5


def test_the_state_of_an_older_pickle_is_completed():
    other = nn.ReLU.__new__(nn.ReLU)
    other.__setstate__(
        {"training": True, "_parameters": {}, "_buffers": {}, "_modules": {}, "inplace": False}
    )
    assert (other(dtrain.tensor([-1.0, 2.0])) == dtrain.tensor([0.0, 2.0])).all()
    other.register_forward_pre_hook(lambda module, args: -args[0])
    assert other(dtrain.tensor([-1.0, 2.0])).tolist() == [1, 0]
    assert other.state_dict() == {}


# --- parameters ----------------------------------------------------------------------------------


def test_a_parameter_shares_memory_and_changes_are_noticed():
    w = dtrain.ones(3)
    p = nn.Parameter(w)
    loss = (p * p).sum()
    w.add_(1)
    assert p.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameter_of_what_is_no_tensor():
    with pytest.raises(TypeError, match="cannot make a Parameter of a list: expected a Tensor"):
        nn.Parameter([1.0])
    assert nn.Parameter().shape == (0,)
    assert repr(nn.Parameter(dtrain.ones(1))).startswith("Parameter containing:\ntensor([1.]")
    assert nn.Parameter(nn.Parameter(dtrain.ones(1)), requires_grad=False).requires_grad is False


def test_operations_on_parameters_give_tensors():
    p = nn.Parameter(dtrain.ones(2))
    assert type(p * 2) is dtrain.Tensor
    assert type(p.detach()) is dtrain.Tensor


# --- dtypes --------------------------------------------------------------------------------------


def test_casting_keeps_the_parameters_and_spares_the_integers():
    model = nn.BatchNorm1d(3)
    before = list(model.parameters())
    model(dtrain.randn(4, 3)).sum().backward()
    for move, dtype in (
        (model.double, dtrain.float64),
        (model.half, dtrain.float16),
        (model.bfloat16, dtrain.bfloat16),
        (model.float, dtrain.float32),
        (lambda: model.to(dtrain.float64), dtrain.float64),
        (lambda: model.to("cpu", dtrain.float32, non_blocking=True), dtrain.float32),
        (lambda: model.to(dtrain.zeros(1, dtype=dtrain.float64)), dtrain.float64),
    ):
        assert move() is model
        after = list(model.parameters())
        assert all(a is b for a, b in zip(after, before, strict=True))
        assert {p.dtype for p in after} == {p.grad.dtype for p in after} == {dtype}
        assert model.running_mean.dtype is dtype
        assert model.num_batches_tracked.dtype is dtrain.int64
    assert model.type(dtrain.float32).num_batches_tracked.dtype is dtrain.float32


def test_devices():
    model = nn.Linear(2, 2)
    assert model.cpu() is model.to("cpu") is model
    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        model.cuda()
    with pytest.raises(RuntimeError, match="device"):
        model.to("cuda")
    weight = model.weight
    assert model.to_empty(device="cpu").weight is weight
    assert weight.shape == (2, 2)


# --- hooks ---------------------------------------------------------------------------------------


def test_an_input_seen_by_a_backward_hook_must_not_be_changed_in_place():
    m = nn.ReLU(inplace=True)
    m.register_full_backward_hook(lambda *_: None)
    x = dtrain.ones(2, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        m(x)


def test_backward_hooks_cost_nothing_where_no_graph_is_recorded():
    m = nn.Linear(2, 2)
    m.register_full_backward_hook(lambda *_: 1 / 0)
    with dtrain.no_grad():
        assert m(dtrain.ones(2)).grad_fn is None


def test_an_output_without_tensors_cannot_be_watched():
    class Lists(nn.Module):
        def forward(self, x):
            return [x]

    m = Lists()
    m.register_full_backward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="module output should be a Tensor or a tuple of Tensors"):
        m(dtrain.ones(1, requires_grad=True))


def test_a_hook_may_remove_itself():
    m = nn.ReLU()
    seen = []
    handle = m.register_forward_hook(lambda *_: (seen.append(1), handle.remove())[1])
    m(dtrain.ones(1))
    m(dtrain.ones(1))
    assert seen == [1]


def test_hooks_of_state_return_nothing():
    m = nn.Linear(1, 1)
    with (
        m.register_state_dict_post_hook(lambda *_: 5),
        pytest.raises(RuntimeError, match="state_dict post-hook must return None"),
    ):
        m.state_dict()
    m.register_load_state_dict_post_hook(lambda *_: 5)
    with pytest.raises(AssertionError, match="are not expected to return new values"):
        m.load_state_dict(m.state_dict())


# --- state ---------------------------------------------------------------------------------------

LEAVES = st.sampled_from(
    [
        lambda: nn.Linear(2, 3),
        lambda: nn.BatchNorm1d(2),
        lambda: nn.ReLU(),
        lambda: nn.Embedding(2, 3),
    ]
)
TREES = st.recursive(
    LEAVES.map(lambda make: make()),
    lambda children: st.lists(children, max_size=3).map(nn.ModuleList),
    max_leaves=6,
)


@given(tree=TREES, assign=st.booleans())
@settings(max_examples=40, deadline=None)
def test_state_of_any_tree_goes_round(tree, assign):
    state = tree.state_dict()
    named = {**dict(tree.named_parameters()), **dict(tree.named_buffers())}
    assert set(state) == set(named)
    assert all(np.shares_memory(state[k].numpy(), named[k].numpy(force=True)) for k in state)
    other = copy.deepcopy(tree)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state, assign=assign)
    for key, value in other.state_dict().items():
        assert np.array_equal(value.numpy(), state[key].numpy())
        assert np.shares_memory(value.numpy(), state[key].numpy()) == assign


def test_keys_sort_as_in_the_tree_and_keep_vars_gives_parameters():
    model = tied_model()
    kept = model.state_dict(keep_vars=True)
    assert kept["0.fc.weight"] is model[0].fc.weight
    assert not model.state_dict()["0.fc.weight"].requires_grad
    target = {"x": 1}
    assert model.state_dict(destination=target, prefix="m.") is target
    assert "m.2.bias" in target


def test_loading_does_not_change_the_dict_it_was_given():
    model = nn.BatchNorm1d(2)
    state = dict(model.state_dict())
    del state["num_batches_tracked"]
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys


# --- containers ----------------------------------------------------------------------------------


def test_what_is_no_module_is_not_put_into_a_list():
    listed = nn.ModuleList([nn.ReLU()])
    for put in (lambda: listed.insert(0, 3), lambda: listed.append(3), lambda: listed.extend([3])):
        with pytest.raises(TypeError, match="int is not a Module subclass"):
            put()
    assert len(listed) == 1
    assert not [name for name in dir(listed) if name[0].isdigit()]
