"""The package as others get it: built from its own source distribution, with all that it
imports declared and nothing that it doesn't."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = [
    "setup.py",
    "settings.ini",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "constraints.txt",
]
CALLED = {"PIL": "pillow", "sklearn": "scikit-learn"}  # import name -> distribution
OPTIONAL = {"distributed", "IPython"}  # asked for by one function each, which says so


def requirements():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return {r.partition(">")[0].partition("<")[0] for r in cfg["DEFAULT"]["requirements"].split()}


def imported():
    "Third-party packages that a module of mep imports"
    names = set()
    for path in (ROOT / "mep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {a.name.partition(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"mep"}


def test_what_is_imported_is_required_and_nothing_else():
    used = {CALLED.get(n, n) for n in imported() - OPTIONAL}
    assert used - requirements() == set()
    assert requirements() - used - {"onnxscript"} == set()  # torch.onnx imports it


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    here = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        shutil.copy(ROOT / name, here)
    shutil.copytree(ROOT / "mep", here / "mep", ignore=shutil.ignore_patterns("__pycache__"))
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next((here / "dist").glob("*.tar.gz"))


def test_a_wheel_from_the_source_distribution(sdist, tmp_path):
    with tarfile.open(sdist) as tar:
        # 3.11.3 and older know no filter
        tar.extractall(tmp_path, **(dict(filter="data") if hasattr(tarfile, "data_filter") else {}))
    folder = next(tmp_path.iterdir())
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(tmp_path / "wheels"),
        str(folder),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next((tmp_path / "wheels").glob("*.whl"))).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mep").rglob("*.py")}
    assert modules <= set(names) and "mep/py.typed" in names
