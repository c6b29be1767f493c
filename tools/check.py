"""The sync check: clean -> export -> clean must change nothing, what the notebooks store must
come from their code and be fit to publish, and the modules must keep the house's rules, as
far as a machine can tell.

Works on the tree as it is, committed or not: it compares files before and after, so it never needs git."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import is_stale, read  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MAX_NOTEBOOK, MAX_PICTURE = 500_000, 120_000  # bytes: a notebook on disk, one stored picture
PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|opt|var|usr)/[\w.-]+")
BAR = re.compile(r"\d+%\|")
ADDRESS = re.compile(r"object at 0x[0-9a-f]+")
WINGS = {"nas", "compress", "quant", "conditional"}


def files():
    return [
        p
        for d in ("nbs", "mep")
        for p in sorted((ROOT / d).rglob("*"))
        if p.is_file()
        and p.suffix in {".ipynb", ".py", ".yml"}
        and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)
    ]


def snapshot():
    return {p.relative_to(ROOT): hashlib.sha256(p.read_bytes()).hexdigest() for p in files()}


def run(tool):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = subprocess.run([tool], cwd=ROOT, env=env, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{tool} failed:\n{out.stdout}{out.stderr}")


def in_sync():
    before = snapshot()
    for tool in ("nbdev_clean", "nbdev_export", "nbdev_clean"):
        run(tool)
    after = snapshot()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    return [
        f"{p}: changed by clean -> export; review it and commit notebook and module together"
        for p in changed
    ]


def orphans():
    "Modules that say they come from a notebook which is gone."
    made = re.compile(r"File to edit: (\S+\.ipynb)")
    found = []
    for p in (ROOT / "mep").rglob("*.py"):
        m = made.search(p.read_text(encoding="utf-8")[:600])
        if m and not (p.parent / m[1]).resolve().exists():
            found.append(
                f"{p.relative_to(ROOT)}: its notebook {m[1]} does not exist; delete the module or restore the notebook"
            )
    return found


def public(tree):
    "The names in a module's __all__."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def undocumented(tree):
    "Public functions and classes without a docstring."
    names = public(tree)
    for node in tree.body:
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and node.name in names
            and not ast.get_docstring(node)
        ):
            yield f"{node.name} is public and has no docstring"


def imported(tree, module):
    """The modules of mep that a module imports, by their full names: exported code says `from
    ..train import fit`."""
    package = module.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*above, node.module or ""])


def forbidden(tree, module):
    """Imports against the house's order: foundations, then four wings that don't know each
    other, then the pipeline."""
    room = module.relative_to(ROOT / "mep").parent.as_posix()
    above = {".": WINGS | {"pipeline"}, "pipeline": set()}.get(room, WINGS - {room} | {"pipeline"})
    for name in imported(tree, module):
        if name.startswith("mep.") and name.split(".")[1] in above:
            who = "a foundation" if room == "." else "a wing"
            yield f"imports {name}: {who} imports foundations only, and what two wings need is one"


def rules(module):
    "What a module of mep does against the house's rules."
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return [
        f"{module.relative_to(ROOT)}: {what}"
        for what in (*undocumented(tree), *forbidden(tree, module))
    ]


def unlisted(reference, modules):
    """Public functions and classes that the reference page, whose outputs are made from the
    modules, doesn't name yet."""
    page = reference.read_text(encoding="utf-8")
    for module in modules:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        defined = {
            node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        for name in sorted(defined.intersection(public(tree))):
            if f"[`{name}`]" not in page:
                yield (
                    f"{reference.relative_to(ROOT)}: {name} of {module.relative_to(ROOT)} is missing; "
                    f"run: python tools/notebooks.py --store {reference.relative_to(ROOT)}"
                )


def stale(path):
    "A notebook whose code changed since its outputs were stored."
    name = path.relative_to(ROOT)
    again = f"the outputs are older than the code above them; run: python tools/notebooks.py --store {name}"
    return [f"{name}: {again}"] if is_stale(read(path)) else []


def stored(path):
    "What a notebook stores that it should not."
    name, cells = path.relative_to(ROOT), json.loads(path.read_text(encoding="utf-8"))["cells"]
    if path.stat().st_size > MAX_NOTEBOOK:
        yield (
            f"{name}: {path.stat().st_size // 1000} kB; keep it under {MAX_NOTEBOOK // 1000} "
            "kB (fewer or smaller pictures)"
        )
    for i, cell in enumerate(cells):
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            text = "\n".join(
                "".join(t)
                for t in (
                    out.get("text", ""),
                    *(data.get(k, "") for k in ("text/plain", "text/html", "text/markdown")),
                )
            )
            if out.get("output_type") == "error":
                yield f"{name}, cell {i}: stores an error; run the notebook top to bottom"
            if out.get("name") == "stderr":
                yield f"{name}, cell {i}: stores what went to stderr (a warning or a progress bar)"
            for what, pattern in (
                ("a path of one machine", PATH),
                ("a progress bar", BAR),
                ("an object's address", ADDRESS),
            ):
                if m := pattern.search(text):
                    yield f"{name}, cell {i}: stores {what}: {m[0]}"
            if "application/vnd.jupyter.widget-view+json" in data:
                yield f"{name}, cell {i}: stores a widget, which readers of the site cannot see"
            picture = len("".join(data.get("image/png", ""))) * 3 // 4
            if picture > MAX_PICTURE:
                yield f"{name}, cell {i}: a picture of {picture // 1000} kB; keep it under {MAX_PICTURE // 1000} kB"


def main():
    problems = in_sync() + orphans()
    notebooks = [p for p in files() if p.suffix == ".ipynb"]
    modules = [
        p for p in files() if p.suffix == ".py" and p.name not in ("__init__.py", "_modidx.py")
    ]
    problems += [s for p in notebooks for s in (*stale(p), *stored(p))]
    problems += [s for p in modules for s in rules(p)]
    problems += unlisted(ROOT / "nbs" / "reference.ipynb", modules)
    fresh = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "readme.py"), "--check"],
        capture_output=True,
        text=True,
    )
    if fresh.returncode:
        problems.append(fresh.stdout.strip() or fresh.stderr.strip())
    fine = (
        f"check: ok ({len(notebooks)} notebooks in sync with mep/, outputs of today's code "
        "and fit to publish, README.md fresh)"
    )
    print("\n".join(problems) or fine)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
