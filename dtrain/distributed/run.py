"""`python -m dtrain.distributed.run`: dtrun, under the name that torchrun's module has.

Owns nothing: the launcher is the program `dtrun`, a process of its own that loads no NumPy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run dtrun with these arguments, default those of this program, and return when it succeeded.

    Blocks until all ranks have ended. SystemExit with dtrun's exit code when it is not 0; what
    failed has been reported on stderr. Source: torch.distributed.run.
    """
    given = sys.argv[1:] if args is None else list(args)
    code = subprocess.run([sys.executable, "-m", "dtrun", *given], check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "dtrun", *sys.argv[1:]])
