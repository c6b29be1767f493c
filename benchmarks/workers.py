"""One library of blocks on 1, 2 and 4 Dask workers of one machine, and without any; writes
results/workers.json.

    python benchmarks/workers.py

Takes about two minutes on 2 CPU cores. Workers that share a core share its time: run it on
a machine with nothing else to do, the load is recorded."""

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from distributed import LocalCluster

from mep.data import from_arrays, shapes
from mep.deploy import machine
from mep.nas.bkd import BlockLibrary
from mep.nas.space import choices, default_space
from mep.pipeline.workers import on_workers

HERE = Path(__file__).parent


def problem(n):
    """Images, a space and its untrained reference: how long a block takes to teach doesn't
    depend on what the teacher knows."""
    x, y, *_ = shapes(n + 200, size=32)
    data = from_arrays(x[:n], y[:n], x[n:], y[n:], n_valid=100)
    space = default_space(
        16, (3, 32, 32), 16, options=choices("basic", width=(1.0, 0.75, 0.5, 0.25))
    )
    return data, space, space.build(space.reference)


def measure(workers, data, space, teacher, epochs):
    "Seconds until the workers are ready, and seconds for the blocks."
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cluster = (
            LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=50
            )
            if workers
            else nullcontext()
        )
        with (
            cluster,
            on_workers(cluster.scheduler_address, folder=folder) if workers else nullcontext(),
        ):
            ready = time.perf_counter()
            library = BlockLibrary(folder, space, teacher).train(
                data, epochs=epochs, progress=False
            )
            end = time.perf_counter()
        table = [list(map(float, row)) for row in library.nsr_table()]
    blocks = sum(map(len, table))
    return (
        dict(
            workers=workers,
            start=ready - start,
            seconds=end - start,
            blocks_per_s=blocks / (end - ready),
        ),
        table,
        blocks,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--images", type=int, default=1000)
    p.add_argument("--epochs", type=float, default=1)
    a = p.parse_args()
    torch.set_num_threads(1)
    data, space, teacher = problem(a.images)
    load = os.getloadavg()
    found = [measure(n, data, space, teacher, a.epochs) for n in (0, 1, 2, 4)]
    assert all(table == found[0][1] for _, table, _ in found), (
        "workers got other numbers than one process"
    )
    result = dict(
        what="one library of blocks on several workers of one machine",
        seed=0,
        images=a.images,
        epochs=a.epochs,
        blocks=found[0][2],
        rows=[row for row, _, _ in found],
        cores=len(os.sched_getaffinity(0)),
        load_before=load,
        machine=machine(),
    )
    (HERE / "results" / "workers.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(row)


if __name__ == "__main__":
    main()
