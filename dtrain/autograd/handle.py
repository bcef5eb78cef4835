"""Tables of hooks, and what registering one returns: a handle that can take it off again.

A hook may remove itself, or another, while the hooks of its table run: callers walk a copy.
"""

from __future__ import annotations

import weakref
from itertools import count
from types import TracebackType
from typing import Any

_next_id = count().__next__


class RemovableHandle:
    """Removes one hook from the table it is in; also a context manager.

    Source: torch.utils.hooks.RemovableHandle.
    """

    def __init__(self, hooks_dict: dict[int, Any], *, extra_dict: Any = None) -> None:
        self.hooks_dict_ref = weakref.ref(hooks_dict)
        self.id = _next_id()
        self.extra_dict_ref = tuple(
            weakref.ref(d)
            for d in ((extra_dict,) if isinstance(extra_dict, dict) else extra_dict or ())
        )

    def remove(self) -> None:
        """Take the hook off; doing it twice is harmless."""
        for reference in (self.hooks_dict_ref, *self.extra_dict_ref):
            table = reference()
            if table is not None:
                table.pop(self.id, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class HookTable(dict[Any, Any]):
    """{handle id: hook}, in the order of registration; a dict that can be weakly referenced.

    The hook under the key `LAST` runs after the others whenever it was set (`retain_grad` sees
    what they made of the gradient).
    """

    LAST = "last"

    def add(self, hook: Any) -> RemovableHandle:
        if not callable(hook):
            raise TypeError(f"hook must be callable, got {type(hook).__name__}")
        handle = RemovableHandle(self)
        last = self.pop(self.LAST, None)
        self[handle.id] = hook
        if last is not None:
            self[self.LAST] = last
        return handle
