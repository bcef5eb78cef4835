"""Plans as bytes: everything comes back as it was, and nothing else can be made of them."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed.checkpoint import _plain, metadata, planner

SIZE = torch.Size([2, 3])
CHUNK = metadata.ChunkStorageMetadata(torch.Size([0, 0]), SIZE)
INDEX = metadata.MetadataIndex("a.b", torch.Size([0, 0]))
ITEM = planner.WriteItem(
    INDEX,
    planner.WriteItemType.SHARD,
    tensor_data=planner.TensorWriteData(CHUNK, metadata.TensorProperties(torch.float32), SIZE),
)
DATA = {
    "a": (1, [2, (3,)], -(2**80)),
    INDEX: None,
    "n": np.float32(2),
    "s": {1, 2},
    "e": {},
    3: b"",
}


@pytest.mark.parametrize(
    "value",
    [
        planner.SavePlan([ITEM], storage_data=("x", 1.5), planner_data=({"k": ("k", 0)}, {})),
        [metadata.Metadata({"a.b": metadata.BytesStorageMetadata()}, planner_data=DATA)],
        (planner.LoadItemType.BYTE_IO, SIZE, torch.int8),
    ],
)
def test_comes_back_as_it_was(value):
    back = _plain.decode(_plain.encode(value))
    assert back == value
    assert repr(back) == repr(value)  # tuples as tuples, sizes as sizes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (["Popen", "x"], "a rank sent a 'Popen', which is no part of a plan"),
        (["WriteItemType", "NO"], "NO"),
        (["SavePlan"], "missing 1 required positional argument"),
        ([], "not enough values"),
        ([["SavePlan"]], "unhashable"),
        ([9], "a rank sent a 9"),
        (3, "cannot unpack non-iterable int"),
    ],
)
def test_what_is_malformed_is_refused(content, reason):
    with pytest.raises(ValueError, match=f"malformed plan from another rank: .*{reason}"):
        _plain.decode(msgpack.packb({_plain._TAG: content}))


def test_what_cannot_travel_is_named():
    with pytest.raises(TypeError, match=r"a builtins.object cannot be sent to other ranks"):
        _plain.encode([object()])
