"""Whether operations record a graph: `no_grad`, `enable_grad`, `set_grad_enabled` and their like.

The mode is a context variable, so every thread (a rank may be one) starts enabled and changes
nothing for the others. Each class works as a context manager and as a decorator, as in torch.
Where somebody watches what is recorded (saving.py), the mode is that watcher in place of True: an
op asks for the mode anyway, so that nobody pays who does not watch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, TypeVar

grad_enabled: ContextVar[Any] = ContextVar("dtrain_grad_enabled", default=True)
watching: ContextVar[Any] = ContextVar("dtrain_watching", default=True)  # the mode of "enabled"
_inference: ContextVar[bool] = ContextVar("dtrain_inference_mode", default=False)

_CO_GENERATOR = 0x20  # inspect.CO_GENERATOR; importing inspect takes milliseconds

F = TypeVar("F", bound=Callable[..., Any])


def is_grad_enabled() -> bool:
    """True when operations on tensors that require grad are recorded in this thread."""
    return grad_enabled.get() is not False


def set_mode(enabled: bool) -> Token[Any]:
    """Enable, for the watcher if there is one, or disable; `grad_enabled.reset` undoes it."""
    return grad_enabled.set(watching.get() if enabled else False)


def is_inference_mode_enabled() -> bool:
    """True inside `inference_mode()` in this thread."""
    return _inference.get()


class _Mode:
    """A context manager and decorator that sets `grad_enabled` to `self.mode` while it lasts."""

    mode: bool

    def __init__(self) -> None:
        self._tokens: list[Token[Any]] = []  # a stack: one instance may be entered repeatedly

    def __enter__(self) -> None:
        self._tokens.append(set_mode(self.mode))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        grad_enabled.reset(self._tokens.pop())

    def clone(self) -> _Mode:
        return type(self)()

    def __call__(self, function: F) -> F:
        if isinstance(function, type):
            warnings.warn(
                f"Decorating classes with {type(self).__name__} only wraps __init__; decorate the "
                "methods instead.",
                FutureWarning,
                stacklevel=2,
            )
            function.__init__ = self(function.__init__)  # type: ignore[misc]
            return function
        if getattr(getattr(function, "__code__", None), "co_flags", 0) & _CO_GENERATOR:
            return self._wrap_generator(function)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.clone():  # fresh per call: the function may recurse or run in many threads
                return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    def _wrap_generator(self, function: F) -> F:
        """The mode holds while the generator runs, not while its caller does."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            generator = function(*args, **kwargs)
            step, value = generator.send, None
            try:
                while True:
                    try:
                        with self.clone():
                            produced = step(value)
                    except StopIteration as stop:
                        return stop.value
                    try:
                        value = yield produced
                        step = generator.send
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        value, step = error, generator.throw
            finally:
                with self.clone():
                    generator.close()

        return wrapped  # type: ignore[return-value]


class no_grad(_Mode):
    """Record nothing inside: results do not require grad. Also a decorator, `@no_grad()`.

    Source: torch.no_grad.
    """

    mode = False

    def __new__(cls, function: Callable[..., Any] | None = None) -> Any:
        mode = super().__new__(cls)
        if function is None:
            return mode
        mode.__init__()  # type: ignore[misc]
        return mode(function)  # `@no_grad` without parentheses, which torch accepts too


class enable_grad(no_grad):
    """Record again inside a `no_grad` block. Also a decorator. Source: torch.enable_grad."""

    mode = True


class set_grad_enabled(_Mode):
    """Set the mode at once, and restore the earlier one if used as a context manager.

    Source: torch.set_grad_enabled.
    """

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.mode = bool(mode)
        self._tokens.append(set_mode(self.mode))

    def __enter__(self) -> None:
        pass

    def clone(self) -> _Mode:
        return set_grad_enabled(self.mode)

    def __call__(self, function: F) -> F:
        grad_enabled.reset(self._tokens.pop())  # as a decorator it changes nothing by itself
        return super().__call__(function)


class inference_mode(_Mode):
    """`no_grad` plus a flag that `is_inference_mode_enabled()` reads. Source: torch.inference_mode.

    Unlike torch's, the tensors made inside are ordinary tensors: there is no cheaper kind here
    to switch to, so they may be used in a graph later. `mode=False` leaves everything as it is.
    """

    def __new__(cls, mode: Any = True) -> Any:
        if isinstance(mode, bool):
            return super().__new__(cls)
        return cls()(mode)  # `@inference_mode` without parentheses

    def __init__(self, mode: bool = True) -> None:
        super().__init__()
        self.inference = bool(mode)
        self._inference_tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        self.mode = not self.inference and is_grad_enabled()
        self._inference_tokens.append(_inference.set(self.inference))
        super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        _inference.reset(self._inference_tokens.pop())

    def clone(self) -> _Mode:
        return inference_mode(self.inference)
