"""What leads out of a DTensor to Python and NumPy: only where every rank has all of it.

A part must never be taken for the whole, and a call that needs the other ranks must not hide in an
`item()` or a `print` that one rank alone makes: so these raise, and say what to call instead.
"""

from __future__ import annotations

from typing import Any

from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.tensor import Tensor


class Guarded(Tensor):
    """The methods of Tensor that look at values, asking first whether they are all there."""

    __slots__ = ("_spec",)
    _spec: DTensorSpec

    def _refuse(self, name: str) -> Any:
        raise RuntimeError(
            f"{name} is not supported for a DTensor, here {self._spec}: it would see this rank's "
            "part alone. Use .full_tensor() on all ranks for the whole, or .to_local() for the part"
        )

    def _whole(self, name: str) -> None:
        if not self._spec.is_replicated:
            self._refuse(name)

    def numpy(self, *, force: bool = False) -> Any:
        """The array, where it is replicated; RuntimeError elsewhere."""
        self._whole("numpy()")
        return Tensor.numpy(self, force=force)

    def item(self) -> Any:
        """The one element, where it is replicated; RuntimeError elsewhere."""
        self._whole("item()")
        return Tensor.item(self)

    def tolist(self) -> Any:
        self._whole("tolist()")
        return Tensor.tolist(self)

    def __bool__(self) -> bool:
        self._whole("bool()")
        return Tensor.__bool__(self)

    def _number(self) -> Any:
        self._whole("a Python number")
        return Tensor._number(self)

    def __index__(self) -> int:
        self._whole("an index")
        return Tensor.__index__(self)

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of a 0-d tensor")
        return self._spec.shape[0]

    def __contains__(self, element: Any) -> bool:
        self._whole("in")
        return Tensor.__contains__(self, element)

    def __array_wrap__(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse("a NumPy function")

    def __format__(self, spec: str) -> str:
        if self.ndim:
            return object.__format__(self, spec)
        self._whole("format()")
        return Tensor.__format__(self, spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._refuse("pickling, torch.save included,")  # type: ignore[no-any-return]
