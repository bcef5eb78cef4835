"""The random number generator: torch's CPU stream, drawn with NumPy.

Rule 1: one seed gives PyTorch's numbers (2.13, CPU): the same words of MT19937, used in the same
    order. Normals of 16 and more differ in the last bits: their log, sin and cos are NumPy's.
Rule 2: draws are NumPy arrays; the ops above make tensors of them.
Rule 3: a generator belongs to one thread at a time.
On Intel processors PyTorch draws bernoulli_, dropout and exponential_ from MKL instead: there, and
only for those, its numbers are others.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import numpy as np

from dtrain import draws
from dtrain.device import device, on_cpu
from dtrain.draws import Array, Shape
from dtrain.dtypes import DTYPE_OF, bool_, dtype, finfo, float32, float64, iinfo, int64

_DEFAULT_SEED = 67280421310721  # torch's, for a Generator that was never seeded
_MASK24, _MASK53 = np.uint64(2**24 - 1), np.uint64(2**53 - 1)
_WORD = np.uint64(32)
_WIDE_RANGE = 1 << 28  # torch draws two words for integers from here on: less modulo bias
_LONG_PERMUTATION = (2**32 - 1) // 20

# torch's CPUGeneratorImplState, so that states can be exchanged with PyTorch.
_STATE = np.dtype(
    [
        ("seed", "<u8"),
        ("left", "<i4"),  # words before the next twist, plus one
        ("seeded", "<i4"),
        ("next", "<u8"),
        ("key", "<u8", 624),
        ("normal_x", "<f8"),
        ("normal_y", "<f8"),  # the kept second value of a pair of normals
        ("normal_rho", "<f8"),
        ("normal_is_valid", "<i8"),
        ("float_normal", "<f4"),
        ("float_normal_is_valid", "<i4"),
    ]
)


class Generator:
    """A stream of random numbers on the CPU (torch.Generator).

    Attribute: `device`. The drawing methods return new arrays of the dtype asked for.
    """

    __slots__ = ("_mt19937", "_second_normal", "_seed", "device")

    def __init__(self, device: str | device = "cpu") -> None:
        self.device = _as_device(device)
        self._mt19937 = np.random.MT19937(0)
        self.manual_seed(_DEFAULT_SEED)

    # --- seed and state ---

    def manual_seed(self, seed: int) -> Generator:
        """Restart the stream; the words depend on the low 32 bits alone. Returns self.

        A negative seed means seed + 2^64. ValueError outside [-2^63, 2^64).
        """
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise RuntimeError(f"manual_seed expected a long, but got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(
                f"Overflow when unpacking long long: the seed {seed} is outside [-2**63, 2**64)"
            )
        self._seed = int(seed) % 2**64
        np.random.RandomState(self._mt19937).seed(self._seed % 2**32)
        self._second_normal: float | None = None
        return self

    def seed(self) -> int:
        """Restart the stream from the operating system's entropy; returns the seed."""
        self.manual_seed(int.from_bytes(os.urandom(8), "little"))
        return self._seed

    def initial_seed(self) -> int:
        """The seed the stream was last restarted from, in [0, 2^64)."""
        return self._seed

    def get_state(self) -> Array:
        """The whole state: uint8[5056], byte for byte in torch's layout."""
        record = np.zeros(1, _STATE)
        engine = self._mt19937.state["state"]
        used = int(engine["pos"])
        record["seed"], record["seeded"], record["key"] = self._seed, 1, engine["key"]
        record["left"] = 625 - used
        record["next"] = used % 624
        if self._second_normal is not None:
            record["normal_y"], record["normal_is_valid"] = self._second_normal, 1
        return record.view(np.uint8)

    def set_state(self, new_state: Array | bytes) -> None:
        """Go on from a state of `get_state` (or of a CPU generator of PyTorch).

        TypeError unless uint8 or bytes; RuntimeError on a wrong size or an impossible state.
        """
        record = _state_record(new_state)
        left = int(record["left"])
        key = record["key"].astype(np.uint32)
        position = 624 if left == 1 else int(record["next"])
        self._mt19937.state = {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": position},
        }
        self._seed = int(record["seed"])
        self._second_normal = float(record["normal_y"]) if record["normal_is_valid"] else None

    def clone_state(self) -> Generator:
        """A new generator that will draw what this one would."""
        return _restored(self.get_state().tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.get_state().tobytes(),)

    # --- words: every draw below is made of these three ---

    def _u32(self, n: int) -> Array:
        """n words, in uint64."""
        words: Array = self._mt19937.random_raw(n)
        return words

    def _u64(self, n: int) -> Array:
        words = self._u32(2 * n)
        return (words[0::2] << _WORD) | words[1::2]

    def _f32(self, n: int) -> Array:
        """n float32 in [0, 1): the low 24 bits of a word."""
        out = (self._u32(n) & _MASK24).view(np.int64).astype(np.float32)
        out *= np.float32(2**-24)
        return out

    def _f64(self, n: int) -> Array:
        """n float64 in [0, 1): the low 53 bits of two words."""
        out = (self._u64(n) & _MASK53).view(np.int64).astype(np.float64)
        out *= 2.0**-53
        return out

    # --- continuous ---

    def uniform(
        self, shape: Shape, dtype: dtype = float32, low: float = 0.0, high: float = 1.0
    ) -> Array:
        """Uniform on [low, high) (rand, uniform_).

        float32 may round up to `high`, as in torch; float16 and bfloat16 then give `low`.
        """
        draws.require_floating(dtype, "check_uniform_bounds")
        draws.require_interval(low, high, dtype)
        if dtype is float64:
            return draws.fill(shape, dtype, lambda n: self._f64(n) * (high - low) + low)
        return draws.fill(shape, dtype, functools.partial(self._uniform32, dtype, low, high))

    def _uniform32(self, dtype: dtype, low: float, high: float, n: int) -> Array:
        span = np.float32(high) - np.float32(low)
        values = draws.multiply_add(self._f32(n), float(span), low)
        if dtype is float32:
            return values
        rounded = values.astype(dtype.numpy)
        rounded[rounded >= dtype.numpy.type(high)] = low
        return rounded

    def normal(
        self, shape: Shape, dtype: dtype = float32, mean: float = 0.0, std: float = 1.0
    ) -> Array:
        """Normal numbers (randn, normal_). Fewer than 16 come in pairs whose second is kept."""
        draws.require_floating(dtype, "normal_kernel_cpu")
        if not std >= 0:
            raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
        size = math.prod(shape)
        if size < 16:
            values = np.array(self._normal_pairs(size)) * std + mean
            return draws.narrow(values, dtype).astype(dtype.numpy).reshape(shape)
        return self._normal_blocks(size, dtype, mean, std).reshape(shape)

    def _normal_pairs(self, n: int) -> list[float]:
        out = [] if self._second_normal is None else [self._second_normal]
        missing = max(n - len(out), 0)
        uniforms = self._f64(missing + missing % 2).tolist()
        for turn, tail in zip(uniforms[0::2], uniforms[1::2], strict=True):
            radius, angle = math.sqrt(-2.0 * math.log1p(-tail)), 2.0 * math.pi * turn
            out += [radius * math.cos(angle), radius * math.sin(angle)]
        self._second_normal = out.pop() if len(out) > n else None
        return out

    def _normal_blocks(self, size: int, dtype: dtype, mean: float, std: float) -> Array:
        draw = self._f64 if dtype is float64 else self._f32

        def blocks(n: int) -> Array:
            return draws.multiply_add(draws.box_muller(draw(n)), std, mean)

        remainder = size % 16
        out = np.empty(size, dtype.numpy)
        draws.fill_into(out[: size - remainder], dtype, blocks)
        if remainder:
            # torch redraws the last 16; float32 and float64 were filled with uniforms before.
            if dtype in (float32, float64):
                draw(remainder)
            out[-16:] = blocks(16)
        return out

    def exponential(self, shape: Shape, dtype: dtype = float32, lambd: float = 1.0) -> Array:
        """Exponential numbers of rate `lambd` (exponential_)."""
        if not dtype.is_floating_point:
            raise RuntimeError(
                "Exponential distribution is a continuous probability distribution. dtype must be "
                f"a floating point but you specified {dtype.scalar_type}"
            )
        if not lambd > 0:
            raise RuntimeError(f"exponential_ expects lambda > 0.0, but found lambda={lambd}")
        return draws.fill(shape, dtype, lambda n: np.log1p(-self._f64(n)) * (-1.0 / lambd))

    # --- integers ---

    def randint(self, low: int, high: int, shape: Shape, dtype: dtype = int64) -> Array:
        """Integers of [low, high) in any dtype (randint, random_(from, to))."""
        if low >= high:
            raise RuntimeError(
                f"random_ expects 'from' to be less than 'to', but got from={low} >= to={high}"
            )
        draws.require_range(low, high, dtype)
        return draws.fill(shape, dtype, functools.partial(self._integers, low, high - low))

    def _integers(self, low: int, span: int, n: int) -> Array:
        words = self._u64(n) if span >= _WIDE_RANGE else self._u32(n)
        offsets = words if span == 2**64 else draws.modulo(words, span)
        return (offsets + np.uint64(low % 2**64)).view(np.int64)

    def random(self, shape: Shape, dtype: dtype = int64) -> Array:
        """Integers of [0, largest] (random_()); for floats, of [0, 2^mantissa bits]."""
        if dtype is bool_:
            top = 1
        elif dtype.is_floating_point:
            top = round(2 / finfo(dtype).eps)
        else:
            top = iinfo(dtype).max
        draw = self._u64 if dtype in (int64, float64) else self._u32
        return draws.fill(shape, dtype, lambda n: draws.modulo(draw(n), top + 1).view(np.int64))

    def randperm(self, n: int, dtype: dtype = int64) -> Array:
        """The numbers 0 .. n-1 in random order: a forward shuffle, one word a step.

        9 ms for 60,000, 0.1 s for 1,000,000 and 2 minutes for 214,748,364 and more, where torch's
        rule changes. RuntimeError for n negative or not exact in dtype.
        """
        if n < 0:
            raise RuntimeError(f"Trying to create tensor with negative dimension {n}: [{n}]")
        if dtype.is_floating_point and n > 2 / finfo(dtype).eps + 1:
            raise RuntimeError(
                f"n cannot be greater than {round(2 / finfo(dtype).eps) + 1} "
                f"for {dtype.scalar_type} type."
            )
        if not dtype.is_floating_point and n > 0:
            draws.require_range(0, n, dtype)
        if n >= _LONG_PERMUTATION:
            return draws.inside_out(n, self._u64).astype(dtype.numpy)
        steps = max(n - 1, 0)
        targets = (self._u32(steps) % np.arange(n, n - steps, -1, dtype=np.uint64)).view(np.int64)
        targets += np.arange(steps)
        return draws.shuffled(n, targets).astype(dtype.numpy, copy=False)

    # --- choices ---

    def bernoulli(self, p: float | Array, shape: Shape | None = None) -> Array:
        """True with probability p: bool[shape] for a number, bool[p.shape] for an array.

        A number and float64 arrays take two words an element, other floating arrays one.
        """
        if isinstance(p, np.ndarray):
            return self._bernoulli_each(p)
        if not 0 <= p <= 1:
            raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={p}")
        if shape is None:
            raise ValueError("bernoulli(p) with a number p needs a shape")
        return draws.fill(shape, bool_, lambda n: self._f64(n) < p)

    def _bernoulli_each(self, p: Array) -> Array:
        if p.dtype.kind in "iubc":
            raise NotImplementedError(f'"bernoulli_tensor_cpu_p_" not implemented for {p.dtype}')
        if not ((p >= 0) & (p <= 1)).all():
            raise RuntimeError(
                "Expected p_in >= 0 && p_in <= 1 to be true, but got false: "
                f"probabilities range from {p.min()} to {p.max()}"
            )
        if p.dtype == np.float64:
            return self._f64(p.size).reshape(p.shape) < p
        return self._f32(p.size).reshape(p.shape) < p.astype(np.float32)

    def dropout_mask(self, p: float, shape: Shape) -> Array:
        """bool[shape], True where dropout of rate p keeps. p of 0 and 1 draw nothing, as torch."""
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if p in (0, 1):
            return np.full(shape, p == 0)
        return self.bernoulli(1 - p, shape)

    def multinomial(self, probs: Array, num_samples: int, replacement: bool = False) -> Array:
        """Indices int64[..., num_samples] drawn by the weights in the rows of probs [n] or [m, n].

        Without replacement, indices of zero weight come last, the lower first (torch: any order).
        """
        draws.check_multinomial(probs, num_samples, replacement)
        if replacement and num_samples > 1:
            return self._multinomial_replaced(probs, num_samples)
        with np.errstate(divide="ignore", invalid="ignore"):  # an exponential may be 0
            race = probs / self.exponential(probs.shape, DTYPE_OF[probs.dtype])
        if num_samples == 1:
            return race.argmax(axis=-1, keepdims=True)
        return np.argsort(-race, axis=-1, kind="stable")[..., :num_samples]

    def _multinomial_replaced(self, probs: Array, num_samples: int) -> Array:
        cumulative = np.cumsum(probs, axis=-1, dtype=probs.dtype)
        cumulative /= cumulative[..., -1:]
        cumulative[..., -1] = 1
        rows = cumulative.reshape(-1, probs.shape[-1]).astype(np.float64)
        samples = [np.searchsorted(row, self._f64(num_samples)) for row in rows]
        return np.array(samples).reshape(*probs.shape[:-1], num_samples)


def _as_device(given: str | device) -> device:
    return on_cpu(given, "a Generator")


def _restored(state: bytes) -> Generator:
    generator = Generator()
    generator.set_state(state)
    return generator


def _state_record(new_state: Array | bytes) -> Any:
    raw = np.frombuffer(new_state, np.uint8) if isinstance(new_state, bytes) else new_state
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
        kind = getattr(raw, "dtype", type(raw).__name__)
        raise TypeError(f"RNG state must be a torch.ByteTensor (uint8), got {kind}")
    if raw.size != _STATE.itemsize:
        raise RuntimeError(
            f"Expected a CPUGeneratorImplState of size {_STATE.itemsize} but found the input RNG "
            f"state size to be {raw.size}"
        )
    record = np.ascontiguousarray(raw).reshape(-1).view(_STATE)[0]
    left, used = int(record["left"]), int(record["next"])
    exhausted = left == 1 and used in (0, 624)
    if record["seeded"] != 1 or not (exhausted or (1 <= used < 624 and left == 625 - used)):
        raise RuntimeError(f"Invalid mt19937 state: {left} words left after {used} used ones")
    return record
