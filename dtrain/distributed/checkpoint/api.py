"""CheckpointException: which ranks of a save or load failed, and why.

Every rank raises it with the same failures, so that all of them take the same way out.
Source: torch.distributed.checkpoint.api. There it is a BaseException, which `except Exception`
lets through; here it is a RuntimeError.
"""

from __future__ import annotations

from traceback import StackSummary


class CheckpointException(RuntimeError):
    """A checkpoint could not be saved or loaded. `failures`: {rank: (error, stack there)}."""

    def __init__(self, msg: str, failures: dict[int, tuple[BaseException, StackSummary]]) -> None:
        told = [f"rank {rank}: {_named(error)}" for rank, (error, _) in sorted(failures.items())]
        super().__init__("\n  ".join([msg, *told]))
        self._failures = dict(failures)

    @property
    def failures(self) -> dict[int, tuple[BaseException, StackSummary]]:
        """{rank: (error, where it was raised on that rank)}."""
        return self._failures


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class DamagedCheckpoint(RuntimeError):
    """Files of a checkpoint are missing, cut short, changed, or of another one. Not in torch."""
