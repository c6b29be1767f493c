"""What importing mep does: nothing but define names. And what the shell waits for: next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mep

ROOT = Path(mep.__file__).parent
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.name != "_modidx.py")
CALLS = {
    "os.register_at_fork",
    "METHODS.update",
    "COMPRESSIONS.update",
    "register",
}  # which note something down


def doing(tree):
    "Statements of a module that do something when it is imported"

    def harmless(node):
        if isinstance(
            node,
            (
                ast.Import,
                ast.ImportFrom,
                ast.FunctionDef,
                ast.ClassDef,
                ast.Assign,
                ast.AnnAssign,
                ast.AugAssign,
            ),
        ):
            return True
        if isinstance(node, (ast.If, ast.Try, ast.For, ast.With)):
            return all(map(harmless, node.body))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return isinstance(node.value.value, str)
        return (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) in CALLS
        )

    return [ast.unparse(n) for n in tree.body if not harmless(n)]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_only_defines(path):
    assert doing(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_check_can_fail():
    assert doing(ast.parse("x = 1\nprint(x)\nx")) == ["print(x)", "x"]


def test_all_modules_import_in_silence_and_draw_nothing():
    names = [
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        for p in MODULES
    ]
    code = f"""
import importlib, sys
for name in {names}: importlib.import_module(name)
import matplotlib.pyplot as plt
assert not plt.get_fignums()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


HEAVY = ("torch", "numpy", "matplotlib", "sklearn", "onnx", "joblib")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data"],
        *(
            [c, "--help"]
            for c in (
                "run",
                "quantize",
                "compress",
                "search",
                "profile",
                "latency",
                "report",
                "data",
            )
        ),
    ],
    ids=" ".join,
)
def test_lists_and_helps_wait_for_nothing_heavy(words):
    code = f"""
import sys
from mep.pipeline.cli import main
try: main({words!r})
except SystemExit as e: assert e.code == 0
print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]" and done.returncode == 0 and done.stdout
