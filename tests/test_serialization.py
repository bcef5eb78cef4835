"""save and load: PyTorch's files, sharing, what is refused, and files that are never half there.

The oracle is PyTorch: files it wrote (recorded) must load as the same objects, and what we write
must be opcode for opcode what it writes, so that it can read it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
import pickletools
import stat
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dtrain
from dtrain import nn
from dtrain.serialization import archive, files
from tests.checkpoint_cases import CASES
from tests.recorded import load_json

PLAIN = [name for name in CASES if name != "whole_module"]
PARTS = [nn.Sequential, nn.Linear, nn.ReLU, nn.LayerNorm, nn.Dropout]


def from_torch(name: str) -> bytes:
    """The file that PyTorch wrote for a case."""
    return base64.b64decode(load_json("checkpoints")[name])


def saved(value: object) -> bytes:
    file = io.BytesIO()
    dtrain.save(value, file)
    return file.getvalue()


def loaded(content: bytes, **options: object) -> object:
    return dtrain.load(io.BytesIO(content), **options)


def records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def rebuilt(content: bytes, compression: int = zipfile.ZIP_STORED, **changes: object) -> bytes:
    """The same archive with records replaced (None: left out); `data_pkl` stands for data.pkl."""
    parts = records(content)
    parts |= {name.replace("_pkl", ".pkl"): value for name, value in changes.items()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, value in parts.items():
            if value is not None:
                out.writestr(f"archive/{name}", value)
    return file.getvalue()


def opcodes(content: bytes) -> list[tuple[str, object]]:
    pickled = records(content)["data.pkl"]
    return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]


def same(a: object, b: object) -> bool:
    """Equal in value, type, dtype, shape and requires_grad, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dtrain.Tensor):
        alike = (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
        return alike and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# --- PyTorch's files and ours --------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_what_pytorch_wrote_is_read(name):
    assert same(loaded(from_torch(name)), CASES[name](dtrain))


@pytest.mark.parametrize("name", PLAIN)
def test_what_pytorch_wrote_is_read_from_a_mapped_file(name, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(from_torch(name))
    assert same(dtrain.load(path, mmap=True), CASES[name](dtrain))


@pytest.mark.parametrize("name", PLAIN)
def test_we_write_the_opcodes_and_records_that_pytorch_writes(name):
    ours, theirs = saved(CASES[name](dtrain)), from_torch(name)
    assert opcodes(ours) == opcodes(theirs)
    expected = records(theirs)
    del expected[".data/serialization_id"]  # a hash that nothing reads
    assert records(ours) == expected


def test_records_are_aligned_and_equal_contents_are_equal_files():
    content = saved(CASES["every_dtype"](dtrain))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        for info in file.infolist():
            names = len(info.filename) + int.from_bytes(
                content[info.header_offset + 28 : info.header_offset + 30], "little"
            )
            assert (info.header_offset + 30 + names) % archive.ALIGNMENT == 0
            assert info.compress_type == zipfile.ZIP_STORED
    assert content == saved(CASES["every_dtype"](dtrain))


def test_metadata_of_a_state_dict_is_kept():
    state = loaded(from_torch("state_dict"))
    assert state._metadata["1"] == {"version": 2}
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"


# --- whole modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [from_torch("whole_module"), None], ids=["torch's", "ours"])
def test_a_whole_module_needs_trust_or_an_allow_list(content):
    model = CASES["whole_module"](dtrain)
    content = content or saved(model)
    x = dtrain.ones(2, 2)
    with pytest.raises(pickle.UnpicklingError, match=r"torch.nn.modules.container.Sequential"):
        loaded(content)
    with dtrain.serialization.safe_globals(PARTS):
        allowed = loaded(content)
        assert set(dtrain.serialization.get_safe_globals()) == set(PARTS)
    assert dtrain.serialization.get_safe_globals() == []
    trusted = loaded(content, weights_only=False)
    for module in (allowed, trusted):
        assert type(module) is nn.Sequential
        assert np.array_equal(module.eval()(x).detach(), model.eval()(x).detach())
        assert len(list(module.parameters())) == 4


def test_safe_globals_by_name_and_cleared():
    dtrain.serialization.add_safe_globals([(nn.ReLU, "elsewhere.Relu")])
    data = pickle.dumps(OrderedDict(), 2).replace(b"collections\nOrderedDict", b"elsewhere\nRelu")
    assert isinstance(loaded(rebuilt(saved(0), data_pkl=data)), nn.ReLU)
    dtrain.serialization.clear_safe_globals()
    with pytest.raises(pickle.UnpicklingError, match="elsewhere"):
        loaded(rebuilt(saved(0), data_pkl=data))


class OfMine:
    def __init__(self):
        self.x = 1


def test_a_class_of_ones_own_is_pickled_by_its_name():
    back = loaded(saved({"mine": OfMine()}), weights_only=False)
    assert back["mine"].x == 1
    with dtrain.serialization.safe_globals([OfMine]):
        assert loaded(saved(OfMine())).x == 1


# --- sharing -------------------------------------------------------------------------------------

SLICES = st.tuples(
    st.integers(0, 3), st.integers(4, 8), st.sampled_from([1, 2, 3, -1, -2])
).map(lambda t: slice(t[0], t[1], t[2]) if t[2] > 0 else slice(t[1], t[0], t[2]))  # fmt: skip
DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool", "uint16"])


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=DTYPES,
    cuts=st.lists(SLICES, max_size=4),
    swap=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_view_of_any_array_comes_back(shape, dtype, cuts, swap):
    whole = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    part = whole[(*cuts[: whole.ndim], ...)]
    part = part.T if swap else part
    value = [dtrain.from_numpy(part), dtrain.from_numpy(whole)]
    back = loaded(saved(value))
    assert same(back, value)
    if part.size and dtype in ("float32", "float64"):  # in which these sums are exact
        before = back[1].sum().item()
        back[0].fill_(0)
        shared = min(part.strides, default=0) >= 0  # PyTorch has no views that run backwards
        assert (back[1].sum().item() == before) == (not shared or part.sum() == 0)


def test_tied_weights_stay_tied():
    model = nn.Module()
    model.a = nn.Linear(3, 3)
    model.b = nn.Linear(3, 3)
    model.b.weight = model.a.weight
    state = loaded(saved(model.state_dict()))
    state["a.weight"].fill_(7)
    assert (state["b.weight"] == 7).all()
    assert len([name for name in records(saved(model.state_dict())) if "data/" in name]) == 3
    whole = loaded(saved(model), weights_only=False)
    assert whole.a.weight is whole.b.weight


def test_a_mapped_file_is_not_changed_by_what_is_written_to_its_tensors(tmp_path):
    path = tmp_path / "w.pt"
    dtrain.save(dtrain.ones(100), path)
    before = path.read_bytes()
    dtrain.load(path, mmap=True).zero_()
    assert path.read_bytes() == before
    assert dtrain.load(path).sum() == 100


# --- what is refused -----------------------------------------------------------------------------


class Runs:
    """Unpickled by a pickle machine, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_does_not_run_unless_asked_for(tmp_path):
    content = saved(Runs(tmp_path / "ran"))
    with pytest.raises(pickle.UnpicklingError, match=r"^Weights only load failed\. .*mkdir"):
        loaded(content)
    assert not (tmp_path / "ran").exists()
    loaded(content, weights_only=False)
    assert (tmp_path / "ran").exists()  # the file would have run it


REFUSED = {
    "another name": (b"cbuiltins\neval\n.", "builtins.eval was not an allowed global"),
    "a name of ours": (b"cdtrain.serialization\nload\n.", "dtrain.serialization.load"),
    "inst": (b"(ios\nsystem\n.", "Unsupported operand INST"),
    "obj": (b"(ctorch\nSize\no.", "Unsupported operand OBJ"),
    "extension": (b"\x82\x01.", "Unsupported operand EXT1"),
    "python 2 text": (b"S'a'\n.", "Unsupported operand STRING"),
    "call of a list": (b"])R.", "not an allowed global: "),
    "call of a dtype": (b"ctorch\nfloat32\n)R.", "not an allowed global: dtrain.float32"),
    "new of a tuple": (b"))\x81.", "not an allowed global"),
    "state of a class": (b"ccollections\nOrderedDict\n}b.", "Can only build"),
    "state of a function": (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "Can only build"),
    "append to a dict": (b"}K\x01a.", "Can only add to list"),
    "set item of a list": (b"]K\x00K\x01s.", "Can only add to dict"),
    "items of a class": (b"ctorch\nSize\n(K\x01e.", "Can only add to list"),
    "empty": (b".", "IndexError"),
    "no opcode": (b"\xff.", "Unsupported operand '\xff' at byte 2"),
    "no end": (b"N", "Unsupported operand '' at byte 3"),
    "cut off": (b"(X\x09\x00\x00\x00a", "malformed"),
    "no memo": (b"h\x05.", "KeyError"),
    "no storage": (b"K\x01Q.", "TypeError"),
    "a huge bytearray": (b"cbuiltins\nbytearray\n(\x8a\x08\0\0\0\0\0\0\0\x0ftR.", "malformed"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_pickle_that_is_no_plain_data_is_refused(data, reason):
    with pytest.raises(pickle.UnpicklingError, match=r"Weights only load failed\.") as caught:
        loaded(rebuilt(saved(0), data_pkl=b"\x80\x02" + data))
    assert reason in str(caught.value)


@given(position=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_damaged_pickle_is_refused_or_harmless(position, byte, cut):
    content = from_torch("views")
    data = bytearray(records(content)["data.pkl"])
    place = int(position * (len(data) - 1))
    data[place] = byte
    damaged = rebuilt(content, data_pkl=bytes(data[: place if cut else None]))
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError):  # anything else is a bug
        loaded(damaged)


@given(length=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_file_cut_short_is_refused(length):
    content = from_torch("state_dict")
    with pytest.raises(RuntimeError, match="PytorchStreamReader failed"):
        loaded(content[: int(length * (len(content) - 1))])


def test_flipped_bits_in_a_storage_are_noticed():
    content = bytearray(saved(dtrain.full((64,), 1.5)))
    content[content.index(np.float32(1.5).tobytes() * 4)] ^= 1
    with pytest.raises(RuntimeError, match=r"failed reading file data/0: Bad CRC-32"):
        loaded(bytes(content))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data_pkl": None}, "failed locating file data.pkl: file not found"),
        ({"data/0": None}, "failed locating file data/0: file not found"),
        ({"data/0": b"1234"}, r"storage 0 has 4 bytes, expected 12: the file is damaged"),
        ({"constants_pkl": b""}, "TorchScript archive"),
        ({"byteorder": b"big" if sys.byteorder == "little" else b"little"}, "other byte order"),
        ({"compression": zipfile.ZIP_DEFLATED}, "record byteorder is compressed"),
    ],
)
def test_an_archive_that_does_not_fit_is_refused(changes, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        loaded(rebuilt(saved(dtrain.ones(3)), **changes))


@pytest.mark.parametrize("offset_size_stride", [(10, 3, 1), (0, 13, 1), (0, 3, 6), (-1, 1, 1)])
def test_a_tensor_that_reaches_outside_its_storage_is_refused(offset_size_stride):
    from dtrain.serialization.portable import MEANINGS, REBUILD_TENSOR, Storage

    offset, size, stride = offset_size_stride
    storage = Storage("0", np.arange(12.0), dtrain.float64)
    with pytest.raises(RuntimeError, match="reaches outside its storage of 12 elements"):
        MEANINGS[REBUILD_TENSOR](storage, offset, (size,), (stride,), False, OrderedDict())


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"not a zip" * 100])
def test_what_is_no_archive_is_refused(content):
    with pytest.raises(RuntimeError, match="failed finding central directory"):
        loaded(content)


# --- devices -------------------------------------------------------------------------------------


def on_another_device() -> bytes:
    content = saved(dtrain.ones(2))
    data = records(content)["data.pkl"]
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    assert cpu in data
    return rebuilt(content, data_pkl=data.replace(cpu, cuda))


@pytest.mark.parametrize(
    "place", ["cpu", dtrain.device("cpu"), {"cuda:0": "cpu"}, lambda storage, location: storage]
)
def test_storages_of_another_device_are_brought_to_this_one(place):
    assert loaded(on_another_device(), map_location=place).tolist() == [1, 1]


@pytest.mark.parametrize("place", [None, {"cuda:1": "cpu"}, {"cuda:0": "cuda:1"}])
def test_storages_of_another_device_are_refused_without_a_place(place):
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on a cuda:"):
        loaded(on_another_device(), map_location=place)


def test_a_place_that_is_not_here_is_refused():
    with pytest.raises(RuntimeError, match="Expected one of cpu"):
        loaded(saved(dtrain.ones(2)), map_location="cuda")


# --- files ---------------------------------------------------------------------------------------


def test_saving_replaces_a_file_at_once_and_follows_links(tmp_path):
    path, link = tmp_path / "a.pt", tmp_path / "link.pt"
    path.write_bytes(b"before")
    link.symlink_to(path)
    dtrain.save({"x": 1}, link)
    assert link.is_symlink()
    assert dtrain.load(str(path)) == {"x": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "link.pt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_failed_save_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    dtrain.save(1, path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        dtrain.save({"x": dtrain.ones(3), "f": lambda: 0}, path)
    assert dtrain.load(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_file_takes_its_place_when_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os,
        "fsync",
        lambda fd: events.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or fsync(fd),
    )
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: events.append((a.parent, b)) or replace(a, b)
    )
    dtrain.save(1, tmp_path / "a.pt")
    assert events == [False, (tmp_path, tmp_path / "a.pt"), True]


def test_a_device_is_written_to_and_not_replaced():
    dtrain.save(dtrain.ones(3), os.devnull)
    assert not os.path.isfile(os.devnull)


def test_a_file_object_is_written_from_where_it_stands():
    file = io.BytesIO()
    file.write(b"header")
    dtrain.save([1, 2], file)
    assert file.getvalue().startswith(b"header")
    file.seek(0)
    assert dtrain.load(file) == [1, 2]


def test_wrong_arguments():
    with pytest.raises(AttributeError, match="expected 'f' to be string, path, or a file-like"):
        dtrain.save(1, 3)
    with pytest.raises(ValueError, match="f must be a file path in order to use the mmap"):
        dtrain.load(io.BytesIO(saved(1)), mmap=True)
    with pytest.raises(FileNotFoundError):
        dtrain.load("nonesuch.pt")
