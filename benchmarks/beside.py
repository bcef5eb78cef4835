"""Running a benchmark's own file again as a child: under a launcher, or with PyTorch.

The child prints one line of JSON, which is what the benchmark measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def with_torch(python):
    """`python` if it can import PyTorch, else None."""
    probe = [python, "-c", "import importlib.util as u; raise SystemExit(not u.find_spec('torch'))"]
    return None if subprocess.run(probe, check=False).returncode else python


def command(library, python, nproc):
    """What starts a script of `library`: the interpreter, or its launcher for several ranks."""
    if nproc == 1:
        return [python]
    flags = ["--standalone", "--nproc-per-node", str(nproc)]
    if library == "torch":
        return [python, "-m", "torch.distributed.run", *flags]
    return [str(Path(sys.executable).with_name("dtrun")), *flags]


def measured(start, script, arguments, env, timeout=900):
    """The JSON that `script` prints when it is started so."""
    whole = [*start, script, *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=timeout, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(whole)} failed:\n{done.stderr}")
    line = next(text for text in done.stdout.splitlines() if "{" in text)
    return json.loads(line[line.index("{") :])
