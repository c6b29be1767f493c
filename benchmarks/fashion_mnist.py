"""The whole pipeline on real Fashion-MNIST: `mep run`, three seeds; writes results/fashion_mnist.json.

    MEP_DATA=folder-of-data-sets python benchmarks/fashion_mnist.py

Takes about ten minutes on 2 CPU cores. Resumes in runs/fashion_mnist if interrupted.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from mep.pipeline import Config, run
from mep.pipeline.core import command

HERE = Path(__file__).parent


def summary(rows):
    "Mean and standard deviation over seeds of every number in the rows of one network."
    keys = [k for k, v in rows[0].items() if isinstance(v, (int, float))]
    return {
        k: dict(mean=mean(v), sd=stdev(v) if len(v) > 1 else None)
        for k in keys
        for v in [[r[k] for r in rows]]
    }


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--out", default="runs/fashion_mnist")
    a = p.parse_args()
    config = Config(
        data="fashion_mnist", epochs=a.epochs, n_latency=300, out="runs/fashion_mnist/0"
    )
    reports = [run(replace(config, seed=s, out=f"{a.out}/{s}")) for s in range(a.seeds)]
    nets = {name: summary([r.nets[name] for r in reports]) for name in reports[0].nets}
    result = dict(
        what="mep run on Fashion-MNIST: train, quantize, export, measure",
        command=command(config),
        seeds=list(range(a.seeds)),
        epochs=a.epochs,
        machine=reports[0].environment,
        nets=nets,
        runs=[r.nets for r in reports],
        stages=[r.stages for r in reports],
    )
    (HERE / "results" / "fashion_mnist.json").write_text(json.dumps(result, indent=1) + "\n")
    print(reports[0])


if __name__ == "__main__":
    main()
