"""Records what PyTorch makes of the expressions of tests/ops/expressions.py, with gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.ops.expressions import FAMILIES, evaluate
from tests.ops.sentences import ERRORS, namespace
from tests.recorded.registry import recording


@recording
def expressions() -> dict[str, np.ndarray]:
    """{"<expression>#<result or gradient>": array}."""
    found: dict[str, Any] = {}
    for family in FAMILIES.values():
        for text in family:
            try:
                found |= {f"{text}#{key}": value for key, value in evaluate(torch, text).items()}
            except Exception as error:
                raise RuntimeError(f"PyTorch does not accept {text!r}: {error}") from error
    return found


@recording
def error_sentences() -> dict[str, list[str]]:
    """{statement: [type of the exception, its message]}."""
    found = {}
    for statement, sentence in ERRORS.items():
        try:
            exec(statement, namespace(torch))
        except Exception as error:
            found[statement] = [type(error).__name__, str(error)]
            if sentence not in str(error):
                raise RuntimeError(f"{statement!r} says {error}, not {sentence!r}") from error
        else:
            raise RuntimeError(f"{statement!r} does not fail in PyTorch")
    return found
