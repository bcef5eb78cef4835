"""Cutting batches and putting outputs together, against slices."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed.pipelining.microbatch import (
    TensorChunkSpec,
    _Replicate,
    merge_chunks,
    split_args_kwargs_into_chunks as split,
    sum_reducer,
)


def arrays(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_default_is_dimension_0_and_the_same_for_all_else():
    x = torch.arange(14).reshape(7, 2)
    args, kwargs = split((x, 3), {"mask": x.bool(), "mode": "a"}, 3)
    cuts = np.array_split(x.numpy(), 3)
    assert [a[0].tolist() for a in args] == [c.tolist() for c in cuts]
    assert [a[1] for a in args] == [3, 3, 3]
    assert [k["mask"].tolist() for k in kwargs] == [c.astype(bool).tolist() for c in cuts]
    assert [k["mode"] for k in kwargs] == ["a"] * 3
    assert split((), None, 2) == ([(), ()], [{}, {}])


def test_specs_and_nesting():
    x, y = torch.arange(8).reshape(2, 4), torch.arange(4)
    nested = {"a": [x, (y, "same")]}
    args, _ = split((nested, y), None, 2, ({"a": [TensorChunkSpec(1), None]}, _Replicate()))
    assert args[0][0]["a"][0].tolist() == [[0, 1], [4, 5]]
    assert arrays(args[1][0]["a"][1][0]) == [2, 3]
    assert args[1][0]["a"][1][1] == "same"
    assert args[0][1] is args[1][1] is y
    assert TensorChunkSpec.from_tuple((0, 1))[1].split_dim == 1
    _, kwargs = split((), {"x": x}, 2, None, TensorChunkSpec.from_dict({"x": 1}))
    assert kwargs[1]["x"].tolist() == [[2, 3], [6, 7]]


def test_merge_undoes_split():
    x = torch.arange(20).reshape(5, 4)
    for dim in (0, 1):
        spec = (TensorChunkSpec(dim), None)
        chunks, _ = split((x, [x]), None, 3, spec)
        merged = merge_chunks(chunks, spec)
        assert torch.equal(merged[0], x)
        assert torch.equal(merged[1][0], x)
    assert (
        merge_chunks([{"n": torch.ones(())}, {"n": torch.ones(())}], {"n": sum_reducer})["n"] == 2
    )
    assert merge_chunks([1, 2], _Replicate()) == 1


def test_what_cannot_be_cut():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"args\[1\], .* shape \(2, 3\), cannot be cut into 3"):
        split((1, x), None, 3)
    with pytest.raises(ValueError, match=r"kwargs\['m'\]\[0\].* along dimension 4"):
        split((), {"m": [x]}, 2, None, {"m": TensorChunkSpec(4)})
    with pytest.raises(ValueError, match=r"kwargs has the parts \['m'\], but its spec has \['k'\]"):
        split((), {"m": x}, 2, None, {"k": TensorChunkSpec(0)})
    with pytest.raises(TypeError, match="expected a TensorChunkSpec, got int"):
        split((x,), None, 2, (1,))
