"""Records files that PyTorch writes with torch.save."""

from __future__ import annotations

import base64
import io

import torch

from tests.checkpoint_cases import CASES
from tests.recorded.registry import recording


@recording
def checkpoints() -> dict[str, str]:
    """{name of a case: the file that torch.save wrote, in base64}."""
    files = {}
    for name, make in CASES.items():
        file = io.BytesIO()
        torch.save(make(torch), file)
        files[name] = base64.b64encode(file.getvalue()).decode()
    return files
