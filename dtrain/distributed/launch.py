"""`python -m dtrain.distributed.launch`: the older idiom: a script is given `--local-rank`.

Owns nothing: it is the program `dtrun.launch`. New programs take `dtrun` and read LOCAL_RANK.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "dtrun.launch", *sys.argv[1:]])
