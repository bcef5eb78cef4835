"""What dtrain runs on, for a report of a bug: `python -m dtrain`, as torch.utils.collect_env.

Owns: the facts (`get_env_info`), their text (`get_pretty_env_info`) and the command. Nothing is
sent anywhere, nothing is changed; of the environment only the variables that dtrain, dtrun and the
libraries below it read are shown. `--json` prints the same facts for programs: `dtrun doctor`
judges them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import metadata
from typing import Any

import numpy as np
import zmq

from dtrain import machine
from dtrain.version import __version__

__all__ = ["get_env_info", "get_pretty_env_info", "main"]

PACKAGES = (
    *("numpy", "pyzmq", "msgpack", "cloudpickle", "psutil", "threadpoolctl", "safetensors"),
    *("ml-dtypes", "mpi4py", "torch"),
)
# All of docs/environment.md with this prefix: another one is a slip of the pen.
OWN = "DTRAIN_"
KNOWN = (
    *("DATA_PLANE", "DEBUG", "GID", "LOCAL_ADDR", "LOCAL_RANK", "LOG", "MEMORY"),
    *("RUN_DIR", "SECRET_FILE", "STALL_WARNING", "TRACE", "UID"),
)
SHOWN = ("DTRAIN_", "PET_", "TORCH", "OMP_", "OPENBLAS_", "MKL_", "BLIS_", "GOTO_", "MALLOC_")
SHOWN_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "PYTHON_EXEC", "LOGLEVEL"),
)


def get_env_info() -> dict[str, Any]:
    """The facts, as JSON has them: text, numbers, None for what is not there, lists and dicts."""
    return {
        "dtrain": __version__,
        "python": sys.version.replace("\n", ""),
        "executable": sys.executable,
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "cores_usable": machine.cores(),
        "processor_quota": machine.processor_quota(),
        "memory_limit": machine.memory_limit(),
        "memory_available": machine.available_memory(),
        "blas": blas_libraries(),
        "products_exact": products_are_exact(np.matmul),
        "zmq": zmq.zmq_version(),
        "zmq_curve": bool(zmq.has("curve")),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": variables(os.environ),
        "unknown_variables": unknown_variables(os.environ),
    }


def blas_libraries() -> list[dict[str, Any]]:
    """Each BLAS that NumPy has loaded: its name, version, kernels, threads and file."""
    import threadpoolctl

    found = threadpoolctl.threadpool_info()
    keys = ("internal_api", "version", "architecture", "num_threads", "filepath")
    return [{k: one.get(k) for k in keys} for one in found if one["user_api"] == "blas"]


def products_are_exact(matmul: Callable[[Any, Any], Any]) -> bool:
    """Whether matrix products are right, by some whose result is exact in whole numbers.

    An OpenBLAS that takes the kernels of another processor may compute nonsense.
    """
    for size, kind in ((96, np.float32), (257, np.float64)):
        x = np.arange(size * size).reshape(size, size) % 7 - 3
        wanted = np.einsum("ij,jk->ik", x, x.T)
        if not np.array_equal(matmul(x.astype(kind), x.T.astype(kind)), wanted):
            return False
    return True


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of the environment that decide how dtrain runs, sorted by name."""
    mine = {n: v for n, v in environ.items() if n.startswith(SHOWN) or n in SHOWN_NAMES}
    return dict(sorted(mine.items()))


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """{name: the nearest that is read, or ""} of those with our prefix that nothing reads."""
    own = sorted(name.removeprefix(OWN) for name in environ if name.startswith(OWN))
    near = {name: get_close_matches(name, KNOWN, n=1) for name in own if name not in KNOWN}
    return {OWN + name: OWN + found[0] if found else "" for name, found in near.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def get_pretty_env_info() -> str:
    """The facts as a text to paste into a report, without a newline at the end."""
    facts = get_env_info()
    unknown = facts.pop("unknown_variables")
    packages, chosen, blas = (facts.pop(name) for name in ("packages", "variables", "blas"))
    lines = [f"{name.replace('_', ' ')}: {_words(name, value)}" for name, value in facts.items()]
    lines += ["", "blas:"]
    for one in blas or [{"none": "that threadpoolctl knows"}]:
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in one.items()))
    lines += ["", "packages:"]
    lines += [f"  {name}: {version or 'not installed'}" for name, version in packages.items()]
    lines += ["", "variables:"]
    lines += [f"  {name}={value}" for name, value in chosen.items()] or ["  none is set"]
    lines += [f"  {name}: nothing reads it" for name in unknown]
    return "\n".join(lines)


def _words(name: str, value: Any) -> str:
    if value is None:
        return "no limit" if name in ("processor_quota", "memory_limit") else "unknown"
    if name.startswith("memory_"):
        return f"{value / 2**30:.1f} GiB"
    return str(value)


def main() -> None:
    """Print the report; `--json` for the facts as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m dtrain", description="What dtrain runs on.")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args()
    print(json.dumps(get_env_info()) if given.json else get_pretty_env_info())


if __name__ == "__main__":
    main()
