"""Default initialisation and nn.init draw PyTorch's numbers; init's own rules."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain
from dtrain import nn
from tests.draw_cases import SEEDS
from tests.recorded import load, under

# Normals of 16 and more differ in the last bits of log, sin and cos; the rest is exact.
TOLERANCE = {"rtol": 0, "atol": 5e-7}
EXPRESSIONS = sorted({key.split("/")[1] for key in load("modules")})
CALLS = sorted({key.split("/")[1] for key in load("init_functions")})
# Recorded, but not in dtrain: the test fails as soon as one of them is, and is then compared.
ABSENT = {
    *("Bilinear", "MultiheadAttention", "RNN", "LSTM", "GRU"),
    *("LSTMCell", "GRUCell", "TransformerEncoderLayer", "TransformerDecoderLayer"),
}


def test_what_is_not_compared_does_not_exist():
    recorded = {expression.partition("(")[0] for expression in EXPRESSIONS}
    assert {name for name in recorded if not hasattr(nn, name)} == ABSENT


@pytest.mark.parametrize(
    "expression", [e for e in EXPRESSIONS if e.partition("(")[0] not in ABSENT]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_default_initialisation(expression, seed):
    recorded = under(load("modules"), f"{seed}/{expression}")
    dtrain.manual_seed(seed)
    ours = eval(f"nn.{expression}", {"nn": nn}).state_dict()
    assert [*ours, "#next"] == list(recorded)
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor.numpy(), recorded[name], **TOLERANCE)
        assert tensor.numpy().dtype == recorded[name].dtype
    assert dtrain.rand(1).numpy() == recorded["#next"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_init_function(call, seed):
    for shape, recorded in under(load("init_functions"), f"{seed}/{call}").items():
        dtrain.manual_seed(seed)
        w = dtrain.zeros(*[int(n) for n in shape.split("x")])
        eval(f"nn.init.{call}", {"nn": nn, "w": w})
        # orthogonal_ goes through LAPACK's QR, whose roundings differ
        atol = 3e-6 if "orthogonal" in call else 1e-6
        np.testing.assert_allclose(w.numpy(), recorded, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("call", ["uniform_", "normal_", "trunc_normal_", "orthogonal_"])
def test_a_generator_is_drawn_from_and_the_default_one_left_alone(call):
    dtrain.manual_seed(5)
    fill = getattr(nn.init, call)
    expected = fill(dtrain.empty(4, 5)).numpy()
    state = dtrain.get_rng_state()
    given = fill(dtrain.empty(4, 5), generator=dtrain.Generator().manual_seed(5))
    assert np.array_equal(given.numpy(), expected)
    assert np.array_equal(dtrain.get_rng_state(), state)


def test_parameters_are_filled_outside_any_graph():
    w = nn.Parameter(dtrain.zeros(3, 3))
    for fill in (nn.init.ones_, nn.init.eye_, nn.init.xavier_normal_, nn.init.orthogonal_):
        assert fill(w) is w
        assert w.is_leaf
    assert w.requires_grad


def test_orthogonal_is_orthogonal_and_dirac_hands_channels_on():
    q = nn.init.orthogonal_(dtrain.empty(3, 7)).numpy()
    np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-6)
    w = nn.init.dirac_(dtrain.empty(4, 2, 3, 3), groups=2).numpy()
    expected = np.zeros((4, 2, 3, 3))
    expected[[0, 1, 2, 3], [0, 1, 0, 1], 1, 1] = 1
    assert np.array_equal(w, expected)


def test_sparse_has_the_zeros_it_was_asked_for():
    w = nn.init.sparse_(dtrain.empty(10, 4), 0.35).numpy()
    assert ((w == 0).sum(axis=0) == 4).all()


def test_trunc_normal_warns_of_a_mean_far_outside_and_stays_inside():
    with pytest.warns(UserWarning, match="mean is more than 2 std from"):
        w = nn.init.trunc_normal_(dtrain.empty(50), 0.0, 1.0, 2.5, 3.0)
    assert 2.5 <= w.numpy().min() <= w.numpy().max() <= 3.0


def test_nothing_to_initialise_is_said():
    with pytest.warns(UserWarning, match="Initializing zero-element tensors is a no-op"):
        nn.Linear(0, 3)
