"""Stateful: objects that a checkpoint asks for their state and gives it back to.

`save` calls `state_dict()`; `load` calls it too, fills what it returned in place, and hands it to
`load_state_dict`. Source: torch.distributed.checkpoint.stateful.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """Anything with `state_dict()` and `load_state_dict(state_dict)`: modules, optimizers ..."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values by name; tensors share memory with the object's own."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was loaded."""
        ...


StatefulT = TypeVar("StatefulT", bound=Stateful)
