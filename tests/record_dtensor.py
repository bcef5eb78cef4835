"""Records where PyTorch's DTensor has the parts of a tensor, and where results of operations lie.

One rank of a job that does not exist (the backend `fake`) is enough: nothing depends on values.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.tensor as tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed.tensor.cases import MESHES, boxes, results
from tests.recorded.registry import recording


@recording
def dtensor_boxes() -> dict[str, object]:
    found = {}
    for rank in range(4):
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        for name, shape in MESHES.items():
            mesh = init_device_mesh("cpu", shape)
            some = boxes(tensor, mesh, compute_local_shape_and_global_offset)
            found |= {f"{name} {rank} {key}": value for key, value in some.items()}
        dist.destroy_process_group()
    return found


@recording
def dtensor_results() -> dict[str, object]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    found = results(torch, tensor, init_device_mesh("cpu", (2,)))
    dist.destroy_process_group()
    return found
