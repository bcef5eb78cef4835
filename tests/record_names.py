"""Records PyTorch's public names, for the table of docs/coming-from-pytorch.md."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from tests.recorded.registry import recording

MODULES = """torch torch.nn torch.nn.functional torch.nn.init torch.nn.utils torch.nn.parallel
    torch.optim torch.optim.lr_scheduler torch.utils.data torch.utils.checkpoint
    torch.distributed torch.distributed.fsdp torch.distributed.fsdp.wrap
    torch.distributed.optim torch.distributed.pipelining
    torch.distributed.tensor torch.distributed.tensor.parallel torch.autograd
    torch.multiprocessing"""


HELPERS = {"Tensor", "assert_int_or_pair", "factory_kwargs"}  # seen in nn, meant for itself


def _is_public(name: str, value: object) -> bool:
    """A function or class of PyTorch's, no helper of its own."""
    home = str(getattr(value, "__module__", "torch"))
    own = name in HELPERS or "torch_function" in name or "_jit" in home
    return callable(value) and home.startswith("torch") and not own


def _names(module: ModuleType) -> list[str]:
    found = getattr(module, "__all__", None)
    if module is torch:  # its __all__ leaves out the dtypes
        found = [name for name, value in vars(torch).items() if not isinstance(value, ModuleType)]
    elif found is None or module is torch.multiprocessing:  # its __all__ leaves out spawn
        shown = [name for name, value in vars(module).items() if _is_public(name, value)]
        found = [*(found or ()), *shown]
    return sorted({name for name in found if not name.startswith("_")})


@recording
def public_names() -> dict[str, list[str]]:
    """{module: its names}; of torch.Tensor, the methods and attributes."""
    found = {name: _names(importlib.import_module(name)) for name in MODULES.split()}
    found["torch.Tensor"] = [name for name in dir(torch.Tensor) if not name.startswith("_")]
    return found
