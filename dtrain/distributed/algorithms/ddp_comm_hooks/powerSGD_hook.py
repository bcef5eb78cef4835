"""PowerSGD: gradients as products of two thin matrices, which are all that is sent.

A gradient M (n x m) is sent as P (n x r) and Q (m x r): P is the mean of M Q over ranks, with
orthonormal columns; Q the mean of M^T P; the result is P Q^T. Q of the last pass is where the next
one starts (warm start: power iteration over steps), and what P Q^T misses on this rank is added to
its next gradient (error feedback).

Source: Vogels, Karimireddy, Jaggi, PowerSGD, NeurIPS 2019, algorithms 1 and 2; names and defaults
of torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook. Unlike torch's, the error is what this
rank did not send (line 8 of algorithm 2; torch's also holds the distance to the other ranks'
gradients, which cancels in the mean but grows); what is kept is kept by parameter, so that buckets
may be rebuilt and `start_powerSGD_iter` may be 0; small gradients and all P share one all-reduce.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.default_hooks import mean
from dtrain.distributed.algorithms.ddp_comm_hooks.gathered import (
    Array,
    Residuals,
    elements,
    flat,
    spread,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import Payload, Stages, sends, staged
from dtrain.tensor import Tensor

_log = logging.getLogger(__name__)


class PowerSGDState:
    """What the PowerSGD hooks keep between calls, and how they compress.

    process_group               the ranks that share the model; None: the default group
    matrix_approximation_rank   r: columns of P and Q
    start_powerSGD_iter         backward passes that send everything before compression starts
    min_compression_rate        compress a gradient only if (n + m) r times this is below n m
    use_error_feedback, warm_start   see above
    orthogonalization_epsilon   0: QR; above: Gram-Schmidt that adds it to norms
    random_seed                 of the first Q; the same on all ranks
    compression_stats_logging_frequency   passes between two lines in the log
    batch_tensors_with_same_shape    multiply gradients of one shape in one call
    """

    def __init__(
        self,
        process_group: Any,
        matrix_approximation_rank: int = 1,
        start_powerSGD_iter: int = 1000,
        min_compression_rate: float = 2,
        use_error_feedback: bool = True,
        warm_start: bool = True,
        orthogonalization_epsilon: float = 0,
        random_seed: int = 0,
        compression_stats_logging_frequency: int = 10_000,
        batch_tensors_with_same_shape: bool = False,
    ) -> None:
        if matrix_approximation_rank < 1:
            raise ValueError(
                f"matrix_approximation_rank must be positive, got {matrix_approximation_rank}"
            )
        self.process_group = process_group
        self.matrix_approximation_rank = matrix_approximation_rank
        self.start_powerSGD_iter = start_powerSGD_iter
        self.min_compression_rate = min_compression_rate
        self.use_error_feedback = use_error_feedback
        self.warm_start = warm_start
        self.orthogonalization_epsilon = orthogonalization_epsilon
        self.rng = np.random.RandomState(random_seed)
        self.compression_stats_logging_frequency = max(1, compression_stats_logging_frequency)
        self.batch_tensors_with_same_shape = batch_tensors_with_same_shape
        self.residuals = Residuals()
        self.q_memory: dict[Any, Array] = {}  # {parameter: Q}, {bucket index: Q} when batched
        self.iter = 0
        self.total_numel_before_compression = 0
        self.total_numel_after_compression = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the group: give `process_group` again after loading."""
        return {**self.__dict__, "process_group": None}

    def maybe_increase_iter(self, bucket: Any) -> None:
        """Count a backward pass when its last bucket is here; log what has been saved."""
        if not bucket.is_last():
            return
        self.iter += 1
        passes = self.iter - self.start_powerSGD_iter
        if passes > 0 and passes % self.compression_stats_logging_frequency == 0:
            rate, before, after = self.compression_stats()
            _log.info("PowerSGD: %d of %d elements sent, compression %.1f", after, before, rate)

    def compression_stats(self) -> tuple[float, int, int]:
        """(before / after, before, after): elements since compression started."""
        before, after = self.total_numel_before_compression, self.total_numel_after_compression
        return (before / after if after else 0.0), before, after

    def rank_of(self, n: int, m: int) -> int:
        """Columns of P and Q for an n x m gradient."""
        return min(n, m, self.matrix_approximation_rank)

    def compresses(self, gradient: Tensor) -> bool:
        """Whether a gradient is worth it."""
        n, m = _matrix(gradient._data).shape
        return (n + m) * self.matrix_approximation_rank * self.min_compression_rate < n * m

    def first_q(self, key: Any, m: int, r: int, dtype: np.dtype[Any]) -> Array:
        """Where the power iteration starts: the last Q, or random orthonormal columns."""
        held = self.q_memory.get(key) if self.warm_start else None
        if held is not None and held.shape == (m, r):
            return held
        return orthogonalize(self.rng.standard_normal((m, r)).astype(dtype), 0)

    def __repr__(self) -> str:
        return (
            f"PowerSGDState(rank {self.matrix_approximation_rank}, from pass "
            f"{self.start_powerSGD_iter}, error feedback {self.use_error_feedback}, warm start "
            f"{self.warm_start})"
        )


def _matrix(array: Array) -> Array:
    """A gradient as a matrix: its first dimension against all others."""
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(-1, 1)


def orthogonalize(matrices: Array, epsilon: float) -> Array:
    """Orthonormal columns with the span of the columns of each matrix (..., n, r), n >= r.

    `epsilon` 0: QR. Above: Gram-Schmidt, each norm plus `epsilon`, so that a column of zeros stays
    one instead of becoming a direction that nothing points to.
    """
    if epsilon == 0:
        return np.linalg.qr(matrices)[0]
    out = matrices.copy()
    for i in range(out.shape[-1]):
        column = out[..., i]
        column /= np.linalg.norm(column, axis=-1, keepdims=True) + epsilon
        rest = out[..., i + 1 :]
        rest -= column[..., None] * (column[..., None, :] @ rest)
    return out


def _payload(state: PowerSGDState, bucket: Any) -> Payload:
    buffer = bucket.buffer()
    if state.iter < state.start_powerSGD_iter:
        return Payload(all_reduce=buffer.nbytes)
    numel = 0
    for gradient in bucket.gradients():
        n, m = _matrix(gradient._data).shape
        numel += (n + m) * state.rank_of(n, m) if state.compresses(gradient) else n * m
    return Payload(all_reduce=numel * buffer.element_size())


@sends(_payload)
def powerSGD_hook(state: PowerSGDState, bucket: Any) -> Future[Tensor]:
    """Reduce the bucket's gradients as products P Q^T: (n + m) r elements for an n x m gradient.

    Vectors and gradients not worth it are reduced as they are, and so is everything in the first
    `state.start_powerSGD_iter` passes. Two all-reduces a bucket.
    """
    if state.iter < state.start_powerSGD_iter:
        state.maybe_increase_iter(bucket)
        return mean(bucket.buffer(), state.process_group)
    return _power_iteration(state, bucket)


@staged
def _power_iteration(state: PowerSGDState, bucket: Any) -> Stages:
    small, blocks = _sorted_out(state, bucket)
    state.maybe_increase_iter(bucket)
    dtype = bucket.buffer()._data.dtype

    first = [*small, *(block.matrices @ block.q for block in blocks)]
    reduced = yield mean(_joined(first, dtype), state.process_group)
    first = _parts(reduced, first)
    for gradient, value in zip(small, first, strict=False):
        gradient[...] = value

    for block, p in zip(blocks, first[len(small) :], strict=True):
        block.p = orthogonalize(p, state.orthogonalization_epsilon)
        block.q = _as_sent(block.matrices.swapaxes(-1, -2) @ block.p, dtype)
    if blocks:
        sent = [block.q for block in blocks]
        future = mean(_joined(sent, dtype), state.process_group)
        for block in blocks:  # while the others' come in
            block.keep_error(state)
        for block, q in zip(blocks, _parts((yield future), sent), strict=True):
            block.finish(state, q)
    bucket.buffer()._bump_version()
    return bucket.buffer()


class _Block:
    """Gradients of one shape that are multiplied together: a stack of matrices (b, n, m)."""

    def __init__(self, members: list[tuple[Any, Array]], state: PowerSGDState) -> None:
        self.parameters = [parameter for parameter, _ in members]
        self.gradients = [_matrix(gradient) for _, gradient in members]
        self.matrices = np.stack([_matrix(state.residuals.plus(*member)) for member in members])
        _, n, m = self.matrices.shape
        r = state.rank_of(n, m)
        self.q = np.stack([state.first_q(p, m, r, self.matrices.dtype) for p in self.parameters])
        self.p = self.q  # until there is one

    def saved(self) -> int:
        """How many elements are not sent."""
        count, n, m = self.matrices.shape
        return count * (n * m - (n + m) * self.q.shape[-1])

    def keep_error(self, state: PowerSGDState) -> None:
        """What P times this rank's own Q misses of its gradients."""
        if state.use_error_feedback:
            missed = self.matrices - self.p @ self.q.swapaxes(-1, -2)
            for parameter, left in zip(self.parameters, missed, strict=True):
                state.residuals.keep(parameter, left)

    def finish(self, state: PowerSGDState, q: Array) -> None:
        """Put the product where the gradients were."""
        for i, (parameter, gradient) in enumerate(
            zip(self.parameters, self.gradients, strict=True)
        ):
            gradient[...] = self.p[i] @ q[i].T
            if state.warm_start:
                state.q_memory[parameter] = q[i]


def _sorted_out(state: PowerSGDState, bucket: Any) -> tuple[list[Array], list[_Block]]:
    """The gradients that are sent as they are, and the others in blocks; counts elements."""
    small: list[Array] = []
    members: defaultdict[Any, list[tuple[Any, Array]]] = defaultdict(list)
    for i, (parameter, gradient) in enumerate(
        zip(bucket.parameters(), bucket.gradients(), strict=True)
    ):
        if not state.compresses(gradient):
            small.append(gradient._data)
            continue
        key = gradient._data.shape if state.batch_tensors_with_same_shape else i
        members[key].append((parameter, gradient._data))
    blocks = [_Block(block, state) for block in members.values()]
    before = sum(gradient.numel() for gradient in bucket.gradients())
    state.total_numel_before_compression += before
    state.total_numel_after_compression += before - sum(block.saved() for block in blocks)
    return small, blocks


def _joined(arrays: list[Array], dtype: np.dtype[Any]) -> Tensor:
    """All elements in one flat tensor, in the dtype that is sent."""
    parts = [array.reshape(-1) for array in arrays]
    joined: Tensor = make(np.concatenate(parts).astype(dtype, copy=False))
    return joined


def _as_sent(array: Array, dtype: np.dtype[Any]) -> Array:
    """Rounded to the dtype that is sent, in the dtype to compute in."""
    return array.astype(dtype, copy=False).astype(array.dtype, copy=False)


def _parts(flat: Tensor, like: list[Array]) -> list[Array]:
    """The arrays that were joined, in the shapes and dtypes of `like`."""
    ends = np.cumsum([array.size for array in like])[:-1]
    pieces = zip(np.split(flat._data, ends), like, strict=True)
    return [piece.reshape(array.shape).astype(array.dtype, copy=False) for piece, array in pieces]


def _side(numel: int) -> int:
    """Of the smallest square that holds `numel` elements."""
    return math.isqrt(max(0, numel - 1)) + 1


def _batched_payload(state: PowerSGDState, bucket: Any) -> Payload:
    buffer = bucket.buffer()
    if state.iter < state.start_powerSGD_iter:
        return Payload(all_reduce=buffer.nbytes)
    side = _side(elements(bucket))
    return Payload(all_reduce=2 * side * state.rank_of(side, side) * buffer.element_size())


@sends(_batched_payload)
def batched_powerSGD_hook(state: PowerSGDState, bucket: Any) -> Future[Tensor]:
    """Reduce the whole bucket as one square matrix: 2 r sqrt(n) elements for n.

    Faster than `powerSGD_hook` and less accurate: rows of the square have no meaning.
    """
    if state.iter < state.start_powerSGD_iter:
        state.maybe_increase_iter(bucket)
        return mean(bucket.buffer(), state.process_group)
    return _square_iteration(state, bucket)


@staged
def _square_iteration(state: PowerSGDState, bucket: Any) -> Stages:
    values = flat(bucket, state.residuals)
    dtype, side = bucket.buffer()._data.dtype, _side(values.size)
    square = np.zeros((side, side), values.dtype)
    square.reshape(-1)[: values.size] = values
    key, r = (bucket.index(), side), state.rank_of(side, side)
    q = state.first_q(key, side, r, square.dtype)
    state.total_numel_before_compression += values.size
    state.total_numel_after_compression += 2 * side * r
    state.maybe_increase_iter(bucket)

    p = square @ q
    (p,) = _parts((yield mean(_joined([p], dtype), state.process_group)), [p])
    p = orthogonalize(p, state.orthogonalization_epsilon)
    q = _as_sent(square.T @ p, dtype)
    future = mean(_joined([q], dtype), state.process_group)
    if state.use_error_feedback:
        state.residuals.keep_all(bucket, (square - p @ q.T).reshape(-1)[: values.size])
    (q,) = _parts((yield future), [q])
    if state.warm_start:
        state.q_memory[key] = q
    return spread(bucket, (p @ q.T).reshape(-1)[: values.size])
