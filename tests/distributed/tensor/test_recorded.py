"""Where PyTorch has the parts and the results: recorded, and compared.

Where results lie elsewhere here, it is listed with the reason; values are right in either case
(test_rules).
"""

from __future__ import annotations

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed import tensor
from dtrain.distributed.tensor._dtensor_spec import compute_local_shape_and_global_offset
from dtrain.testing.distributed import run_distributed
from tests.distributed.tensor.cases import MESHES, boxes, results
from tests.recorded import load_json


def own_boxes():
    found = {}
    for name, shape in MESHES.items():
        mesh = dist.init_device_mesh("cpu", shape)
        some = boxes(tensor, mesh, compute_local_shape_and_global_offset)
        found |= {f"{name} {dist.get_rank()} {key}": value for key, value in some.items()}
    return found


def test_parts_are_where_pytorch_has_them():
    found = {}
    for some in run_distributed(4, own_boxes):
        found |= some
    assert found == load_json("dtensor_boxes")


def own_results():
    return results(torch, tensor, dist.init_device_mesh("cpu", (2,)))


# {expression and placement: why it is elsewhere here}
DIFFERENT = {
    "x * x | P": "a product of sums is no sum of products: PyTorch's result is wrong",
    "x @ x.t() | P": "the same",
    "x.t() @ x | P": "the same",
    "x.clone() | P": "a copy of contributions needs no message",
    "x.mean() | P": "a mean of contributions is a contribution to the mean",
    "x.mean(1) | P": "the same",
    "x.flatten(1) | S(2)": "gathered: strided cuts come from FSDP alone",
    "x.view(24) | S(1)": "the same",
}


def test_results_are_where_pytorch_has_them():
    found, recorded = run_distributed(2, own_results)[0], load_json("dtensor_results")
    assert found.keys() == recorded.keys()
    assert {key for key in found if found[key] != recorded[key]} == set(DIFFERENT)
