"""Cross entropy of scores whose classes are cut: nobody holds all classes of a row.

Three sums and maxima of one number a row replace the all-gather of the scores. Source: Shoeybi et
al., arXiv:1909.08053, section 3; torch.distributed.tensor.parallel.loss_parallel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.comm import collectives as calls
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor._redistribute import Step, apply
from dtrain.ops.elementwise import exp, log
from dtrain.ops.gather import gather
from dtrain.ops.reduce import sum as add_up
from dtrain.ops.shape import squeeze, unsqueeze


def class_cut_entropy(spec: DTensorSpec, axis: int) -> Any:
    """What computes the loss, equal on all ranks of `axis`, from this rank's classes (dim 1).

    Targets are class indices; no smoothing.
    """
    group = spec.mesh.get_group(axis)
    first, count = spec.box[0][1], spec.box[1][1]
    everywhere = Step("sum", group)

    def run(
        x: Any, target: Any, weight: Any, *, ignore_index: int, reduction: str, **_: Any
    ) -> Any:
        places = target._data
        _check(places, spec.shape[1], ignore_index)
        top = x._data.max(1, keepdims=True, initial=-np.inf)
        group.issue(calls.AllReduce(top, ReduceOp.MAX))
        scores = x - make(top)
        normaliser = log(apply(everywhere, add_up(exp(scores), 1)))
        here = (places >= first) & (places < first + count)
        own = make(np.where(here, places - first, 0))
        picked = squeeze(gather(scores, 1, unsqueeze(own, 1)), 1) * make(here.astype(x._data.dtype))
        rows = (places != ignore_index).astype(x._data.dtype)
        if weight is not None:
            rows = rows * weight._data[np.where(places == ignore_index, 0, places)]
        losses = (normaliser - apply(everywhere, picked)) * make(rows)
        if reduction == "none":
            return losses
        total = add_up(losses)
        return total / float(rows.sum()) if reduction == "mean" else total

    return run


def _check(places: Any, classes: int, ignore_index: int) -> None:
    wrong = places[((places < 0) | (places >= classes)) & (places != ignore_index)]
    if wrong.size:
        raise IndexError(f"Target {wrong.reshape(-1)[0]} is out of bounds.")
