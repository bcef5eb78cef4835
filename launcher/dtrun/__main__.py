"""`python -m dtrun`: the same program as the console script `dtrun`.

It owns nothing: `dtrun.cli.main` does the work and returns the exit code.
"""

from __future__ import annotations

import sys

from dtrun.cli import main

if __name__ == "__main__":
    sys.exit(main())
