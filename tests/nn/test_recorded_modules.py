"""Every module computes, prints and raises what PyTorch does: compared with recorded values."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain
from dtrain import nn
from tests.nn.cases import ERRORS, REPRS, VALUES
from tests.nn.scenarios import SCENARIOS
from tests.nn.values import computed
from tests.recorded import load, load_json, under

NAMES = {"torch": dtrain, "nn": nn, "F": nn.functional}
TEXTS = load_json("module_texts")
# Sums are added in another order than PyTorch's: float32 agrees to a few units in the last place
# of the largest terms, which are of order 1 here.
TOLERANCE = {"rtol": 2e-5, "atol": 3e-6}


def in_torch_words(value):
    """Text with our name of the package replaced by PyTorch's, in nested plain data."""
    if isinstance(value, str):
        return value.replace("dtrain", "torch")
    if isinstance(value, (list, tuple)):
        return [in_torch_words(v) for v in value]
    if isinstance(value, dict):
        return {key: in_torch_words(v) for key, v in value.items()}
    return value


@pytest.mark.parametrize("expression", VALUES)
def test_outputs_gradients_and_buffers(expression):
    recorded = under(load("module_values"), expression)
    ours = computed(dtrain, expression, VALUES[expression])
    assert ours.keys() == recorded.keys()
    for name, value in recorded.items():
        array = ours[name].detach().numpy()
        assert array.dtype == value.dtype, name
        np.testing.assert_allclose(array, value, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("expression", REPRS)
def test_repr(expression):
    assert in_torch_words(repr(eval(f"nn.{expression}", NAMES))) == TEXTS["repr"][expression]


# What we say and PyTorch does not, or says in words about itself.
OTHER_WORDS = {
    # a tensor's own sentence, which PyTorch's Parameter says with a capital letter
    "nn.Parameter(torch.tensor([1, 2]))": "only Tensors of floating point and complex dtype can",
    # a space that PyTorch forgot
    "nn.ModuleDict([3])": "ModuleDict update sequence element #0 should be Iterable; is int",
}


@pytest.mark.parametrize("statement", ERRORS)
def test_error(statement):
    kind, text = TEXTS["error"][statement]
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the class is compared below)
        exec(statement, dict(NAMES))
    assert caught.type.__name__ == kind
    assert in_torch_words(str(caught.value)).startswith(OTHER_WORDS.get(statement, text))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name):
    assert in_torch_words(SCENARIOS[name](dtrain)) == load_json("module_scenarios")[name]


def test_every_recorded_text_is_compared():
    assert set(TEXTS["repr"]) == set(REPRS)
    assert set(TEXTS["error"]) == set(ERRORS)
    assert set(load_json("module_scenarios")) == set(SCENARIOS)
