"""What contributors and continuous integration use: the runner of notebooks, the hash of their
code, `make check`."""

import copy
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(scope="module", autouse=True)
def importable():
    "The tools import each other by name, and a child process imports the runner."
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def notebooks(importable):
    import notebooks

    return notebooks


@pytest.fixture
def check(importable, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("check", TOOLS / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def text(source):
    return dict(cell_type="markdown", id="t1", metadata={}, source=source.splitlines(True))


def code(source, outputs=()):
    cell = text(source)
    return cell | dict(cell_type="code", execution_count=None, outputs=list(outputs))


def notebook(*cells, **mep):
    "As JSON, each cell with an id of its own."
    kernel = dict(display_name="python3", language="python", name="python3")
    metadata = dict(kernelspec=kernel) | (dict(mep=mep) if mep else {})
    cells = [cell | dict(id=f"c{i}") for i, cell in enumerate(cells)]
    return dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)


def printed(said, stream="stdout"):
    return dict(output_type="stream", name=stream, text=[said])


def saved(folder, name, *sources, **mep):
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(notebook(*map(code, sources), **mep)))
    return path


# Running


@pytest.fixture(scope="module")
def ran(notebooks, tmp_path_factory):
    "Five notebooks, one after the other: name -> how it went, in the order in which they ran."
    folder = tmp_path_factory.mktemp("book")
    paths = [
        saved(
            folder,
            "wrong",
            "x = 1",
            "#| hide\nprint('before')\nassert x == 2, 'x is one'",
            seconds=1,
        ),
        saved(folder, "dies", "import os\nos._exit(3)", seconds=2),
        saved(folder, "slow", "y = 1", "#| slow\nassert y == 2", seconds=3),
        saved(folder, "untouched", "import math\nassert math.pi > 3", seconds=4),
        saved(folder, "breaks", "import math\nmath.pi = 3", seconds=5),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "PRELOAD", ["nbdev.test"])
        patch.setenv("MPLBACKEND", "agg")
        runs = list(notebooks.run_all(paths, [], jobs=1))
        runs += notebooks.run_all(
            [saved(folder, "forced", "#| slow\nassert False")], ["slow"], jobs=1
        )
    return {run.path.stem: run for run in runs}


def test_the_longest_runs_first(ran):
    assert list(ran) == ["breaks", "untouched", "slow", "dies", "wrong", "forced"]


def test_a_notebook_that_nobody_timed_comes_before_all(notebooks, tmp_path):
    timed = [saved(tmp_path, f"n{s}", "1", seconds=s) for s in (3, 100)]
    new = saved(tmp_path, "new", "1")
    assert notebooks.longest_first([*timed, new]) == [new, timed[1], timed[0]]


def test_no_notebook_sees_what_another_did(ran):
    assert ran["breaks"].passed and ran["untouched"].passed


def test_slow_cells_run_only_when_asked_for(ran):
    assert ran["slow"].passed and not ran["forced"].passed


def test_a_failure_shows_the_cell_and_the_traceback(ran):
    wrong = ran["wrong"]
    assert not wrong.passed
    assert (
        "cell 1" in wrong.text
        and "print('before')" in wrong.text
        and "AssertionError: x is one" in wrong.text
    )


def test_a_process_that_dies_is_a_failure(ran):
    assert not ran["dies"].passed and "exit code 3" in ran["dies"].text


def test_time_and_memory_are_those_of_the_child(ran):
    for name in ("breaks", "untouched", "wrong"):
        assert 0 < ran[name].cpu and 0 < ran[name].seconds and 10e6 < ran[name].bytes < 4e9


def test_the_seconds_of_joblibs_workers_count(notebooks, tmp_path):
    work = "import time\ndef work(i):\n    end = time.process_time() + 1\n    while time.process_time() < end: pass\n"
    call = "joblib.Parallel(2)(joblib.delayed(work)(i) for i in range(4));"
    path = saved(tmp_path, "parallel", "import joblib", work + call)
    (run,) = notebooks.run_all([path], [], jobs=1)
    assert run.passed, run.text
    assert run.cpu > 4


def test_the_summary_counts_and_adds_up(notebooks):
    runs = [
        notebooks.Run(Path(name), name != "b", 1.0, 2.0, size)
        for name, size in (("a", 1e9), ("b", 3e9), ("c", 2e9))
    ]
    line = notebooks.summary(runs, 60, jobs=2)
    assert (
        "2 passed, 1 failed in 60 s" in line
        and "6 s of processor time" in line
        and "5.0 GB" in line
    )


def alive(pid):
    "Whether a process runs; one that ended and that nobody has asked about does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    assert condition()


SLEEPS = """
import os, subprocess
from pathlib import Path
p = subprocess.Popen(["sleep", "600"])
Path("pids").write_text(f"{os.getpid()} {p.pid} ")
p.wait()
"""


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="this system has no /proc to look for processes in"
)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_children_and_theirs(tmp_path, sent):
    wrote = tmp_path / "pids"
    words = [
        sys.executable,
        TOOLS / "notebooks.py",
        saved(tmp_path, "sleeps", SLEEPS),
        "--jobs",
        "1",
    ]
    # Whoever runs the tests in the background of a shell has SIGINT ignored, and children inherit that
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    runner = subprocess.Popen(words, stdout=pipe, stderr=pipe, preexec_fn=listen)
    until(lambda: wrote.exists() and wrote.read_text().count(" ") == 2)
    pids = wrote.read_text().split()
    assert all(map(alive, pids))
    runner.send_signal(sent)
    runner.communicate(timeout=60)
    assert runner.returncode == 130
    until(lambda: not any(map(alive, pids)))


def test_names_numbers_and_paths_are_found(notebooks, tmp_path):
    own = saved(tmp_path, "own", "1")
    assert [p.stem for p in notebooks.find(["24", "20_prune", str(own)])] == [
        "24_select",
        "20_prune",
        "own",
    ]
    assert len(notebooks.find([])) > 30
    with pytest.raises(SystemExit, match="no notebook '77'.*24_select"):
        notebooks.find(["77"])


# The hash of the code


def changed(before, edit):
    "A copy of a notebook after `edit` had it."
    after = copy.deepcopy(before)
    edit(after["cells"])
    return after


SAMPLE = notebook(
    text("# Title"),
    code("x = 1"),
    code("#| fig-alt: a line\nplot(x)"),
    code("#| eval: false\ngone()"),
)


def set_source(at, source):
    def edit(cells):
        cells[at]["source"] = source.splitlines(True)

    return edit


def join_first_two(cells):
    cells[1:3] = [code("x = 1\nplot(x)")]


@pytest.mark.parametrize(
    "edit",
    [
        set_source(0, "# Another title"),
        set_source(2, "#| fig-alt: a rising line\nplot(x)"),
        set_source(2, "#| echo: false\nplot(x)"),
        set_source(2, "#| slow\nplot(x)"),
        lambda cells: cells.insert(1, text("A paragraph.")),
        lambda cells: cells[1].update(outputs=[printed("1")]),
    ],
    ids=["title", "alternative text", "echo", "slow", "paragraph", "output"],
)
def test_words_and_looks_leave_outputs_fresh(notebooks, edit):
    assert notebooks.code_hash(changed(SAMPLE, edit)) == notebooks.code_hash(SAMPLE)


@pytest.mark.parametrize(
    "edit",
    [
        set_source(1, "x = 2"),
        set_source(2, "#| fig-alt: a line\nplot(y)"),
        set_source(3, "gone()"),
        lambda cells: cells.append(code("x")),
        lambda cells: cells.pop(),
        lambda cells: cells.insert(1, cells.pop(2)),
        join_first_two,
    ],
    ids=[
        "code",
        "code below a directive",
        "eval",
        "new cell",
        "cell less",
        "order",
        "cells joined",
    ],
)
def test_code_makes_outputs_stale(notebooks, edit):
    assert notebooks.code_hash(changed(SAMPLE, edit)) != notebooks.code_hash(SAMPLE)


def test_check_names_what_is_stale_and_the_command_that_mends_it(notebooks, check, tmp_path):
    path = saved(tmp_path, "chapter", "x = 1")
    assert len(check.stale(path)) == 1  # nobody said which code the outputs came from
    notebooks.stamp_all([path])
    assert check.stale(path) == []
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    (found,) = check.stale(path)
    assert found.startswith("chapter.ipynb: the outputs are older than the code above them")
    assert found.endswith("run: python tools/notebooks.py --store chapter.ipynb")


# Storing outputs


@pytest.fixture
def clean_settings(tmp_path):
    "nbdev_clean looks for settings.ini above the notebook: what it keeps is said there."
    shutil.copy(TOOLS.parent / "settings.ini", tmp_path)


def test_store_keeps_what_readers_see_and_the_hash(notebooks, tmp_path, clean_settings):
    cells = [
        "import sys\nfrom pathlib import Path\nprint('seen')\nprint('a bar', file=sys.stderr)",
        "#| slow\nprint('slow')",
        "#| eval: false\nraise ValueError",
        "print(Path.cwd().name)",
    ]
    path = saved(tmp_path, "chapter", *cells)
    assert notebooks.store_all([path]) == 0
    stored = notebooks.read(path)
    outputs = [[out["text"] for out in cell["outputs"]] for cell in stored["cells"]]
    assert outputs == [[["seen\n"]], [["slow\n"]], [], [[f"{tmp_path.name}\n"]]]
    assert not notebooks.is_stale(stored) and notebooks.remembered(stored)["seconds"] >= 0
    assert all(
        cell["metadata"] == {} and cell["execution_count"] is None for cell in stored["cells"]
    )


def test_a_notebook_that_fails_is_left_as_it_was(notebooks, tmp_path, capsys):
    path = saved(tmp_path, "chapter", "print(1)", "raise ValueError('no')")
    before = path.read_bytes()
    assert notebooks.store_all([path]) == 1
    assert path.read_bytes() == before
    said = capsys.readouterr().out
    assert "chapter.ipynb: not stored" in said and "ValueError: no" in said


# The house's rules


def module(folder, name, source):
    path = folder / "mep" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


@pytest.mark.parametrize(
    "name, source, found",
    [
        ("quant/a.py", "from ..train import fit\nfrom .grid import make_grid", ""),
        ("pipeline/a.py", "from ..quant import quantize\nfrom mep import __version__", ""),
        (
            "quant/a.py",
            "from ..compress.svd import spatial_svd",
            "imports mep.compress.svd: a wing",
        ),
        ("quant/a.py", "from mep.pipeline.core import run", "imports mep.pipeline.core: a wing"),
        (
            "a.py",
            "def f():\n    from .quant.grid import make_grid",
            "imports mep.quant.grid: a foundation",
        ),
        (
            "a.py",
            "__all__ = ['f', 'X']\nX = 1\ndef f(): pass\ndef g(): pass",
            "f is public and has no docstring",
        ),
        ("a.py", "__all__ = ['f']\ndef f(): 'Does.'", ""),
    ],
)
def test_modules_keep_the_rules(check, tmp_path, name, source, found):
    problems = check.rules(module(tmp_path, name, source))
    assert len(problems) == bool(found)
    assert found in "".join(problems)


def test_the_reference_page_names_what_is_public(check, tmp_path):
    made = module(
        tmp_path, "a.py", "__all__ = ['old', 'new', 'X']\nX = 1\ndef old(): 'Is.'\ndef new(): 'Is.'"
    )
    page = tmp_path / "reference.ipynb"
    page.write_text(json.dumps(notebook(code("table()", [printed("| [`old`](a.ipynb) | Is. |")]))))
    (found,) = check.unlisted(page, [made])
    assert "new of mep/a.py is missing" in found and "--store reference.ipynb" in found


def test_what_is_unfit_to_store_is_found(check, tmp_path):
    error = dict(output_type="error", ename="E", evalue="", traceback=[])
    outputs = [
        error,
        printed("a warning", "stderr"),
        printed("50%|#####     |"),
        printed("/home/me/file"),
    ]
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps(notebook(code("x", outputs))))
    found = "\n".join(check.stored(path))
    for what in (
        "stores an error",
        "stderr",
        "a progress bar: 50%|",
        "a path of one machine: /home/me",
    ):
        assert what in found


def test_the_book_is_found_whole(notebooks):
    assert {p.stem for p in notebooks.every_notebook()} >= {"index", "00_data", "24_select", "zoo"}
    assert os.path.commonpath(notebooks.every_notebook()) == str(notebooks.NBS)
