"""Records torchrun's flags, for the test that dtrun knows them all."""

from __future__ import annotations

from typing import Any

from torch.distributed.run import get_args_parser

from tests.recorded.registry import recording


@recording
def torchrun_flags() -> list[dict[str, Any]]:
    """Of each flag its spellings and its default, as plain values."""
    return [
        {"names": list(action.option_strings), "default": _plain(action.default)}
        for action in get_args_parser()._actions
        if action.option_strings
    ]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
