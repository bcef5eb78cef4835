"""The wheel and the source archive: what they hold, what they ask for, what they install.

Both are built once, without a network: the build backend is part of the `test` extra.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes, message_from_string
from email.message import Message
from pathlib import Path

import pytest

import dtrain
from tests.tree import ROOT, SHIPPED, sources

CORE = [
    "numpy",
    "pyzmq",
    "msgpack>=1.2.3",
    "cloudpickle",
    "psutil",
    "threadpoolctl",
    "safetensors",
    "ml-dtypes",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive; the wheel is built from the archive."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    return message_from_bytes(wheel.read(f"{dist_info(wheel)}/METADATA"))


def dist_info(wheel: zipfile.ZipFile) -> str:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    return folder


def requirements(metadata: Message) -> list[str]:
    """What a plain install asks for; requirements of extras carry a marker."""
    return [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]


def test_top_level_is_two_packages_and_pure_python(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "dtrain",
        "dtrun",
        dist_info(wheel),
    }
    assert Path(wheel.filename).name.endswith("-py3-none-any.whl")


def test_every_shipped_file_is_in_the_wheel_and_no_litter(wheel):
    inside = {name for name in wheel.namelist() if not name.startswith(dist_info(wheel))}
    shipped = {
        str(path.relative_to(folder.parent))
        for folder in SHIPPED.values()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".typed")
    }
    assert shipped <= inside
    assert not [name for name in inside if "__pycache__" in name]


def test_both_packages_are_typed(wheel):
    assert {"dtrain/py.typed", "dtrun/py.typed"} <= set(wheel.namelist())


def test_console_script(wheel):
    text = wheel.read(f"{dist_info(wheel)}/entry_points.txt").decode()
    assert text.split("\n")[:2] == ["[console_scripts]", "dtrun = dtrun.cli:main"]


def test_core_dependencies_are_exactly_these(metadata):
    assert sorted(requirements(metadata)) == sorted(CORE)


def test_a_further_dependency_would_be_seen():
    text = "Requires-Dist: numpy\nRequires-Dist: scipy\nRequires-Dist: pytest; extra == 'test'\n"
    assert requirements(message_from_string(text)) == ["numpy", "scipy"]


def test_metadata_says_who_we_are(metadata):
    assert metadata["Name"] == "dtrain"
    assert metadata["Version"] == dtrain.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"test", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_the_licence_is_inside(wheel):
    licence = wheel.read(f"{dist_info(wheel)}/licenses/LICENSE").decode()
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence


def test_the_source_archive_can_be_tested(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "Makefile", "LICENSE", "tests/test_packaging.py"} <= inside
    assert not [name for name in inside if name.startswith(".venv") or "__pycache__" in name]


def test_the_version_is_stated_once():
    pattern = re.compile(rf"['\"]{re.escape(dtrain.__version__)}['\"]")
    texts = {name: path.read_text(encoding="utf-8") for name, path in sources().items()}
    assert [name for name, text in texts.items() if pattern.search(text)] == ["dtrain.version"]
