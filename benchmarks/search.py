"""The search, held against what is exact: evolution against merged blocks, tables against
networks, composed files against exported ones; writes results/search.json.

    python benchmarks/search.py                       # some 15 minutes on 2 quiet cores;
    measured times are kept under runs/search
    python benchmarks/search.py --only hypervolume    # no timing at all: a minute

hypervolume: NSGA-II (50 and 200 generations of 48), as many random architectures, and
Optuna's NSGA-II, each as a share of the exact front's, on additive objectives: a predictor
             drawn at random (its seed is the search's) against MACs, and against the tables
             of block latencies of two scenarios where they have been measured.
table:       error of the block latency table on random architectures that it has not seen,
in each scenario, beside what the measurement itself repeats to. compose:     seconds per
measured architecture with composition and with torch's export. accuracies:  the 40 networks
of benchmarks/predictor.py (shapes) that predictors are fitted with, and the ratios of its
library's blocks, if that benchmark has run here; the chapter searches with them. Optuna
gets a virtual environment of its own (--optuna-env, default runs/optuna), made on the first
run with a pinned version; --optuna-env '' leaves it out."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from mep.deploy import export_onnx, latencies, machine
from mep.nas.search import (
    Additive,
    Deployment,
    Measured,
    hypervolume,
    latency_table,
    macs_cost,
    pareto_front,
    search,
)
from mep.nas.space import default_space
from mep.store import Store, write_atomic

HERE = Path(__file__).resolve().parent
OPTUNA = "optuna==4.5.0"
POPULATION = 48
SCENARIOS = {
    "base": Deployment(),
    "int8": Deployment(precision="int8"),
    "4 threads": Deployment(threads=4, resolution=48),
    "large images": Deployment(resolution=48),
    "old compiler": Deployment(level="basic"),
}


class Drawn:
    """An additive predictor drawn at random: more for more MACs, something for each kind of
    cell, noise for each option"""

    def __init__(self, space, seed):
        rng = np.random.default_rng(seed)
        kinds = {
            c: rng.normal(0, 0.25)
            for c in sorted({o.cell for p in space.blocks for o in p.options})
        }
        self.space, self.intercept = space, -0.3
        self.terms = [
            np.array(
                [
                    kinds[o.cell] + 0.12 * np.log1p(m / 1e5) + 0.1 * rng.normal()
                    for o, m in zip(p.options, t)
                ]
            )
            for p, t in zip(space.blocks, space.macs_table())
        ]

    def predict(self, archs):
        return 1 / (
            1
            + np.exp(
                -self.intercept - sum(t[v] for t, v in zip(self.terms, self.space.encode(archs).T))
            )
        )


def mean_sd(values):
    return dict(
        mean=statistics.mean(values),
        sd=statistics.stdev(values) if len(values) > 1 else 0.0,
        values=values,
    )


# Hypervolume

OPTUNA_CODE = """
import json, sys, time
import numpy as np, optuna
job = json.load(sys.stdin)
optuna.logging.set_verbosity(optuna.logging.ERROR)
cost, gain = ([np.array(t) for t in job[k]] for k in ("cost", "gain"))
seen = []
def objective(trial):
    x = [trial.suggest_categorical(str(i), list(range(len(t)))) for i, t in enumerate(cost)]
    seen.append(x)
    return float(sum(t[i] for t, i in zip(cost, x))), float(sum(t[i] for t, i in zip(gain, x)))
sampler = optuna.samplers.NSGAIISampler(population_size=job["population"], seed=job["seed"])
study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
start = time.perf_counter()
study.optimize(objective, n_trials=job["n"])
json.dump(dict(x=seen, seconds=time.perf_counter() - start), sys.stdout)
"""


def optuna_python(env):
    python = Path(env) / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(env, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", OPTUNA, "numpy"], check=True)
    return python


def by_optuna(env, space, predictor, cost, n, seed):
    job = dict(
        cost=[list(map(float, t)) for t in cost.terms],
        gain=[list(t) for t in predictor.terms],
        n=n,
        seed=seed,
        population=POPULATION,
    )
    out = json.loads(
        subprocess.run(
            [optuna_python(env), "-c", OPTUNA_CODE],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    return space.decode(np.array(out["x"])), out["seconds"]


def front_of(archs, predictor, cost):
    return pareto_front(archs, predictor.predict(archs), cost(archs), cost.unit)


def one_hypervolume(space, cost, seed, env):
    "Method -> (share, evaluations, seconds) for one draw of the predictor"
    predictor, rows = Drawn(space, seed), {}
    start = time.process_time()
    exact = search(space, predictor, cost)
    rows["exact"] = 1.0, len(exact), time.process_time() - start
    for generations in (50, 200):
        start = time.process_time()
        front = search(
            space,
            predictor,
            cost,
            how="nsga2",
            population=POPULATION,
            generations=generations,
            seed=seed,
            progress=False,
        )
        n = front.history[-1][0]
        rows[f"nsga2 {generations}"] = hypervolume(front, exact), n, time.process_time() - start
        rows[f"random {generations}"] = (
            hypervolume(front_of(space.sample(n, seed), predictor, cost), exact),
            n,
            None,
        )
    if env:
        archs, seconds = by_optuna(env, space, predictor, cost, POPULATION * 50, seed)
        rows["optuna 50"] = (
            hypervolume(front_of(archs, predictor, cost), exact),
            len(set(archs)),
            seconds,
        )
    return rows


def hypervolumes(space, costs, seeds, env, store):
    out = {}
    for name, cost in costs.items():
        runs = [
            store.cached(
                f"hypervolume/{name.replace(' ', '-')}/{cost.key[-16:]}/{seed}",
                lambda: ({}, one_hypervolume(space, cost, seed, env)),
            ).meta
            for seed in range(seeds)
        ]
        out[name] = {
            m: dict(
                share=mean_sd([r[m][0] for r in runs]),
                evaluated=statistics.mean(r[m][1] for r in runs),
                seconds=None if runs[0][m][2] is None else statistics.mean(r[m][2] for r in runs),
            )
            for m in runs[0]
        }
        for m, r in out[name].items():
            print(
                f"{name:12} {m:11} {r['share']['mean']:.4f} +- {r['share']['sd']:.4f}  {r['evaluated']:.0f} evaluated",
                flush=True,
            )
    return out


# Tables


def table_error(space, name, store, n, rounds):
    "(what is reported, the table)"
    measured, archs, start = (
        Measured(space, SCENARIOS[name], store, rounds=rounds),
        space.sample(n, seed=1000),
        time.perf_counter(),
    )
    table = latency_table(measured)
    seconds = time.perf_counter() - start
    ms, again = (
        measured(archs),
        Measured(space, SCENARIOS[name], store.root / "again", rounds=rounds)(archs),
    )
    ratio = again / ms * np.median(ms / again)  # the reference's own time cancels
    off, repeat = np.abs(table(archs) / ms - 1), np.abs(ratio - 1)
    tau = {
        k: float(kendalltau(a, b).statistic)
        for k, a, b in (
            ("table", table(archs), ms),
            ("repeat", again, ms),
            ("macs", macs_cost(space)(archs), ms),
        )
    }
    row = dict(
        deployment=str(SCENARIOS[name]),
        networks=n,
        fastest_ms=float(ms.min()),
        slowest_ms=float(ms.max()),
        reference_ms=float(measured([space.reference])[0]),
        table_seconds=seconds,
        error=dict(median=float(np.median(off)), p90=float(np.percentile(off, 90))),
        repeat=dict(median=float(np.median(repeat)), p90=float(np.percentile(repeat, 90))),
        tau=tau,
        load=os.getloadavg()[0],
    )
    print(
        (
            f"{name:13} error median {off.mean():.1%}/{np.median(off):.1%}, repeat "
            f"{np.median(repeat):.1%}, tau {tau}, {seconds:.0f} s"
        ),
        flush=True,
    )
    return row, table


# Composition


def compose_cost(space, n, rounds):
    "Seconds to a file, and to a measurement, for each way"
    archs, measured, rows = space.sample(n, seed=7), Measured(space, rounds=rounds), {}
    measured(archs[:1])
    for i, p in enumerate(space.blocks):
        for o in p.options:
            measured.composer.part(i, o)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx"
        ways = {
            "composed": lambda a: measured.composer.write(a, path),
            "exported": lambda a: export_onnx(space.build(a), path, space.input_shape, check=False),
        }
        for a in archs:
            for way, make in ways.items():
                start = time.process_time()
                make(a)
                file_s = time.process_time() - start
                start = time.process_time()
                latencies({"": path}, space.input_shape, n=rounds, warmup=3)
                rows.setdefault(way, []).append((file_s, file_s + time.process_time() - start))
        start = time.process_time()
        [measured.composer.write(a, path, "int8") for a in archs[:10]]
        int8 = (time.process_time() - start) / 10
    out = {
        way: dict(
            file_s=statistics.median(f for f, _ in r), measured_s=statistics.median(t for _, t in r)
        )
        for way, r in rows.items()
    } | dict(int8_file_s=int8, networks=n, rounds=rounds, clock="CPU seconds, median")
    print(out, flush=True)
    return out


# Accuracies


def accuracies(root):
    "Block ratios, and the networks to fit with; the sealed ones stay sealed"
    from predictor import TASKS

    store = Store(root)
    teacher = store.get("teacher").tensors
    n_classes, shape = (
        len(teacher["head.2.bias" if "head.2.bias" in teacher else list(teacher)[-1]]),
        (3, *[TASKS["shapes"]["load"]["size"]] * 2),
    )
    space, blocks = default_space(n_classes, shape, width=16), Store(root / "library")
    found = [store.get(k).meta for k in store.keys() if k.startswith("fit/")]
    archs = [space.arch(*m["arch"]["blocks"]) for m in found]
    return dict(
        n_classes=n_classes,
        input_shape=list(shape),
        width=16,
        frame=space.frame,
        nsr=[
            [blocks.get(space.block_key(i, o)).meta["nsr"] for o in p.options]
            for i, p in enumerate(space.blocks)
        ],
        archs=space.encode(archs).tolist(),
        accuracies=[m["accuracy"] for m in found],
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--networks", type=int, default=40)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--store", default="runs/search")
    p.add_argument("--optuna-env", default="runs/optuna")
    p.add_argument("--scenarios", nargs="*", default=list(SCENARIOS))
    p.add_argument("--only", nargs="*", default=["accuracies", "compose", "table", "hypervolume"])
    p.add_argument(
        "--predictor",
        default="runs/predictor/shapes",
        help="where benchmarks/predictor.py keeps its networks",
    )
    a = p.parse_args()
    space, path, store = default_space(), HERE / "results" / "search.json", Store(a.store)
    out = json.loads(path.read_text()) if path.exists() else {}
    out |= dict(
        what=f"default_space: {len(space)} blocks, {space.size:,} architectures, {space.input_shape[1]} px",
        machine=machine(),
        population=POPULATION,
    )

    def keep():
        write_atomic(path, (json.dumps(out, indent=1) + "\n").encode())

    if "accuracies" in a.only and Path(a.predictor, "fit").is_dir():
        out["accuracies"] = accuracies(Path(a.predictor))
        keep()
    if "compose" in a.only:
        out["compose"] = compose_cost(space, a.networks, a.rounds)
        keep()
    for name in a.scenarios if "table" in a.only else ():
        row, table = table_error(space, name, store, a.networks, a.rounds)
        out.setdefault("table", {})[name] = row | dict(
            terms=[t.tolist() for t in table.terms], intercept=float(table.intercept)
        )
        keep()
    if "hypervolume" in a.only:
        tables = {
            k: Additive(space, tuple(map(np.array, r["terms"])), r["intercept"], "ms")
            for k, r in out.get("table", {}).items()
            if k in ("base", "int8")
        }
        out["hypervolume"] = dict(
            seeds=a.seeds,
            optuna=OPTUNA if a.optuna_env else None,
            rows=hypervolumes(
                space, {"macs": macs_cost(space)} | tables, a.seeds, a.optuna_env, store
            ),
        )
        keep()


if __name__ == "__main__":
    sys.exit(main())
