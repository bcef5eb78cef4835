"""Step each parameter as soon as its gradient is there, in backward: its memory is free at once.

Owns `_apply_optimizer_in_backward` and what it registered. DistributedDataParallel takes the hooks
over (`take_over`): it steps when the gradient has been reduced. Source:
torch.distributed.optim._apply_optimizer_in_backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dtrain.optim.optimizer import Optimizer


class _InBackward:
    """The optimizers of one parameter, as one of its hooks: kept as long as the parameter lives."""

    def __init__(self) -> None:
        self.optimizers: list[Optimizer] = []
        self.steps = False  # here, and not where DDP has reduced the gradient

    def __call__(self, parameter: Any) -> None:
        if not self.steps:
            return
        for optimizer in self.optimizers:
            optimizer.step()
        parameter._grad = None


def _entry(parameter: Any) -> _InBackward | None:
    hooks = (parameter._post_accumulate or {}).values()
    return next((hook for hook in hooks if isinstance(hook, _InBackward)), None)


def _apply_optimizer_in_backward(
    optimizer_class: type[Optimizer],
    params: Iterable[Any],
    optimizer_kwargs: Mapping[str, Any],
    register_hook: bool = True,
) -> None:
    """Give each parameter an optimizer of its own, which steps in `backward()`.

    `.grad` of these parameters is None afterwards. `register_hook=False` registers the optimizers
    alone. A parameter may be given several, which step in this order.
    """
    for parameter in params:
        entry = _entry(parameter)
        if entry is None:
            entry = _InBackward()
            parameter.register_post_accumulate_grad_hook(entry)
        entry.optimizers.append(optimizer_class([parameter], **optimizer_kwargs))
        entry.steps |= register_hook


def optimizers_of(parameter: Any) -> list[Optimizer]:
    """The optimizers that step `parameter` in backward."""
    entry = _entry(parameter)
    return [] if entry is None else entry.optimizers


def _get_in_backward_optimizers(module: Any) -> list[Optimizer]:
    """The optimizers of all parameters of `module`, to change their learning rates, say."""
    return [optimizer for p in module.parameters() for optimizer in optimizers_of(p)]


def take_over(parameters: Iterable[Any]) -> bool:
    """Whether any of `parameters` has optimizers; from now on the caller steps them."""
    entries = [entry for p in parameters if (entry := _entry(p)) is not None]
    for entry in entries:
        entry.steps = False
    return bool(entries)
