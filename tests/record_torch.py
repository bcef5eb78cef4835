"""Records values from PyTorch 2.13 (CPU) into tests/recorded, for tests that run without it.

    python -m tests.record_torch            # every recording
    python -m tests.record_torch modules    # the named ones

To add recordings, write a module tests/record_<topic>.py with one function per file:

    from tests.recorded.registry import recording

    @recording
    def losses():                      # writes tests/recorded/losses.npz
        return {"cross_entropy/mean": torch.nn.functional.cross_entropy(x, y), ...}

It is found by its name; nothing else is touched. Describe the keys in tests/recorded/README.md and
read them with `tests.recorded.load("losses")`. All recordings together stay below 3 MB.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from tests.recorded.registry import RECORDINGS, write

PYTORCH = "2.13."


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("record_*.py")):
        if path.stem != "record_torch":
            importlib.import_module(f"tests.{path.stem}")
    parser = argparse.ArgumentParser(description="Record values from PyTorch.")
    parser.add_argument("names", nargs="*", choices=[[], *sorted(RECORDINGS)], metavar="name")
    names = parser.parse_args().names or sorted(RECORDINGS)
    import torch

    if not torch.__version__.startswith(PYTORCH):
        raise SystemExit(f"recordings are made with PyTorch {PYTORCH}x, got {torch.__version__}")
    torch.set_num_threads(1)
    for name in names:
        print(write(name))


if __name__ == "__main__":
    main()
