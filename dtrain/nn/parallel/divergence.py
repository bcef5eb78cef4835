"""The sentinel: notices when replicas that should be equal are not.

Every pass that reduces, a part of the parameters is hashed, all of them once in `every` passes; the
hash of each rank travels in the tail of a bucket that is reduced anyway. When they differ all ranks
see it, exchange the hashes of that part's parameters one by one, and raise the same error.
Cost: the parameters are read once in `every` passes (CRC-32, about 3 GB/s); three numbers for each
rank in one bucket; no message as long as all is well.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.distributed.objects import all_gather_object
from dtrain.distributed.world import ProcessGroup
from dtrain.nn.parallel.buckets import Bucket

# Half a CRC-32: a float32 holds it exactly, and its mean over ranks well enough.
_HALF = 1 << 16

Piece = tuple[str, Any, int, int]  # name, parameter, first element, one behind the last


class Sentinel:
    """Hashes `named` parameters of this rank and compares them with those of the others.

    `every`: in how many passes all parameters have been looked at.
    """

    def __init__(self, named: Sequence[tuple[str, Any]], group: ProcessGroup, every: int) -> None:
        self._group = group
        self._parts = _cut(named, every)
        self._passes = 0
        self._bucket: Bucket | None = None  # the one that carries the hash of this pass
        self._part: list[Piece] = []

    def sign(self, buckets: Sequence[Bucket], taking_part: bool = True) -> None:
        """Put the hash of the next part into a bucket; before anything of the pass is submitted.

        A rank that takes no part in the pass only counts it.
        """
        self._bucket = next((b for b in buckets if b.words.dtype in (np.float32, np.float64)), None)
        if self._bucket is None:
            return
        self._part = self._parts[self._passes % len(self._parts)]
        self._passes += 1
        if not taking_part:
            return
        code = 0
        for piece in self._part:
            code = _hash(piece, code)
        self._bucket.words[self._group.rank()] = 1, code // _HALF, code % _HALF

    def compare(self, bucket: Bucket) -> None:
        """After the reduction of a bucket: RuntimeError on every rank when hashes differ in it.

        Ranks that take no part in the pass (see `Join`) have signed nothing.
        """
        if bucket is not self._bucket:
            return
        # As lists: with arrays these few numbers take 20 us a step, behind a cold cache.
        signed = [words for words in bucket.words.tolist() if words[0] > 0]
        if any(words != signed[0] for words in signed):
            raise RuntimeError(self._difference())

    def _difference(self) -> str:
        own = [_hash(piece, 0) for piece in self._part]
        everyone: list[Any] = [None] * self._group.size()
        all_gather_object(everyone, own, self._group)
        for (name, *_), codes in zip(self._part, zip(*everyone, strict=True), strict=True):
            if len(set(codes)) > 1:
                usual = max(sorted(set(codes)), key=codes.count)
                odd = [self._group.ranks[r] for r, code in enumerate(codes) if code != usual]
                return (
                    f"the replicas of the model differ in parameter '{name}': rank"
                    f"{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))} has not what the "
                    f"other ranks have, as of the forward before pass {self._passes} since "
                    "wrapping. Something changed it on some ranks alone (an optimizer step or a "
                    "load_state_dict that others did not make, another learning rate, a random "
                    "number). divergence_check_every=0 turns this check off."
                )
        return "the replicas of the model differed for a moment: parameters change during backward"


def _hash(piece: Piece, code: int) -> int:
    _, parameter, start, stop = piece
    flat = np.ascontiguousarray(parameter._data).reshape(-1)[start:stop]
    return zlib.crc32(flat.view(np.uint8), code)


def _cut(named: Sequence[tuple[str, Any]], parts: int) -> list[list[Piece]]:
    """All elements in at most about `parts` lists of pieces, of about equal numbers of bytes."""
    limit = sum(parameter._data.nbytes for _, parameter in named) / parts
    cut: list[list[Piece]] = [[]]
    size = 0
    for name, parameter in named:
        data = parameter._data
        step = max(1, int(limit // data.itemsize))
        for start in range(0, data.size, step):
            if size >= limit:
                cut.append([])
                size = 0
            cut[-1].append((name, parameter, start, min(start + step, data.size)))
            size += min(step, data.size - start) * data.itemsize
    return cut
