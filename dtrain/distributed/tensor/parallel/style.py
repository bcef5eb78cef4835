"""How one layer is cut: `ColwiseParallel`, `RowwiseParallel`, `SequenceParallel`.

A style makes the layer's parameters DTensors and puts a hook before and one behind its forward:
what comes in as a plain tensor is taken for a part placed as `input_layouts`, is brought to where
the layer wants it, and what goes out is placed as `output_layouts`. Rule: a tensor that goes into
several layers, as into queries, keys and values, is brought there once, and its gradient comes back
in one sum. Source: torch.distributed.tensor.parallel.style.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor._api import DTensor
from dtrain.distributed.tensor._dispatch import who_records
from dtrain.distributed.tensor._distribute import distribute_own
from dtrain.distributed.tensor.placement_types import Placement, Replicate, Shard
from dtrain.nn.modules.linear import Linear
from dtrain.nn.modules.module import Module
from dtrain.nn.modules.sparse import Embedding
from dtrain.tensor import Tensor


class ParallelStyle:
    """Base of all styles: `_apply(module, mesh)` cuts a module in place and returns it."""

    src_data_rank: int | None = 0

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        raise NotImplementedError(f"{type(self).__name__} does not define _apply")


def taken_in(value: Any, mesh: DeviceMesh, layout: Placement, wanted: Placement) -> DTensor:
    """A tensor as a DTensor at `wanted`; a plain one is a part placed as `layout`.

    The last answer is kept with the tensor, for the next layer that asks the same.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a Tensor to be cut, got {type(value).__name__}")
    changes = value._version and value._version.count
    asked = (mesh, layout, wanted, value._node, changes, who_records())
    kept = value.__dict__.get("_taken_in")
    if kept is not None and kept[0] == asked:
        return kept[1]  # type: ignore[no-any-return]
    part = value if isinstance(value, DTensor) else DTensor.from_local(value, mesh, [layout])
    found = part.redistribute(placements=[wanted])
    if value._node is not None and found is not value:
        value._taken_in = (asked, found)  # type: ignore[attr-defined]
    return found


def given_out(value: Any, layout: Placement, local: bool) -> Any:
    """What a layer returns, at `layout`, plain if `local`."""
    if not isinstance(value, DTensor):
        raise RuntimeError(f"expected the layer to return a DTensor, got {type(value).__name__}")
    placed = value.redistribute(placements=[layout])
    return placed.to_local() if local else placed


class _Layer(ParallelStyle):
    """A style that takes one input, and says how parameters are cut."""

    input_layouts: Placement
    output_layouts: Placement
    use_local_output: bool

    def _wanted(self, module: Module) -> Placement:
        """Where the input has to be."""
        raise NotImplementedError

    def _cuts(self, module: Module) -> Mapping[str, list[Placement]]:
        """How the parameters are cut, by name; the others are replicated."""
        raise NotImplementedError

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        wanted = self._wanted(module)
        distribute_own(module, device_mesh, self._cuts(module), self.src_data_rank)

        def before(_: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            first = taken_in(inputs[0], device_mesh, self.input_layouts, wanted)
            return (first, *inputs[1:])

        def behind(_: Module, inputs: Any, output: Any) -> Any:
            return given_out(output, self.output_layouts, self.use_local_output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(behind)
        return module

    def _kind(self, module: Module) -> type[Any]:
        for kind in (Linear, Embedding):
            if isinstance(module, kind):
                return kind
        raise NotImplementedError(
            f"{type(self).__name__} currently only support nn.Linear and nn.Embedding, got "
            f"{type(module).__name__}"
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, output_layouts="
            f"{self.output_layouts}, use_local_output={self.use_local_output})"
        )


class ColwiseParallel(_Layer):
    """The outputs of a Linear (the rows of its weight), or the columns of an Embedding, are cut.

    Forward moves nothing; backward sums the gradient of the input (an all-reduce of its size).
    Results are cut along their last dimension unless `output_layouts` says otherwise.
    """

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Shard(-1)
        self.use_local_output = use_local_output

    def _wanted(self, module: Module) -> Placement:
        return Replicate()

    def _cuts(self, module: Module) -> Mapping[str, list[Placement]]:
        if self._kind(module) is Embedding:
            return {"weight": [Shard(1)]}
        return {"weight": [Shard(0)], "bias": [Shard(0)]}


class RowwiseParallel(_Layer):
    """The inputs of a Linear (the columns of its weight), or the rows of an Embedding, are cut.

    Forward sums the contributions (an all-reduce of the output's size; a reduce-scatter where
    `output_layouts` is a Shard); backward moves nothing for a replicated output.
    """

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        self.input_layouts = input_layouts or Shard(-1)
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _wanted(self, module: Module) -> Placement:
        return Replicate() if self._kind(module) is Embedding else Shard(-1)

    def _cuts(self, module: Module) -> Mapping[str, list[Placement]]:
        return {"weight": [Shard(0) if self._kind(module) is Embedding else Shard(1)]}


class SequenceParallel(_Layer):
    """A layer whose input and output are cut along the sequence (`sequence_dim`), with its
    parameters on all ranks: LayerNorm, RMSNorm, Dropout. Their gradients are summed in backward.
    """

    def __init__(self, *, sequence_dim: int = 1, use_local_output: bool = False) -> None:
        self.input_layouts = self.output_layouts = Shard(sequence_dim)
        self.use_local_output = use_local_output

    def _wanted(self, module: Module) -> Placement:
        return self.input_layouts

    def _cuts(self, module: Module) -> Mapping[str, list[Placement]]:
        return {}
