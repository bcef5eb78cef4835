"""Gradients compared with finite differences, to first and second order.

Inputs are float64 tensors that require grad; the function must be deterministic. The numerical
Jacobian moves one element at a time, the analytical one is read off row by row by backward.
Source: torch.autograd.gradcheck, whose names, defaults and sentences these are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.autograd.gradients import grad
from dtrain.autograd.node import make
from dtrain.autograd.value import Value

Jacobian = np.ndarray  # (elements of an input, elements of an output)


class GradcheckError(RuntimeError):
    """Raised by `gradcheck` and `gradgradcheck` when a gradient is wrong."""


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _floating(values: Sequence[Any]) -> list[Any]:
    return [v for v in values if isinstance(v, Value) and v._data.dtype.kind == "f"]


def _check_inputs(inputs: tuple[Any, ...]) -> list[Any]:
    """The inputs to be checked."""
    checked = [v for v in _floating(inputs) if v._requires_grad]
    if not checked:
        raise ValueError(
            "gradcheck expects at least one input tensor to require gradient, but none of the them "
            "have requires_grad=True."
        )
    for i, value in enumerate(inputs):
        if isinstance(value, Value) and value._requires_grad and value._data.dtype != np.float64:
            warnings.warn(
                f"Input #{i} requires gradient and is not a double precision floating point. This "
                "check will likely fail if all the inputs are not of double precision.",
                UserWarning,
                stacklevel=3,
            )
    return checked


def _numerical(function: Callable[[], list[Any]], x: Value, eps: float) -> list[Jacobian]:
    """Central differences of every output with respect to every element of x."""
    data = x._data
    rows: list[list[np.ndarray]] = []
    for place in np.ndindex(data.shape):
        original = data[place]
        sides = []
        for step in (-eps, eps):
            data[place] = original + step
            sides.append([np.array(y._data, np.float64).reshape(-1) for y in function()])
        data[place] = original
        rows.append([(high - low) / (2 * eps) for low, high in zip(*sides, strict=True)])
    outputs = len(function())
    return [np.array([row[k] for row in rows]).reshape(data.size, -1) for k in range(outputs)]


def _analytical(y: Any, inputs: list[Any], scale: float = 1.0) -> list[Jacobian]:
    """d(y)/d(input) for every input: one backward pass for each element of y."""
    jacobians = [np.zeros((x._data.size, y._data.size)) for x in inputs]
    for k in range(y._data.size):
        unit = np.zeros(y._data.shape, y._data.dtype)
        unit.reshape(-1)[k] = scale
        found = grad(y, inputs, make(unit), retain_graph=True, allow_unused=True)
        for jacobian, x, g in zip(jacobians, inputs, found, strict=True):
            if g is not None:
                if g._data.dtype != x._data.dtype or g._data.shape != x._data.shape:
                    raise GradcheckError("Gradient has dtype or size mismatch with its input")
                jacobian[:, k] = g._data.reshape(-1)
    return jacobians


def _compare(
    numerical: Jacobian, analytical: Jacobian, output: int, number: int, rtol: float, atol: float
) -> None:
    if not np.allclose(analytical, numerical, rtol, atol, equal_nan=True):
        raise GradcheckError(
            f"Jacobian mismatch for output {output} with respect to input {number},\n"
            f"numerical:{numerical}\nanalytical:{analytical}\n"
        )


def _check(
    func: Callable[..., Any], inputs: tuple[Any, ...], eps: float, atol: float, rtol: float,
    nondet_tol: float, check_undefined_grad: bool, fast_mode: bool,
) -> None:  # fmt: skip
    checked = _check_inputs(inputs)

    def run() -> list[Any]:
        return _floating(_as_tuple(func(*inputs)))

    outputs = run()
    differentiable = [y for y in outputs if y._requires_grad]
    numbers = {id(x): i for i, x in enumerate(inputs)}
    if fast_mode:
        for x in checked:
            _check_direction(run, outputs, x, numbers[id(x)], eps, rtol, atol)
        return
    analytical = [_analytical(y, checked) if y._requires_grad else None for y in outputs]
    for j, x in enumerate(checked):
        for k, numerical in enumerate(_numerical(run, x, eps)):
            found = analytical[k]
            exact = np.zeros_like(numerical) if found is None else found[j]
            _compare(numerical, exact, k, numbers[id(x)], rtol, atol)
    for k, (y, found) in enumerate(zip(outputs, analytical, strict=True)):
        if found is not None:
            _check_repeatable(y, checked, found, k, nondet_tol)
    if check_undefined_grad and len(differentiable) > 1:
        _check_unused(differentiable, checked)


def _check_direction(
    run: Callable[[], list[Any]], outputs: list[Any], x: Any, number: int, eps: float, rtol: float,
    atol: float,
) -> None:  # fmt: skip
    """u^T J v for random unit vectors u and v: one number stands for the whole Jacobian."""
    draw = np.random.RandomState(0)
    original = x._data.copy()
    v = draw.randn(*original.shape)
    v = np.asarray(v / (np.linalg.norm(v) or 1.0))
    sides = []
    for step in (-eps, eps):
        x._data[...] = original + step * v
        sides.append([np.array(y._data, np.float64) for y in run()])
    x._data[...] = original
    for k, (y, low, high) in enumerate(zip(outputs, *sides, strict=True)):
        u = np.asarray(draw.randn(*low.shape))
        numerical = np.vdot((high - low) / (2 * eps), u).reshape(1, 1)
        exact = np.zeros((1, 1))
        if y._requires_grad:
            (found,) = grad(y, x, make(u), retain_graph=True, allow_unused=True)
            exact = exact if found is None else np.vdot(found._data, v).reshape(1, 1)
        _compare(numerical, exact, k, number, rtol, atol)


def _check_repeatable(
    y: Any, inputs: list[Any], first: list[Jacobian], output: int, tolerance: float
) -> None:
    """Backward run again gives the same, and twice the gradient twice as much: it is linear."""
    for again, factor in ((_analytical(y, inputs), 1.0), (_analytical(y, inputs, 2.0), 2.0)):
        for a, b in zip(first, again, strict=True):
            if not np.allclose(a * factor, b, rtol=1e-12, atol=tolerance, equal_nan=True):
                raise GradcheckError(
                    f"Backward is not reentrant, i.e., running backward with same input and "
                    f"grad_output multiple times gives different values (output {output}), or it "
                    f"is not linear in grad_output. The tolerance for nondeterminism was "
                    f"{tolerance}."
                )


def _check_unused(outputs: list[Any], inputs: list[Any]) -> None:
    """Backward from one of several outputs must run with the others' gradients undefined."""
    for y in outputs:
        unit = make(np.ones(y._data.shape, y._data.dtype))
        grad(y, inputs, unit, retain_graph=True, allow_unused=True)


def gradcheck(
    func: Callable[..., Any], inputs: Any, *, eps: float = 1e-6, atol: float = 1e-5,
    rtol: float = 1e-3, raise_exception: bool = True, nondet_tol: float = 0.0,
    check_undefined_grad: bool = True, fast_mode: bool = False,
) -> bool:  # fmt: skip
    """Whether the gradients of `func(*inputs)` agree with central differences of width `eps`.

    Also that backward is repeatable and linear in its argument. False, or with `raise_exception`
    GradcheckError, where they do not. `fast_mode` compares in one random direction only.
    Source: torch.autograd.gradcheck; its `check_batched_grad` and `check_forward_ad` need
    machinery that dtrain does not have.
    """
    try:
        _check(
            func, _as_tuple(inputs), eps, atol, rtol, nondet_tol, check_undefined_grad, fast_mode
        )  # fmt: skip
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def gradgradcheck(
    func: Callable[..., Any], inputs: Any, grad_outputs: Any = None, *, eps: float = 1e-6,
    atol: float = 1e-5, rtol: float = 1e-3, raise_exception: bool = True, nondet_tol: float = 0.0,
    check_undefined_grad: bool = True, fast_mode: bool = False,
) -> bool:  # fmt: skip
    """`gradcheck` of the gradients of `func`, with respect to its inputs and to `grad_outputs`.

    Without `grad_outputs`, random ones of a fixed seed. Source: torch.autograd.gradgradcheck.
    """
    tensors = _as_tuple(inputs)
    checked = _check_inputs(tensors)
    outputs = [y for y in _floating(_as_tuple(func(*tensors))) if y._requires_grad]
    if grad_outputs is None:
        draw = np.random.RandomState(0)
        grad_outputs = [
            make(np.asarray(draw.randn(*y._data.shape), y._data.dtype)) for y in outputs
        ]
        for g in grad_outputs:
            g.requires_grad = True
    given = _as_tuple(grad_outputs)
    places = [i for i, v in enumerate(tensors) if any(v is x for x in checked)]

    def gradients(*args: Any) -> tuple[Any, ...]:
        primals, starts = args[: len(tensors)], args[len(tensors) :]
        ys = [y for y in _floating(_as_tuple(func(*primals))) if y._requires_grad]
        wanted = [primals[i] for i in places]
        found = grad(ys, wanted, starts, create_graph=True, allow_unused=True)
        return tuple(g for g in found if g is not None)

    return gradcheck(
        gradients, (*tensors, *given), eps=eps, atol=atol, rtol=rtol,
        raise_exception=raise_exception, nondet_tol=nondet_tol,
        check_undefined_grad=check_undefined_grad, fast_mode=fast_mode,
    )  # fmt: skip
