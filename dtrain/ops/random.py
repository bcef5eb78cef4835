"""Random tensors, drawn from a Generator with torch's CPU stream.

With the same seed and the same sequence of calls the numbers are PyTorch's (dtrain/generator.py
says how exactly). `generator=None` means the default one of this thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import Value, need_whole
from dtrain.device import on_meta
from dtrain.generator import Generator
from dtrain.ops.create import finish, hollow, shape_of
from dtrain.ops.inplace import put
from dtrain.random import default_generator


def source_of(generator: Generator | None) -> Generator:
    """The generator to draw from."""
    return default_generator() if generator is None else generator


def _drawn(name: str, draw: Callable[..., np.ndarray]) -> tuple[Callable[..., Any], ...]:
    def drawn(
        generator: Generator | None, shape: tuple[int, ...], dtype: dtypes.dtype, device: Any,
        requires_grad: bool,
    ) -> Any:  # fmt: skip
        if on_meta(device):  # nothing is drawn
            return finish(hollow(shape, dtype.numpy), device, requires_grad)
        return finish(draw(source_of(generator), shape, dtype), device, requires_grad)

    def factory(
        *size: Any, generator: Generator | None = None, dtype: dtypes.dtype | None = None,
        device: Any = None, requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        kind = dtype or dtypes.get_default_dtype()
        return drawn(generator, shape_of(size), kind, device, requires_grad)

    def like(
        input: Any, *, generator: Generator | None = None, dtype: dtypes.dtype | None = None,
        device: Any = None, requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        device = input.device if device is None else device
        if not on_meta(device):
            need_whole(f"{name}_like", input)
        kind = dtype or input.dtype
        return drawn(generator, tuple(input.shape), kind, device, requires_grad)

    for function, called in ((factory, name), (like, f"{name}_like")):
        function.__name__ = function.__qualname__ = called
        function.__doc__ = f"Random numbers of the given shape. Source: torch.{called}."
    return factory, like


rand, rand_like = _drawn("rand", lambda g, shape, dtype: g.uniform(shape, dtype))
randn, randn_like = _drawn("randn", lambda g, shape, dtype: g.normal(shape, dtype))


def randint(
    low: int, high: Any = None, size: Any = None, *, generator: Generator | None = None,
    dtype: dtypes.dtype = dtypes.int64, device: Any = None, requires_grad: bool = False,
) -> Any:  # fmt: skip
    """Integers in [low, high); `randint(high, size)` starts at 0. Source: torch.randint."""
    if size is None:
        low, high, size = 0, low, high
    if low >= high:
        raise RuntimeError(
            f"random_ expects 'from' to be less than 'to', but got from={low} >= to={high}"
        )
    shape = shape_of((size,))
    if on_meta(device):
        return finish(hollow(shape, dtype.numpy), device, requires_grad)
    return finish(source_of(generator).randint(low, high, shape, dtype), device, requires_grad)


def randperm(
    n: int, *, generator: Generator | None = None, dtype: dtypes.dtype = dtypes.int64,
    device: Any = None,
) -> Any:  # fmt: skip
    """A random permutation of 0..n-1. Source: torch.randperm."""
    if on_meta(device):
        return finish(hollow((n,), dtype.numpy), device)
    return finish(source_of(generator).randperm(n, dtype), device)


def normal(
    mean: Any, std: Any = 1.0, size: Any = None, *, generator: Generator | None = None
) -> Any:
    """Normal numbers; mean and std may be tensors, `size` is for two numbers. Source: torch."""
    if isinstance(mean, Value) or isinstance(std, Value):
        need_whole("normal", mean, std)
        shape = np.broadcast_shapes(
            mean._data.shape if isinstance(mean, Value) else (),
            std._data.shape if isinstance(std, Value) else (),
        )
        return randn(shape, generator=generator) * std + mean
    drawn = source_of(generator).normal(
        shape_of((size,)), dtypes.get_default_dtype(), float(mean), float(std)
    )
    return make(drawn)


def bernoulli(input: Any, p: float | None = None, *, generator: Generator | None = None) -> Any:
    """0 or 1 with the probabilities in `input` (or `p` everywhere). Source: torch.bernoulli."""
    need_whole("bernoulli", input)
    source = source_of(generator)
    drawn = source.bernoulli(input._data) if p is None else source.bernoulli(p, input._data.shape)
    return make(drawn.astype(input._data.dtype, copy=False))


def multinomial(
    input: Any, num_samples: int, replacement: bool = False, *, generator: Generator | None = None
) -> Any:
    """Indices (int64) drawn with the weights in `input` (n) or (rows, n). Source: torch."""
    need_whole("multinomial", input)
    return make(source_of(generator).multinomial(input._data, num_samples, replacement))


# --- in place ------------------------------------------------------------------------------------


def _fill(self: Any, draw: Callable[[], np.ndarray]) -> Any:
    """Write what is drawn; a tensor that is part of a graph gets no gradient through it.

    For a tensor without values nothing is drawn.
    """
    if not self.is_meta:
        put(self, ..., draw(), part=False)
    return self


def uniform_(self: Any, a: float = 0, b: float = 1, *, generator: Generator | None = None) -> Any:
    """Fill with uniform numbers in [a, b). Source: torch.Tensor.uniform_."""
    source = source_of(generator)
    return _fill(self, lambda: source.uniform(tuple(self.shape), self.dtype, a, b))


def normal_(
    self: Any, mean: float = 0, std: float = 1, *, generator: Generator | None = None
) -> Any:
    """Fill with normal numbers. Source: torch.Tensor.normal_."""
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    source = source_of(generator)
    return _fill(self, lambda: source.normal(tuple(self.shape), self.dtype, mean, std))


def exponential_(self: Any, lambd: float = 1, *, generator: Generator | None = None) -> Any:
    """Fill with exponential numbers of rate `lambd`. Source: torch.Tensor.exponential_."""
    source = source_of(generator)
    return _fill(self, lambda: source.exponential(tuple(self.shape), self.dtype, lambd))


def bernoulli_(self: Any, p: Any = 0.5, *, generator: Generator | None = None) -> Any:
    """Fill with 0 and 1 of probability p (a number). Source: torch.Tensor.bernoulli_."""
    source, kind = source_of(generator), self._data.dtype
    return _fill(self, lambda: source.bernoulli(p, tuple(self.shape)).astype(kind, copy=False))


def random_(
    self: Any, low: int | None = None, high: int | None = None, *,
    generator: Generator | None = None,
) -> Any:  # fmt: skip
    """Fill with integers: in [low, high), in [0, low), or over the dtype's range. Source: torch."""
    source = source_of(generator)
    if low is None:
        return _fill(self, lambda: source.random(tuple(self.shape), self.dtype))
    start, stop = (0, low) if high is None else (low, high)
    return _fill(self, lambda: source.randint(start, stop, tuple(self.shape), self.dtype))
