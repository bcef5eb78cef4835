"""What a module computes, as arrays by name: run with PyTorch (recorded) and dtrain (compared)."""

from __future__ import annotations

from typing import Any

SEED = 3


def computed(torch: Any, expression: str, inputs: str) -> dict[str, Any]:
    """Outputs of two calls, gradients of the second one's weighted sum, and the state after it.

    Keys: "output", "again", "input.grad", "<parameter>.grad", "state.<buffer>".
    """
    torch.manual_seed(SEED)
    names = {"torch": torch, "nn": torch.nn}
    module = eval(f"nn.{expression}", names)
    args = eval(inputs, names)
    args = args if isinstance(args, tuple) else (args,)
    if args[0].is_floating_point():
        args[0].requires_grad_()
    found = {"output": module(*args)}
    again = found["again"] = module(*args)
    if again.requires_grad:
        (again * torch.randn(again.shape)).sum().backward()
        if args[0].grad is not None:
            found["input.grad"] = args[0].grad
        found |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return found | {f"state.{name}": buffer for name, buffer in module.named_buffers()}
