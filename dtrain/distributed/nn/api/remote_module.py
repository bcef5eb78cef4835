"""`RemoteModule`: a module that lives on another worker and is called like one that lives here.

Rules: 1. the module is made by its owner, by the name of its class, so that nothing but the
arguments travels. 2. A RemoteModule is a handle: it may be an argument or a result of calls, and
the module lives as long as anybody has one. 3. Inside a module here it has no parameters of its own
(`parameters()` of the whole gives those that are here), and what would need them is refused.

Source: torch.distributed.nn.api.remote_module.
"""

from __future__ import annotations

from typing import Any, NoReturn

from dtrain.comm.work import Future
from dtrain.device import on_cpu
from dtrain.distributed.rpc import current
from dtrain.distributed.rpc.api import remote, rpc_async, rpc_sync
from dtrain.distributed.rpc.requests import arguments
from dtrain.distributed.rpc.rref import RRef
from dtrain.nn.modules.module import Module

__all__ = ["RemoteModule"]


def _create_module(module_cls: Any, args: Any, kwargs: Any, place: str) -> Module:
    module = module_cls(*args, **kwargs)
    if not isinstance(module, Module):
        raise ValueError(
            "Expect `module_cls(*args, **kwargs)` returns an instance of <class nn.Module>, "
            f"but it returns an instance of {type(module)}."
        )
    return module.to(place)


def _param_rrefs(module_rref: RRef, recurse: bool) -> list[RRef]:
    return [RRef(parameter) for parameter in module_rref.local_value().parameters(recurse)]


def _remote_forward(module_rref: RRef, args: Any, kwargs: Any) -> Any:
    return module_rref.local_value()(*args, **kwargs)


def _set_mode(module_rref: RRef, training: bool) -> None:
    module_rref.local_value().train(training)


def _parse(remote_device: str) -> tuple[str | int, str]:
    """Worker (name or rank) and device of "<workername>/<device>" or "rank:<rank>/<device>"."""
    worker, slash, place = str(remote_device).partition("/")
    number = worker.removeprefix("rank:")
    if not worker or "/" in place or (number != worker and not number.isdecimal()):
        raise ValueError(
            f"Could not parse remote_device: {remote_device}. The valid format is "
            "'<workername>/<device>' or 'rank:<rank>/<device>' or '<device>'"
        )
    there = on_cpu(place if slash else "cpu", "a RemoteModule")
    return (int(number) if number != worker else worker), str(there)


class RemoteModule(Module):
    """`module_cls(*args, **kwargs)` on worker and device `remote_device` ("worker1/cpu", "worker1",
    "rank:1/cpu").

    Blocks until it is there. Calling it calls the module's forward there; in a distributed autograd
    context gradients flow. Raises what the constructor raises, ValueError for a worker that is not
    known, TypeError for a class that other workers may not name. `on`: the worker; `device`: the
    device there; `module_rref`: the reference to the module.
    """

    _travels_as = ("on", "device", "module_rref")

    def __init__(
        self,
        remote_device: str,
        module_cls: type[Module],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        on, place = _parse(remote_device)
        current.agent().worker(on)
        if isinstance(module_cls, Module):
            raise TypeError(
                f"module_cls must be a class, got an instance of {type(module_cls).__name__}: "
                "it is made on the worker, RemoteModule(remote_device, module_cls, args, kwargs)"
            )
        args, kwargs = arguments(module_cls, args, kwargs)
        made = remote(on, _create_module, (module_cls, args, kwargs, place))
        made._get_future().wait()
        self._become(on, place, made)

    def _become(self, on: str | int, place: str, module_rref: RRef) -> None:
        super().__init__()
        self.on, self.device, self.module_rref = on, place, module_rref

    @classmethod
    def _arrived(cls, on: str | int, device: str, module_rref: RRef) -> RemoteModule:
        """One that came from another worker."""
        made = cls.__new__(cls)
        made._become(on, device, module_rref)
        return made

    @staticmethod
    def init_from_module_rref(
        remote_device: str, module_rref: RRef, _module_interface_cls: Any = None
    ) -> RemoteModule:
        """Another handle of the module that `module_rref` refers to. Waits for nobody.

        There are no TorchScript interfaces here: `_module_interface_cls` is refused.
        """
        if _module_interface_cls is not None:
            raise NotImplementedError("RemoteModule with an interface needs TorchScript")
        return RemoteModule._arrived(*_parse(remote_device), module_rref)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the module's forward there. Blocks as `rpc_sync` does."""
        return rpc_sync(self.on, _remote_forward, (self.module_rref, args, kwargs))

    def forward_async(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `forward`, but a future, at once."""
        return rpc_async(self.on, _remote_forward, (self.module_rref, args, kwargs))

    def remote_parameters(self, recurse: bool = True) -> list[RRef]:
        """References to the module's parameters, for a `DistributedOptimizer`."""
        found: list[RRef] = rpc_sync(self.on, _param_rrefs, (self.module_rref, recurse))
        return found

    def get_module_rref(self) -> RRef:
        """The reference to the module."""
        return self.module_rref

    def train(self, mode: bool = True) -> RemoteModule:
        """Put the module there into training or evaluation mode."""
        rpc_sync(self.on, _set_mode, (self.module_rref, mode))
        self.training = mode
        return self

    def extra_repr(self) -> str:
        """Where the module is."""
        return f"{self.on}/{self.device}"

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            "Cannot pickle RemoteModule in python pickler. RemoteModule can only be pickled when "
            "using RPC"
        )


def _refuse(name: str) -> Any:
    def method(self: RemoteModule, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"Method ``{name}`` not supported for RemoteModule: the module lives on worker "
            f"{self.on!r}. Call a function there with get_module_rref(), or use "
            "remote_parameters()"
        )

    return method


for _name in (
    *("register_buffer", "register_parameter", "add_module", "apply", "cuda", "cpu", "type"),
    *("float", "double", "half", "bfloat16", "to", "register_full_backward_hook"),
    *("register_forward_pre_hook", "register_forward_hook", "state_dict", "load_state_dict"),
    *("requires_grad_", "zero_grad", "share_memory"),
):
    setattr(RemoteModule, _name, _refuse(_name))
