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
from dtrain.generator import Generator
from dtrain.ops.create import finish, shape_of
from dtrain.ops.inplace import put
from dtrain.random import default_generator


def source_of(generator: Generator | None) -> Generator:
    """The generator to draw from."""
    return default_generator() if generator is None else generator


def _drawn(name: str, draw: Callable[..., np.ndarray]) -> tuple[Callable[..., Any], ...]:
    def factory(
        *size: Any, generator: Generator | None = None, dtype: dtypes.dtype | None = None,
        device: Any = None, requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        dtype = dtype or dtypes.get_default_dtype()
        return finish(draw(source_of(generator), shape_of(size), dtype), device, requires_grad)

    def like(
        input: Any, *, generator: Generator | None = None, dtype: dtypes.dtype | None = None,
        device: Any = None, requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        need_whole(f"{name}_like", input)
        kind = dtype or input.dtype
        return finish(draw(source_of(generator), input._data.shape, kind), device, requires_grad)

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
    drawn = source_of(generator).randint(low, high, shape_of((size,)), dtype)
    return finish(drawn, device, requires_grad)


def randperm(
    n: int, *, generator: Generator | None = None, dtype: dtypes.dtype = dtypes.int64,
    device: Any = None,
) -> Any:  # fmt: skip
    """A random permutation of 0..n-1. Source: torch.randperm."""
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


def _fill(self: Any, drawn: np.ndarray) -> Any:
    """Write drawn numbers; a tensor that is part of a graph gets no gradient through them."""
    put(self, ..., drawn, part=False)
    return self


def uniform_(self: Any, a: float = 0, b: float = 1, *, generator: Generator | None = None) -> Any:
    """Fill with uniform numbers in [a, b). Source: torch.Tensor.uniform_."""
    return _fill(self, source_of(generator).uniform(tuple(self.shape), self.dtype, a, b))


def normal_(
    self: Any, mean: float = 0, std: float = 1, *, generator: Generator | None = None
) -> Any:
    """Fill with normal numbers. Source: torch.Tensor.normal_."""
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    return _fill(self, source_of(generator).normal(tuple(self.shape), self.dtype, mean, std))


def exponential_(self: Any, lambd: float = 1, *, generator: Generator | None = None) -> Any:
    """Fill with exponential numbers of rate `lambd`. Source: torch.Tensor.exponential_."""
    return _fill(self, source_of(generator).exponential(tuple(self.shape), self.dtype, lambd))


def bernoulli_(self: Any, p: Any = 0.5, *, generator: Generator | None = None) -> Any:
    """Fill with 0 and 1 of probability p (a number). Source: torch.Tensor.bernoulli_."""
    drawn = source_of(generator).bernoulli(p, tuple(self.shape))
    return _fill(self, drawn.astype(self._data.dtype, copy=False))


def random_(
    self: Any, low: int | None = None, high: int | None = None, *,
    generator: Generator | None = None,
) -> Any:  # fmt: skip
    """Fill with integers: in [low, high), in [0, low), or over the dtype's range. Source: torch."""
    source = source_of(generator)
    if low is None:
        return _fill(self, source.random(tuple(self.shape), self.dtype))
    start, stop = (0, low) if high is None else (low, high)
    return _fill(self, source.randint(start, stop, tuple(self.shape), self.dtype))
