"""Buckets for tests of communication hooks, without DDP: parameters, gradients in a FlatBuffer."""

from __future__ import annotations

import numpy as np

import dtrain as torch
import dtrain.distributed as dist
from dtrain.autograd.node import make
from dtrain.distributed.grad_bucket import GradBucket
from dtrain.flat import FlatBuffer

SHAPES = ((12, 30), (7,), (40, 3, 2, 2), (1,), (12, 30))


class Bucket(GradBucket):
    """A bucket whose gradients are views of a buffer that has gaps, as DDP's are."""

    def __init__(self, parameters, gradients, index=0, last=True):
        self.flat = FlatBuffer.of([g._data for g in gradients])
        views = [make(view) for view in self.flat.views]
        super().__init__(index, make(self.flat.array), views, parameters, last)


def make_parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def gradients_of(rank, step=0, dtype=torch.float32, shapes=SHAPES):
    """The same on every run, different on every rank and step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def call(state, hook, parameters, step=0, dtype=torch.float32, shapes=SHAPES):
    """One bucket through a hook on this rank: copies of the gradients that come out."""
    bucket = Bucket(parameters, gradients_of(dist.get_rank(), step, dtype, shapes))
    result = hook(state, bucket).wait()
    assert (result[0] if isinstance(result, list) else result) is bucket.buffer()
    used = np.zeros(bucket.buffer().numel(), bool)
    for at, view in zip(bucket.flat.offsets, bucket.flat.views, strict=True):
        used[at : at + view.size] = True
    assert not bucket.buffer().numpy()[~used].any()  # gaps stay zero
    return [gradient.numpy().copy() for gradient in bucket.gradients()]


def mean_of(ranks, step=0, dtype=torch.float32, shapes=SHAPES):
    """The exact mean, in float64."""
    everyone = [gradients_of(r, step, dtype, shapes) for r in range(ranks)]
    columns = zip(*everyone, strict=True)
    return [np.mean([g.numpy().astype(np.float64) for g in gs], axis=0) for gs in columns]
