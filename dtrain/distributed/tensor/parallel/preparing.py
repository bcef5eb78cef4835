"""What goes into and comes out of a module that is not itself cut: `PrepareModuleInput` and its
sisters put hooks around its forward. A layout of None leaves an argument alone.

Source: torch.distributed.tensor.parallel.style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor._api import DTensor
from dtrain.distributed.tensor.parallel.style import ParallelStyle, given_out, taken_in
from dtrain.distributed.tensor.placement_types import Placement
from dtrain.nn.modules.module import Module
from dtrain.tensor import Tensor

Layouts = Placement | Sequence[Placement | None] | None


def _listed(layouts: Layouts) -> list[Placement | None]:
    if layouts is None:
        return []
    return [layouts] if isinstance(layouts, Placement) else list(layouts)


class PrepareModuleInput(ParallelStyle):
    """Positional inputs, taken as placed at `input_layouts`, are brought to `desired_input_layouts`
    before forward; keyword ones by name. `use_local_output`: forward gets plain parts.

    ValueError when the two do not name the same arguments.
    """

    def __init__(
        self, *, input_layouts: Layouts = None, desired_input_layouts: Layouts = None,
        input_kwarg_layouts: Mapping[str, Placement] | None = None,
        desired_input_kwarg_layouts: Mapping[str, Placement] | None = None,
        use_local_output: bool = False,
    ) -> None:  # fmt: skip
        self.input_layouts = _listed(input_layouts)
        self.desired_input_layouts = _listed(desired_input_layouts)
        self.input_kwarg_layouts = dict(input_kwarg_layouts or {})
        self.desired_input_kwarg_layouts = dict(desired_input_kwarg_layouts or {})
        self.use_local_output = use_local_output
        if len(self.input_layouts) != len(self.desired_input_layouts) or set(
            self.input_kwarg_layouts
        ) != set(self.desired_input_kwarg_layouts):
            raise ValueError("input layouts and desired input layouts should have same length!")

    def _prepared(self, value: Any, mesh: DeviceMesh, layout: Any, wanted: Any) -> Any:
        if layout is None or wanted is None or not isinstance(value, Tensor):
            return value
        found = taken_in(value, mesh, layout, wanted)
        return found.to_local() if self.use_local_output else found

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        def before(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.input_layouts and len(args) != len(self.input_layouts):
                raise ValueError(
                    f"module inputs and input_layouts should have same length! got {len(args)} "
                    f"and {len(self.input_layouts)}"
                )
            layouts = zip(args, self.input_layouts, self.desired_input_layouts, strict=False)
            new = tuple(self._prepared(a, device_mesh, i, d) for a, i, d in layouts)
            named = dict(kwargs)
            for name, layout in self.input_kwarg_layouts.items():
                wanted = self.desired_input_kwarg_layouts[name]
                if name in named:
                    named[name] = self._prepared(named[name], device_mesh, layout, wanted)
            return (new if self.input_layouts else args), named

        module.register_forward_pre_hook(before, with_kwargs=True)
        return module


class PrepareModuleOutput(ParallelStyle):
    """Outputs, taken as placed at `output_layouts`, leave at `desired_output_layouts`, as plain
    parts with `use_local_output`. ValueError when there are not as many of both.
    """

    def __init__(
        self, *, output_layouts: Layouts, desired_output_layouts: Layouts,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        self.output_layouts = _listed(output_layouts)
        self.desired_output_layouts = _listed(desired_output_layouts)
        self.use_local_output = use_local_output
        if len(self.output_layouts) != len(self.desired_output_layouts):
            raise ValueError("output_layouts and desired_output_layouts should have same length!")

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        def behind(_: Module, inputs: Any, output: Any) -> Any:
            outputs = output if isinstance(output, tuple) else (output,)
            if len(outputs) != len(self.output_layouts):
                raise ValueError(
                    f"module outputs and output_layouts should have same length! got "
                    f"{len(outputs)} and {len(self.output_layouts)}"
                )
            layouts = zip(outputs, self.output_layouts, self.desired_output_layouts, strict=True)
            new = tuple(self._prepared(o, device_mesh, i, d) for o, i, d in layouts)
            return new if isinstance(output, tuple) else new[0]

        module.register_forward_hook(behind)
        return module

    def _prepared(self, value: Any, mesh: DeviceMesh, layout: Any, wanted: Any) -> Any:
        if layout is None or wanted is None:
            return value
        part = value if isinstance(value, DTensor) else DTensor.from_local(value, mesh, [layout])
        return given_out(part, wanted, self.use_local_output)


class PrepareModuleInputOutput(ParallelStyle):
    """`PrepareModuleInput` and `PrepareModuleOutput` of one module."""

    def __init__(
        self, *, input_layouts: Layouts = None, desired_input_layouts: Layouts = None,
        input_kwarg_layouts: Mapping[str, Placement] | None = None,
        desired_input_kwarg_layouts: Mapping[str, Placement] | None = None,
        use_local_input: bool = False, output_layouts: Layouts, desired_output_layouts: Layouts,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        self.prepare_module_input = PrepareModuleInput(
            input_layouts=input_layouts, desired_input_layouts=desired_input_layouts,
            input_kwarg_layouts=input_kwarg_layouts,
            desired_input_kwarg_layouts=desired_input_kwarg_layouts,
            use_local_output=use_local_input,
        )  # fmt: skip
        self.prepare_module_output = PrepareModuleOutput(
            output_layouts=output_layouts, desired_output_layouts=desired_output_layouts,
            use_local_output=use_local_output,
        )  # fmt: skip

    def _apply(self, module: Module, device_mesh: DeviceMesh) -> Module:
        self.prepare_module_input._apply(module, device_mesh)
        return self.prepare_module_output._apply(module, device_mesh)
