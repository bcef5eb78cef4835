"""Optimizers that are an update rule: what they share, and how a rule walks over the parameters.

A rule is arithmetic on flat arrays of one length and dtype, in place; it does not know how many
elements there are, where chunks end, or whether they are one parameter or many in a FlatBuffer.
Rules: hyperparameters reach a rule as 0-d arrays of the parameter's dtype (half the call overhead
of Python numbers); temporaries are lent to it, so that a step allocates almost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.ops.inplace import bump
from dtrain.optim.optimizer import Group, Optimizer, evaluate, number
from dtrain.tensor import Tensor

Array = np.ndarray[Any, Any]
State = dict[str, Any]

# Elements a rule sees at once. AdamW on 10.9 M float32, AVX2, 0.5 MiB L2: 50 ms at 8 Ki, 28 ms at
# 32 Ki, 26 ms from 48 Ki to 256 Ki; unchunked 28 ms and a temporary as long as the parameter.
# AVX-512, 2 MiB L2: 41 ms at 8 Ki, 33 ms at 32 Ki and 48 Ki, 34.5 ms at 64 Ki, 43 ms at 256 Ki.
CHUNK = 3 << 14


class UpdateRule(Optimizer):
    """An optimizer whose step is one rule over each parameter's flat arrays.

    A subclass gives `rule`, `numbers`, `arrays` and, if it counts otherwise, `clock`. All take the
    options torch's have: `foreach` and `fused` are accepted and change nothing, there is one
    implementation; `capturable` and `differentiable` are refused when True.
    """

    temporaries = 1

    @staticmethod
    def rule(h: Any, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        """Change `param` and `state` in place. All are 1-D, real, of one length and dtype."""
        raise NotImplementedError

    def arrays(self, group: Group) -> tuple[str, ...]:
        """The names of the state arrays that `rule` takes, each of the parameter's shape."""
        return ()

    def clock(self, group: Group, state: State) -> Hashable:
        """Count the step in `state`; returns what `numbers` depends on besides the group."""
        return advance(state)

    def numbers(self, group: Group, clock: Any) -> Any:
        """The hyperparameters of one step: a NamedTuple of floats, flags and None."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        _refuse_unsupported(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            for name, default in defaults.items():
                group.setdefault(name, default)  # saved before the option existed
            for param in group["params"]:
                _check_shapes(param, state["state"].get(param, {}), self.arrays(group))
        super().__setstate__(state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure()` did, if given."""
        loss = evaluate(closure)
        for group in self.param_groups:
            _refuse_unsupported(group)
            self._update_group(group)
        return loss

    def _update_group(self, group: Group) -> None:
        names = self.arrays(group)
        prepared: dict[Any, Any] = {}  # parameters of one dtype and age share their numbers
        for param in group["params"]:
            if param._grad is None:
                continue
            data = param._data
            if not data.flags.writeable:
                raise RuntimeError(
                    f"cannot update a parameter of shape {list(data.shape)} in place: its memory "
                    "is read-only. Make it from a copy of the array."
                )
            state = self.state[param] if names or self.state.get(param) else {}
            clock = self.clock(group, state)
            real = _real(data.dtype)
            h = prepared.get((clock, real))
            if h is None:
                h = prepared[clock, real] = _as_arrays(self.numbers(group, clock), real)
            buffers = [self._buffer(state, name, param) for name in names]
            walk(self.rule, h, self._lend(prepared, real), data, param._grad._data, *buffers)
            bump(param)

    def _buffer(self, state: State, name: str, param: Tensor) -> Array:
        held = state.get(name)
        if held is None:
            held = state[name] = param._kin(np.zeros(param._data.shape, param._data.dtype))
        buffer: Array = held._data
        return buffer

    def _lend(self, prepared: dict[Any, Any], dtype: np.dtype[Any]) -> Array:
        temps = prepared.get(dtype)
        if temps is None:
            temps = prepared[dtype] = np.empty((self.temporaries, CHUNK), dtype)
        return temps


def walk(
    rule: Callable[..., None], h: Any, temps: Array, param: Array, grad: Array, *state: Array
) -> None:
    """Apply `rule` to the arrays, flat and at most CHUNK elements at a time.

    They are equal in shape and dtype. Complex numbers are pairs of reals; 16-bit floats are
    computed in float32; arrays that are not contiguous are copied and written back.
    """
    arrays = (param, grad, *state)
    flats = [a.reshape(-1) for a in arrays]  # views where contiguous
    if param.dtype.kind == "c":
        flats = [a.view(_real(a.dtype)) for a in flats]
    size = flats[0].size
    if size <= CHUNK:
        _apply(rule, h, temps[:, :size], flats)
    else:
        for start in range(0, size, CHUNK):
            chunk = [a[start : start + CHUNK] for a in flats]
            _apply(rule, h, temps[:, : chunk[0].size], chunk)
    for array, flat in zip(arrays, flats, strict=True):
        if array is not grad and not array.flags.c_contiguous:
            array[...] = flat.view(array.dtype).reshape(array.shape)


def _apply(rule: Callable[..., None], h: Any, temps: Array, chunk: list[Array]) -> None:
    if chunk[0].itemsize > 2:
        rule(h, temps, *chunk)
        return
    wide = [a.astype(np.float32) for a in chunk]
    rule(h, temps, *wide)
    for i in (0, *range(2, len(chunk))):
        chunk[i][...] = wide[i]


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype a rule computes in."""
    if dtype.kind == "c":
        return np.dtype(f"f{dtype.itemsize // 2}")
    return dtype if dtype.itemsize > 2 else np.dtype(np.float32)


def _as_arrays(numbers: Any, dtype: np.dtype[Any]) -> Any:
    return type(numbers)(*[np.asarray(x, dtype) if isinstance(x, float) else x for x in numbers])


# --- what rules and constructors are made of -----------------------------------------------------


def gradient(h: Any, param: Array, grad: Array, out: Array) -> Array:
    """`grad` (negated to maximize) plus `weight_decay * param`.

    `grad` itself when there is nothing to do, else the sum in `out`. Reads `h.maximize`, a flag,
    and `h.weight_decay`, a number or None.
    """
    if h.weight_decay is None:
        return np.negative(grad, out=out) if h.maximize else grad
    np.multiply(param, h.weight_decay, out=out)
    return (np.subtract if h.maximize else np.add)(out, grad, out=out)


def blend(average: Array, target: Array, weight: Array, out: Array) -> None:
    """`average += weight * (target - average)`, in place; `out` is a temporary."""
    np.subtract(target, average, out=out)
    np.multiply(out, weight, out=out)
    np.add(average, out, out=average)


def blend_square(average: Array, target: Array, beta: Array, weight: Array, out: Array) -> None:
    """`average = beta * average + weight * target**2`, in place; `out` is a temporary."""
    np.multiply(average, beta, out=average)
    np.multiply(target, target, out=out)
    np.multiply(out, weight, out=out)
    np.add(average, out, out=average)


def number_or_none(value: Any) -> float | None:
    """A hyperparameter as a float, None for 0: the rule leaves the term out."""
    return number(value) or None


def new_step(value: float = 0) -> Tensor:
    """A 0-d tensor for `state["step"]`, as torch has it: float32, or a float64 default dtype."""
    wide = dtypes.get_default_dtype() is dtypes.float64
    step: Tensor = make(np.array(value, np.float64 if wide else np.float32))
    return step


def advance(state: State) -> int:
    """Count one step in `state["step"]` and return the count."""
    step = state.get("step", 0)
    if not isinstance(step, Tensor):  # the first step, or saved by an old torch
        step = state["step"] = new_step(step)
    np.add(step._data, 1, out=step._data)
    return int(step._data)


def require(valid: bool, name: str, value: Any) -> None:
    """ValueError `Invalid <name>: <value>` unless valid."""
    if not valid:
        raise ValueError(f"Invalid {name}: {value}")


def require_options(lr: Any, weight_decay: Any, eps: float = 0.0) -> None:
    """ValueError unless lr (a number or a tensor with one), weight_decay and eps are >= 0."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    require(number(lr) >= 0, "learning rate", lr)
    require(eps >= 0, "epsilon value", eps)
    require(number(weight_decay) >= 0, "weight_decay value", weight_decay)


def require_betas(betas: Sequence[Any]) -> None:
    """ValueError unless both are in [0, 1)."""
    for index, beta in enumerate(betas):
        require(0 <= number(beta) < 1, f"beta parameter at index {index}", beta)


def _check_shapes(param: Tensor, state: State, names: tuple[str, ...]) -> None:
    for name in names:
        held = state.get(name)
        if held is not None and held.shape != param.shape:
            raise ValueError(
                f"loaded {name} has shape {list(held.shape)}, its parameter {list(param.shape)}"
            )


def _refuse_unsupported(group: Group) -> None:
    if group.get("fused") and group.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for option in ("capturable", "differentiable"):
        if group.get(option):
            raise RuntimeError(
                f"{option}=True is not supported: "
                + (
                    "there are no CUDA graphs to capture on the CPU; leave it out."
                    if option == "capturable"
                    else "steps change parameters outside the graph; leave it out and write the "
                    "update with tensor operations if you need its gradient."
                )
            )
