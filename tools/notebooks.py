"""Run the book's notebooks, each in a process of its own, or store their outputs.

python tools/notebooks.py                     run them all as nbdev_test does: without what
is marked slow or gpu python tools/notebooks.py --flags slow        slow cells, too python
tools/notebooks.py 24_select 33        these only: names, numbers or paths python
tools/notebooks.py --store 24_select   execute every cell, and store the outputs in the
notebook python tools/notebooks.py --stamp 24_select   only say that the stored outputs are
those of the code above them

Two things are remembered in a notebook's metadata, under "mep": a hash of the code that its
stored outputs came from, by which tools/check.py knows outputs that are older than their
code, and the seconds that its quick cells took, by which the longest runs first."""

import argparse
import faulthandler
import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from datetime import datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
# What most notebooks import is loaded once and inherited by each process. Nothing here starts a thread, for threads
# don't survive a fork: onnxruntime does, so it is not here.
PRELOAD = [
    "torch",
    "torchvision",
    "torch.onnx",
    "torch.export",
    "sklearn.linear_model",
    "scipy.stats",
    "matplotlib.pyplot",
    "nbdev.test",
    "nbdev.showdoc",
]
QUIET = dict(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="agg"
)  # one thread a process, no windows
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*?)[ \t]*$", re.M)


# Notebooks as files


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, notebook):
    path.write_text(
        json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def directives(cell):
    "The nbdev directives of a cell: name -> what follows it."
    return dict(DIRECTIVE.findall("".join(cell["source"])))


def is_off(cell):
    "Whether a cell is never executed."
    return directives(cell).get("eval", "").lower() == "false"


def code_hash(notebook):
    "A hash of what the outputs depend on: the code cells in order, without what says how they are shown."
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        code = DIRECTIVE.sub("", "".join(cell["source"])).strip()
        digest.update(f"{'off' if is_off(cell) else 'on'}: {code}\0".encode())
    return digest.hexdigest()[:16]


def remembered(notebook):
    "What the notebook's metadata say about the run that its outputs come from."
    return notebook["metadata"].get("mep", {})


def is_stale(notebook):
    "Whether the code changed since the outputs were stored."
    return remembered(notebook).get("code") != code_hash(notebook)


def stamp(notebook, **more):
    "Remember that the outputs are those of the code as it is now."
    notebook["metadata"]["mep"] = {**remembered(notebook), "code": code_hash(notebook), **more}


def every_notebook():
    "The book's notebooks, by nbdev's rule: what begins with _ or . is none."
    found = sorted(NBS.rglob("*.ipynb"))
    return [
        path for path in found if not any(part[0] in "._" for part in path.relative_to(NBS).parts)
    ]


def find(names):
    "The notebooks that are meant by names (24_select), numbers (24) or paths. Exits if there is none."
    book = every_notebook()
    found = []
    for name in names:
        meant = [p for p in book if name in (p.stem, p.stem.split("_")[0])]
        if Path(name).is_file():
            meant = [Path(name).resolve()]
        if not meant:
            known = " ".join(p.stem for p in book)
            sys.exit(f"no notebook {name!r}: give a path, or a name or number of these: {known}")
        found += meant
    return found or book


def title(path):
    "A notebook's name in what is printed."
    return path.relative_to(NBS).as_posix() if path.is_relative_to(NBS) else path.name


# Running: in the child


class Run(NamedTuple):
    "How one notebook went."

    path: Path
    passed: bool
    seconds: float  # by the clock
    cpu: float  # seconds of processor time, of its own children as well
    bytes: int  # of memory: its own peak and that of its largest child
    text: str = ""  # what to read if it failed


def used():
    """Seconds of processor time and the peak of memory in bytes, of this process and of the
    children that have ended."""
    mine, others = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    cpu = sum(r.ru_utime + r.ru_stime for r in (mine, others))
    unit = 1 if sys.platform == "darwin" else 1024
    return cpu, (mine.ru_maxrss + others.ru_maxrss) * unit


def end_workers():
    """End joblib's workers, which would wait for more to do: what they used counts as ours
    only when they have ended."""
    if "joblib.externals.loky" in sys.modules:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)


def child(path, flags, log, pipe):
    "Run one notebook and send how it went; what is written to the terminal goes to the file `log`."
    start = time.perf_counter()  # not in the parent: the first child waits until PRELOAD is loaded
    os.setpgrp()  # the parent ends us and what we started, all at once
    to = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(to, stream)
    faulthandler.enable()
    from nbdev.config import get_config
    from nbdev.test import test_nb

    os.chdir(NBS)
    passed, _ = test_nb(
        path, skip_flags=get_config().tst_flags.split(), force_flags=flags, basepath=ROOT
    )
    source = "" if passed else failing_cell(path)
    end_workers()
    sys.stderr.flush()
    pipe.send((bool(passed), time.perf_counter() - start, *used(), source))


def failing_cell(path):
    "The source of the cell that the notebook's shell stopped in."
    from IPython.core.interactiveshell import InteractiveShell

    at = getattr(InteractiveShell._instance, "_cell_idx", None)
    return f"cell {at - 1}:\n\n" + "".join(read(path)["cells"][at - 1]["source"]) if at else ""


# Running: in the parent


class Job:
    "A notebook that runs."

    def __init__(self, context, path, flags, folder):
        self.path = path
        self.log = Path(folder) / f"{title(path).replace('/', '-')}.log"
        self.start = time.perf_counter()
        self.pipe, end = context.Pipe(duplex=False)
        self.process = context.Process(target=child, args=(path, flags, self.log, end))
        self.process.start()
        end.close()

    def result(self):
        "Wait for the end. A process that died before it could say how it went has failed."
        self.process.join()
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        try:
            passed, seconds, cpu, peak, source = self.pipe.recv()
        except EOFError:
            seconds = time.perf_counter() - self.start
            died = f"the process died with exit code {self.process.exitcode}"
            return Run(self.path, False, seconds, 0, 0, f"{died}\n\n{log}")
        return Run(self.path, passed, seconds, cpu, peak, f"{source}\n\n{log}")

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # ended just now, or has no group of its own yet
            self.process.kill()


def longest_first(paths):
    "By the seconds they once took; one that nobody timed may be long, so it comes first."
    return sorted(paths, key=lambda path: -remembered(read(path)).get("seconds", float("inf")))


def run_all(paths, flags, jobs):
    "Run notebooks, `jobs` at a time, and yield each one's `Run` as it ends."
    fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if fork else "spawn")
    if (
        fork and len(paths) > jobs
    ):  # else nobody would inherit anything that another has not loaded as soon
        context.set_forkserver_preload(PRELOAD)
    waiting, running = longest_first(paths), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    job = Job(context, waiting.pop(0), flags, folder)
                    running[job.process.sentinel] = job
                for sentinel in wait(running):
                    yield running.pop(sentinel).result()
        finally:
            for job in running.values():
                job.kill()


def line(run):
    numbers = f"{run.seconds:7.1f} s {run.cpu:7.1f} s {run.bytes / 1e9:6.2f} GB"
    return f"{numbers}  {title(run.path)}{'' if run.passed else '  FAILED'}"


def summary(runs, seconds, jobs):
    failed = sum(not run.passed for run in runs)
    peak = sum(sorted(run.bytes for run in runs)[-jobs:]) / 1e9  # if the largest met
    cost = f"{sum(run.cpu for run in runs):.0f} s of processor time; at most {peak:.1f} GB at once"
    return f"notebooks: {len(runs) - failed} passed, {failed} failed in {seconds:.0f} s ({cost})"


def test(paths, flags, jobs):
    "Run notebooks and print how each went. Returns how many failed."
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    print(
        f"{len(paths)} notebooks, {jobs} at a time, the longest first: time, processor time, peak memory",
        flush=True,
    )
    start, runs = time.perf_counter(), []
    for run in run_all(paths, flags, jobs):
        runs.append(run)
        print(line(run), flush=True)
    failed = [run for run in runs if not run.passed]
    for run in failed:
        print(f"\n{'=' * 30} {title(run.path)}, {run.text.strip()}\n")
    print(summary(runs, time.perf_counter() - start, jobs), flush=True)
    return len(failed)


# Storing outputs


def fit_to_store(output):
    "Whether an output is for readers: neither a progress bar or a warning on stderr, nor a widget."
    return output.get(
        "name"
    ) != "stderr" and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def took(cell):
    "Seconds that a cell's execution took, from the moments that nbclient writes down."
    at = cell["metadata"].get("execution", {})
    moments = [at.get(f"iopub.status.{state}") for state in ("busy", "idle")]
    if None in moments:
        return 0
    busy, idle = (datetime.fromisoformat(moment.replace("Z", "+00:00")) for moment in moments)
    return (idle - busy).total_seconds()


def execute(path):
    """The notebook with fresh outputs, and the seconds its quick cells took. Raises nbclient's
    CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *args, **kw):
            return cell if is_off(cell) else await super().async_execute_cell(cell, *args, **kw)

    os.environ.pop("MPLBACKEND", None)  # Jupyter's own shows the pictures
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    notebook = nbformat.read(path, as_version=4)
    where = dict(metadata=dict(path=str(path.parent)))
    Client(notebook, timeout=None, coalesce_streams=True, resources=where).execute()
    quick = [cell for cell in code_cells(notebook) if not {"slow", "gpu"} & directives(cell).keys()]
    for cell in code_cells(notebook):
        cell["outputs"] = [output for output in cell["outputs"] if fit_to_store(output)]
    return notebook, round(sum(map(took, quick)))


def store(path):
    "Execute one notebook and write it with its outputs, clean. A notebook that fails is left as it was."
    import nbformat
    from nbdev.clean import nbdev_clean

    notebook, seconds = execute(path)
    stamp(notebook, seconds=seconds)
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


def store_all(paths):
    "Store every notebook's outputs. Returns how many failed."
    from nbclient.exceptions import CellExecutionError

    failed = 0
    for path in paths:
        start = time.perf_counter()
        try:
            store(path)
            print(f"{time.perf_counter() - start:7.1f} s  {title(path)}", flush=True)
        except CellExecutionError as error:
            failed += 1
            print(f"{title(path)}: not stored.\n{COLOUR.sub('', str(error))}", flush=True)
    return failed


def stamp_all(paths):
    for path in paths:
        notebook = read(path)
        stamp(notebook)
        write(path, notebook)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="notebooks: names, numbers or paths; none: all")
    parser.add_argument(
        "--flags", default="", help="run cells that settings.ini leaves out: 'slow gpu'"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="at a time (default: one a processor)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--store", action="store_true", help="execute every cell and store the outputs"
    )
    mode.add_argument(
        "--stamp", action="store_true", help="take the stored outputs for those of today's code"
    )
    args = parser.parse_args()
    paths = find(args.names)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a runner that is ended ends its children, too
    os.chdir(ROOT)
    if args.stamp:
        return stamp_all(paths)
    return store_all(paths) if args.store else test(paths, args.flags.split(), args.jobs)


if __name__ == "__main__":
    try:
        sys.exit(bool(main()))
    except KeyboardInterrupt:
        sys.exit(130)
