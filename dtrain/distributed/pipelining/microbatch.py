"""Cutting a batch into microbatches and putting outputs together again.

Values may be nested in tuples, lists and dicts; a spec has the same nesting, or is one spec for all
below it. Without a spec tensors are cut along dimension 0 and everything else is given to each.
Source: torch.distributed.pipelining.microbatch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from dtrain.ops.join import cat, tensor_split
from dtrain.tensor import Tensor

DEFAULT_CHUNK_DIM = 0


class TensorChunkSpec:
    """Cut a tensor along dimension `split_dim`; in a merge, put chunks together along it."""

    def __init__(self, split_dim: int) -> None:
        self.split_dim = split_dim

    def __repr__(self) -> str:
        return f"TensorChunkSpec({self.split_dim})"

    @staticmethod
    def from_tuple(chunk_dims: tuple[int, ...]) -> tuple[TensorChunkSpec, ...]:
        """A spec for each of several arguments."""
        return tuple(TensorChunkSpec(dim) for dim in chunk_dims)

    @staticmethod
    def from_dict(chunk_dims: dict[str, int]) -> dict[str, TensorChunkSpec]:
        """A spec for each of several keyword arguments."""
        return {name: TensorChunkSpec(dim) for name, dim in chunk_dims.items()}


class _Replicate:
    """Give the whole value to every microbatch; in a merge, take that of the first."""


class _CustomReducer:
    """In a merge, fold the chunks: `reduce_fn(reduce_fn(init_value, first), second)` ..."""

    def __init__(self, init_value: Any, reduce_fn: Callable[[Any, Any], Any]) -> None:
        self.init_value, self.reduce_fn = init_value, reduce_fn


class _LossReducer(_CustomReducer):
    pass


sum_reducer = _LossReducer(0.0, operator.add)


def split_args_kwargs_into_chunks(
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    chunks: int,
    args_chunk_spec: Any = None,
    kwargs_chunk_spec: Any = None,
) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    """The arguments of each of `chunks` microbatches.

    Sizes are those of `tensor_split`: they differ by one at most. ValueError for a tensor that is
    too small, with its place. (PyTorch then makes fewer microbatches, and fails later.)
    """
    split_args = _split(tuple(args), args_chunk_spec, chunks, "args")
    split_kwargs = _split(dict(kwargs or {}), kwargs_chunk_spec, chunks, "kwargs")
    return split_args, split_kwargs


def _split(value: Any, spec: Any, chunks: int, where: str) -> list[Any]:
    """`value` of each microbatch."""
    if isinstance(value, (list, tuple)) and not isinstance(spec, _Replicate):
        specs = _specs(spec, list(range(len(value))), where)
        parts = [
            _split(v, s, chunks, f"{where}[{i}]")
            for i, (v, s) in enumerate(zip(value, specs, strict=True))
        ]
        return [_like(value, [part[i] for part in parts]) for i in range(chunks)]
    if isinstance(value, dict) and not isinstance(spec, _Replicate):
        specs = _specs(spec, list(value), where)
        named = {
            k: _split(v, s, chunks, f"{where}[{k!r}]")
            for (k, v), s in zip(value.items(), specs, strict=True)
        }
        return [{k: part[i] for k, part in named.items()} for i in range(chunks)]
    if isinstance(value, Tensor) and not isinstance(spec, _Replicate):
        return _split_tensor(value, spec or TensorChunkSpec(DEFAULT_CHUNK_DIM), chunks, where)
    return [value] * chunks


def _like(value: Any, parts: list[Any]) -> Any:
    return parts if isinstance(value, list) else tuple(parts)


def _specs(spec: Any, keys: Sequence[Any], where: str) -> list[Any]:
    """The spec of each part: its own, or the one for all."""
    if spec is None or isinstance(spec, TensorChunkSpec):
        return [spec] * len(keys)
    given = spec.keys() if isinstance(spec, dict) else range(len(spec))
    if set(given) != set(keys):
        raise ValueError(f"{where} has the parts {list(keys)}, but its spec has {list(given)}")
    return [spec[key] for key in keys]


def _split_tensor(tensor: Tensor, spec: Any, chunks: int, where: str) -> list[Any]:
    if not isinstance(spec, TensorChunkSpec):
        raise TypeError(f"{where}: expected a TensorChunkSpec, got {type(spec).__name__}")
    dim = spec.split_dim
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] < chunks:
        raise ValueError(
            f"{where}, a tensor of shape {tuple(tensor.shape)}, cannot be cut into {chunks} "
            f"microbatches along dimension {dim}: give a larger batch, a smaller n_microbatches, "
            "or another chunk spec"
        )
    return list(tensor_split(tensor, chunks, dim))


def sizes_of(value: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors in `value`, in order."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    if isinstance(value, dict):
        value = list(value.values())
    return [s for v in value for s in sizes_of(v)] if isinstance(value, (list, tuple)) else []


def merge_chunks(chunks: list[Any], chunk_spec: Any) -> Any:
    """The outputs of all microbatches as one: tensors joined along the dimension of their spec."""
    if not chunks:
        return chunk_spec
    return _merge(chunks, chunk_spec, "output")


def _merge(parts: list[Any], spec: Any, where: str) -> Any:
    first = parts[0]
    if isinstance(spec, _CustomReducer):
        return reduce(spec.reduce_fn, parts, spec.init_value)
    if isinstance(spec, _Replicate):
        return first
    if isinstance(first, (list, tuple)):
        specs = _specs(spec, list(range(len(first))), where)
        return _like(
            first, [_merge([p[i] for p in parts], s, f"{where}[{i}]") for i, s in enumerate(specs)]
        )
    if isinstance(first, dict):
        specs = _specs(spec, list(first), where)
        return {k: _merge([p[k] for p in parts], s, f"{where}[{k!r}]")
                for k, s in zip(first, specs, strict=True)}  # fmt: skip
    if isinstance(first, Tensor):
        return cat(parts, dim=(spec or TensorChunkSpec(DEFAULT_CHUNK_DIM)).split_dim)
    return first
