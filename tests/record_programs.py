"""Records what PyTorch makes of tests/autograd/programs.py, and the texts of tensors."""

from __future__ import annotations

from typing import Any

import torch

from tests.autograd.programs import PROGRAMS, as_plain, run
from tests.printing_cases import TEXTS, shown
from tests.recorded.registry import recording


@recording
def programs() -> dict[str, list[Any]]:
    """{name: what the program leaves}."""
    found = {}
    for name, text in PROGRAMS.items():
        try:
            found[name] = as_plain(run(torch, text))
        except Exception as error:
            raise RuntimeError(f"PyTorch does not run {name!r}: {error}") from error
    return found


@recording
def tensor_texts() -> dict[str, str]:
    """{expression: its repr}, with `torch.` for the package."""
    return {text: shown(torch, text) for text in TEXTS}
