"""Wall time of the README's commands on a fresh clone, on as many cores as asked for: what a
newcomer waits.

    python benchmarks/from_nothing.py [--cores 2] [--targets setup demo test]     # writes
    results/from_nothing.json

The clone goes to a temporary folder with a virtual environment of its own; installation
speed depends on the network and on pip's cache."""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from mep.deploy import machine

HERE = Path(__file__).resolve().parent


def timed(target, folder, cores):
    "Seconds of `make target`; raises if it fails."
    start = time.perf_counter()
    pinned = ["taskset", "-c", f"0-{cores - 1}"]
    done = subprocess.run(
        [*pinned, "make", target, f"JOBS={cores}"], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"make {target} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    print(done.stdout[-1500:], flush=True)
    return round(time.perf_counter() - start, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=["setup", "demo", "test"])
    args = parser.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", HERE.parent, folder], check=True)
        for target in args.targets:
            seconds[target] = timed(target, folder, args.cores)
            print(f"make {target}: {seconds[target]} s", flush=True)
            record = dict(
                seconds=seconds,
                cores=args.cores,
                load_average=os.getloadavg()[0],
                machine=machine(),
            )
            (HERE / "results" / "from_nothing.json").write_text(
                json.dumps(record, indent=1) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main()
