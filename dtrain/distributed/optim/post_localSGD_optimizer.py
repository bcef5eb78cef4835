"""PostLocalSGDOptimizer: a local optimizer step, then an averager that may average the model.

Rules: all options and state are the wrapped optimizer's; its state_dict has one more entry, the
averager's step. Source: torch.distributed.optim.PostLocalSGDOptimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from dtrain.distributed.algorithms.model_averaging.averagers import ModelAverager
from dtrain.optim.optimizer import Optimizer


class PostLocalSGDOptimizer(Optimizer):
    """Wraps `optim`; `averager` decides after which steps parameters are averaged over ranks.

    `step` is called on all ranks equally often: it waits for them when the averager averages.
    """

    def __init__(self, optim: Optimizer, averager: ModelAverager) -> None:
        self._make_hook_tables()
        self.optim = optim
        self.param_groups = optim.param_groups
        self.defaults = optim.defaults
        self.averager = averager

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optim.state

    def __repr__(self) -> str:
        return repr(self.optim)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the averager's step, so that warm-up does not come again."""
        return {**self.optim.state_dict(), "step": self.averager.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; one without a step sets the averager's to 0, with a warning."""
        self.optim.load_state_dict(state_dict)
        self.param_groups = self.optim.param_groups
        if "step" not in state_dict:
            warnings.warn(
                "Loaded state dict does not contain a step counter for an averager. Setting step "
                "counter to 0.",
                stacklevel=2,
            )
        self.averager.step = state_dict.get("step", 0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer, then the averager's; returns the closure's loss."""
        loss = self.optim.step(closure)
        self.averager.average_parameters(self.param_groups)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optim.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's."""
        self.optim.add_param_group(param_group)
