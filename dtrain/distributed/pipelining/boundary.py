"""Between two neighbouring stages: activations go one way, gradients come back.

Rules: 1. Before the first microbatch of a step the upper stage announces what it will send (shapes,
dtypes, whether a gradient is wanted) and what the step is, which must be the lower one's, too: one
message of `ANNOUNCED` bytes. When microbatches have different sizes it announces each.
2. Then each tensor is one message of its own size, in order, and so is each gradient: nothing is
sent for tensors that want none.
3. A send does not wait for the receiver; at most `AHEAD` sends of a rank to a neighbour are left to
finish by themselves.
4. Stages on one rank hand over by reference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

import numpy as np

from dtrain.autograd.node import make
from dtrain.distributed.codec import decode, encode
from dtrain.distributed.point_to_point import irecv, isend
from dtrain.distributed.work import Work
from dtrain.distributed.world import ProcessGroup
from dtrain.dtypes import dtype, uint8
from dtrain.ops.create import empty
from dtrain.tensor import Tensor

ANNOUNCED = 1024
AHEAD = 2


class PipeliningShapeError(RuntimeError):
    """A stage's output is not what it announced. Source: torch's error of this name."""


class TensorMeta(NamedTuple):
    """What a tensor between two stages is like."""

    shape: tuple[int, ...]
    dtype: dtype
    requires_grad: bool

    def __str__(self) -> str:
        grad = ", with gradient" if self.requires_grad else ""
        return f"{self.dtype}{list(self.shape)}{grad}"


def metas_of(tensors: Sequence[Tensor]) -> list[TensorMeta]:
    """What each of `tensors` is like."""
    return [TensorMeta(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors]


class Boundary:
    """The boundary behind stage `stage`, for the rank of that stage, of the next, or of both.

    `peer`: the other rank in `group`; this one when both stages are here. `waited`: seconds spent
    waiting for what comes, in all.
    """

    def __init__(self, group: ProcessGroup, stage: int, peer: int) -> None:
        self._group, self._stage, self._peer = group, stage, peer
        self._here = peer == group.rank()
        self._handed: dict[int, deque[list[Tensor]]] = {way: deque() for way in _WAYS}
        self._sending: deque[Work] = deque()
        self.waited = 0.0
        self.begin("")

    def begin(self, plan: str) -> None:
        """A step begins; `plan` says which, in words that must be equal on both sides."""
        self._plan = plan
        self._announced: list[TensorMeta] | None = None
        self._expected: list[TensorMeta] | None = None
        self._uniform = False

    def send(self, outputs: Sequence[Tensor], uniform: bool) -> None:
        """Send a microbatch's activations; `uniform`: all of this step have the same sizes.

        PipeliningShapeError when they have not.
        """
        metas = metas_of(outputs)
        if self._announced is None or not uniform:
            self._announced = metas
            self._put(_TOLD, [_announcement(metas, uniform, self._plan, self._stage)])
        elif metas != self._announced:
            raise PipeliningShapeError(
                f"the output of stage {self._stage} is {_listed(metas)}, but for an earlier "
                f"microbatch with inputs of the same sizes it was {_listed(self._announced)}: pad "
                "it, or give every stage inputs that differ (then each is announced)"
            )
        self._put(_FORWARD, outputs)

    def receive(self) -> tuple[list[Tensor], bool]:
        """A microbatch's activations, leaves that require a gradient where one is wanted; and
        whether all microbatches of the step are alike.

        ValueError when the stage before makes another step than this one.
        """
        if self._expected is None or not self._uniform:
            (told,) = self._take(_TOLD, [_ANNOUNCEMENT])
            plan, self._uniform, self._expected = _announced(told)
            if plan != self._plan:
                raise ValueError(
                    f"stage {self._stage} makes a step of {plan}, but stage {self._stage + 1} one "
                    f"of {self._plan}: all ranks must call the same of step() and eval(), with the "
                    "same n_microbatches, and give loss_fn or not"
                )
        found = self._take(_FORWARD, self._expected)
        for tensor, meta in zip(found, self._expected, strict=True):
            tensor.requires_grad_(meta.requires_grad)
        return found, self._uniform

    def send_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Send back the gradients of those activations of a microbatch that want one."""
        self._put(_BACKWARD, gradients)

    def receive_gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of `outputs`, all of which want one."""
        return self._take(_BACKWARD, metas_of(outputs))

    def finish(self) -> None:
        """A step ends: wait until what was sent has left."""
        while self._sending:
            self._sending.popleft().wait()

    def _put(self, way: int, tensors: Sequence[Tensor]) -> None:
        plain = [tensor.detach() for tensor in tensors]
        if self._here:
            self._handed[way].append(plain)
            return
        tag = _tag(self._stage, way)
        for tensor in plain:
            self._sending.append(isend(tensor, group=self._group, group_dst=self._peer, tag=tag))
        while len(self._sending) > AHEAD:
            self._sending.popleft().wait()

    def _take(self, way: int, metas: Sequence[TensorMeta]) -> list[Tensor]:
        if self._here:
            return self._handed[way].popleft()
        found = [empty(meta.shape, dtype=meta.dtype) for meta in metas]
        tag, begun = _tag(self._stage, way), monotonic()
        works = [irecv(t, group=self._group, group_src=self._peer, tag=tag) for t in found]
        for work in works:
            work.wait()
        self.waited += monotonic() - begun
        return found


# Ways that messages go; each has a tag for every boundary, beyond what programs usually choose.
# (MPI promises tags up to 32,767.)
_FORWARD, _BACKWARD, _TOLD = _WAYS = range(3)
_TAGS = 20_000

_ANNOUNCEMENT = TensorMeta((ANNOUNCED,), uint8, False)


def _tag(stage: int, way: int) -> int:
    return _TAGS + len(_WAYS) * stage + way


def _listed(metas: Sequence[TensorMeta]) -> str:
    return "(" + ", ".join(map(str, metas)) + ")"


def _announcement(metas: Sequence[TensorMeta], uniform: bool, plan: str, stage: int) -> Tensor:
    body = encode([plan, uniform, [tuple(meta) for meta in metas]])
    if len(body) + 2 > ANNOUNCED:
        raise ValueError(
            f"stage {stage} has {len(metas)} outputs: to describe them takes {len(body)} bytes of "
            f"{ANNOUNCED - 2}. Join some of them"
        )
    array = np.zeros(ANNOUNCED, np.uint8)
    array[: len(body) + 2] = np.frombuffer(len(body).to_bytes(2, "little") + body, np.uint8)
    return make(array)  # type: ignore[no-any-return]


def _announced(told: Tensor) -> tuple[str, bool, list[TensorMeta]]:
    """What an announcement says."""
    body = told._data.tobytes()
    plan, uniform, metas = decode(body[2 : 2 + int.from_bytes(body[:2], "little")])
    return plan, uniform, [TensorMeta(tuple(shape), kind, grad) for shape, kind, grad in metas]
