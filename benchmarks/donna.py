"""The whole claim, checked: networks from the search's front, fine-tuned and measured, against
the reference scaled by hand; writes results/donna.json.

    MEP_DATA=/path/to/data python benchmarks/donna.py                # about two hours of
    one core, after predictor.py's networks to fit with
    python benchmarks/donna.py --only picks                          # one part: costs,
    picks, scaled, curves
    python benchmarks/donna.py --only results                        # measure latencies and
    write the results of what there is

Teacher, library and the networks that the predictor is fitted with are those of
predictor.py (runs/predictor); what is missing there is made first. Networks from the front
start from the library; the reference in other widths and depths starts from random weights,
with the same distillation, three times the epochs, and the same seeds. Latency: ONNX files
in onnxruntime, one thread, batch 1, alternated. Resumes in runs/donna, within a training."""

import argparse
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from predictor import Task, jobs

from mep import train
from mep.deploy import as_model, export_onnx, latencies, machine
from mep.nas.bkd import channel_variance, teach_block
from mep.nas.finetune import assembled, distil
from mep.nas.predictor import AccuracyPredictor
from mep.nas.search import Deployment, Front, Measured, latency_table, pareto_front, search
from mep.nas.space import choices, default_space
from mep.store import Store

HERE = Path(__file__).parent
SCALED = [
    (4, 1),
    (8, 1),
    (12, 1),
    (16, 1),
    (8, 2),
    (4, 2),
    (12, 2),
    (16, 2),
]  # width and depth; the last is the reference
LONGER = 3  # times the epochs for what starts from random weights
PICKS = 5


class Check:
    "The experiment: a task of predictor.py, and the store of what is trained here"

    def __init__(self, task, store, seeds):
        self.task, self.store, self.epochs, self.seeds = (
            task,
            Store(store / task.name),
            task.settings["epochs"],
            range(seeds),
        )
        self.measured = Measured(task.space, Deployment(), Store(store / task.name / "latency"))

    def learn(self, key, make, epochs, seed):
        "Distil the network that `make` returns, once"
        if key in self.store:
            return self.store.get(key)
        start, unfinished = (
            time.process_time(),
            self.store.root / "unfinished" / f"{key.replace('/', '_')}.safetensors",
        )
        whole = not unfinished.exists()  # of a training that was interrupted, the time is not known
        net = distil(
            make(),
            self.task.data,
            epochs=epochs,
            told=self.task.said(),
            seed=seed,
            checkpoint=unfinished,
            device="cpu",
            progress=False,
        ).model
        self.store.put(
            key,
            net.state_dict(),
            dict(
                accuracy=train.accuracy(net, self.task.data.test),
                epochs=epochs,
                seed=seed,
                seconds=time.process_time() - start if whole else None,
            ),
        )
        unfinished.unlink(missing_ok=True)
        print(
            f"{key:32} {self.store.get(key).meta['accuracy']:.4f}  {time.process_time() - start:.0f} s",
            flush=True,
        )
        return self.store.get(key)

    def found(self, start):
        "What is stored of a kind of network, seed by seed"
        return [self.store.get(k).meta for k in self.store.keys() if k.startswith(f"{start}/")]


# ---- from the front


def fitted(task):
    "The predictor, and the networks that it is fitted with; those that are missing are trained"
    archs = {key: arch for key, arch, _ in jobs(task) if key.startswith("fit/")}
    rows = [task.store.cached(key, lambda: task.network(arch)).meta for key, arch in archs.items()]
    return AccuracyPredictor().fit(
        task.library, list(archs.values()), [r["accuracy"] for r in rows]
    )


def front(check):
    """The front by the table of block latencies, and five of its networks at even steps of log
    latency; found once"""
    path = check.store.root / "front.json"
    if not path.exists():
        space, table = check.task.space, latency_table(check.measured)
        found = search(space, fitted(check.task), table, progress=False)
        steps = np.geomspace(found[0].cost, 0.9 * table([space.reference])[0], PICKS + 1)[1:]
        some = list(dict.fromkeys(found.at(s) for s in steps))
        pareto_front(
            [p.arch for p in some], [p.accuracy for p in some], [p.cost for p in some], name="picks"
        ).save(check.store.root / "picks.json")
        found.save(path)
    return Front.load(path), Front.load(check.store.root / "picks.json")


def picks(check):
    for seed in check.seeds:
        for p in front(check)[1]:
            check.learn(
                f"pick/{p.arch.key}/{seed}",
                lambda: assembled(p.arch, check.task.library, check.task.data),
                check.epochs,
                seed,
            )


# ---- by hand


def scaled_space(task, width, depth):
    return default_space(
        len(task.data.classes),
        task.data.input_shape,
        width=width,
        options=[*choices("basic", depth=depth), *choices("skip", out_act="relu")],
    )


def scaled(check):
    "The reference in other widths and depths, from random weights"
    for seed in check.seeds:
        for width, depth in SCALED:
            space = scaled_space(check.task, width, depth)
            check.learn(
                f"scaled/{width}x{depth}/{seed}",
                lambda: space.build(space.reference, seed),
                LONGER * check.epochs,
                seed,
            )


# ---- epochs to equal accuracy


def curves(check):
    "One network of the front after some epochs, from the library and from random weights"
    arch, task = front(check)[1][PICKS // 2].arch, check.task
    for seed in check.seeds:
        for epochs in (1, 2):
            check.learn(
                f"library/{epochs}/{seed}",
                lambda: assembled(arch, task.library, task.data),
                epochs,
                seed,
            )
        for epochs in (3, 6, 9, 18):
            check.learn(
                f"scratch/{epochs}/{seed}", lambda: task.space.build(arch, seed), epochs, seed
            )


# ---- costs


def step_seconds(nets, data, rounds=6):
    "CPU seconds of one training step of 128 images, in alternation"
    batches, seconds = list(islice(data.train, rounds)), {k: [] for k in nets}
    for x, y in batches:
        for name, net in nets.items():
            start = time.process_time()
            F.cross_entropy(net.train()(x), y).backward()
            seconds[name].append(time.process_time() - start)
    return {k: median(s) for k, s in seconds.items()}


def block_seconds(task, every=8, steps=12):
    "CPU seconds of teaching all blocks, from a sample of them"
    images, n, total = next(iter(task.data.train))[0], task.settings["blocks"] // 128, 0.0
    places = [(i, o) for i, p in enumerate(task.space.blocks) for o in p.options]
    with torch.no_grad():
        maps = [task.teacher.stem(images)]
        for b in task.teacher.blocks:
            maps.append(b(maps[-1]))
    for i, o in places[::every]:
        start = time.process_time()
        teach_block(
            task.space.block(i, o),
            maps[i],
            maps[i + 1],
            channel_variance(maps[i + 1]),
            epochs=steps,
        )
        total += time.process_time() - start
    return total / steps * n * len(places) / len(places[::every])


def costs(check):
    "CPU seconds of each part, timed together, so that their ratios hold on a busy machine"
    task = check.task

    def new():
        some = {key: task.library.build(arch) for key, arch, _ in list(jobs(task))[:40:4]}
        picked = {p.arch.key: task.library.build(p.arch) for p in front(check)[1]}
        step = step_seconds(
            dict(reference=task.space.build(task.space.reference)) | some | picked, task.data
        )
        steps = len(task.data.train.dataset) // 128

        def cost(names, epochs):
            return epochs * steps * mean(step[n] for n in names)

        return {}, dict(
            reference=cost(["reference"], task.settings["teacher"]),
            library=block_seconds(task),
            networks=40,
            network=cost(some, check.epochs),
            pick=cost(picked, check.epochs),
            epochs=dict(reference=task.settings["teacher"], network=check.epochs),
        )

    print("costs", check.store.cached("costs", new).meta, flush=True)


# ---- results


def files(check, folder):
    "Name -> ONNX file of one trained network of each kind"
    task = check.task
    made = dict(reference=task.teacher)
    for p in front(check)[1]:
        if f"pick/{p.arch.key}/0" in check.store:
            made[p.arch.key] = restored(
                task.space.build(p.arch), check.store.get(f"pick/{p.arch.key}/0")
            )
    for width, depth in SCALED:
        space, key = scaled_space(task, width, depth), f"scaled/{width}x{depth}/0"
        if key in check.store:
            made[f"{width}x{depth}"] = restored(space.build(space.reference), check.store.get(key))
    return {
        k: export_onnx(net, Path(folder) / f"{i}.onnx", task.data.input_shape)
        for i, (k, net) in enumerate(made.items())
    }


def restored(net, found):
    net.load_state_dict(found.tensors)
    return net.eval()


def spread(rows):
    a = [r["accuracy"] for r in rows]
    return dict(
        accuracy=mean(a),
        sd=stdev(a) if len(a) > 1 else None,
        accuracies=a,
        epochs=rows[0]["epochs"],
        seconds=median([r["seconds"] for r in rows if r["seconds"]] or [0]) or None,
    )


def results(check, path):
    "Measure latencies, and write what there is"
    task, (all_, some) = check.task, front(check)
    with tempfile.TemporaryDirectory() as folder:
        made = files(check, folder)
        ms = latencies(made, task.data.input_shape, n=200)
        deployed = {k: train.accuracy(as_model(f), task.data.test) for k, f in made.items()}
    foretold = dict(
        zip((p.arch.key for p in some), check.measured([p.arch for p in some]).tolist())
    )  # of files with random weights

    def row(name, kind):
        return spread(check.found(kind)) | dict(ms=ms[name].to_dict(), deployed=deployed[name])

    found = [
        row(p.arch.key, f"pick/{p.arch.key}")
        | dict(
            predicted=p.accuracy,
            table_ms=p.cost,
            predicted_ms=foretold[p.arch.key],
            blocks=str(p.arch),
            macs=task.space.macs(p.arch),
        )
        for p in some
        if p.arch.key in made
    ]
    by_hand = [
        row(f"{w}x{d}", f"scaled/{w}x{d}")
        | dict(width=w, depth=d, macs=space.macs(space.reference))
        for w, d in SCALED
        if f"{w}x{d}" in made
        for space in [scaled_space(task, w, d)]
    ]
    lines = {
        kind: [spread(rows) for e in epochs if (rows := check.found(f"{kind}/{e}"))]
        for kind, epochs in dict(library=(1, 2), scratch=(3, 6, 9, 18)).items()
    }
    lines["library"] += (
        [spread(rows)] if (rows := check.found(f"pick/{some[PICKS // 2].arch.key}")) else []
    )
    result = dict(
        what=(
            "Networks of a searched front after fine-tuning, and the reference scaled by hand; "
            "shapes at 24 px, accuracy on 10,000 test images, onnxruntime on one thread"
        ),
        machine=machine(),
        load=os.getloadavg()[0],
        seeds=len(check.seeds),
        space=task.space.size,
        reference=dict(
            accuracy=deployed["reference"],
            ms=ms["reference"].to_dict(),
            macs=task.space.macs(task.space.reference),
        ),
        front=[(p.cost, p.accuracy) for p in all_],
        picks=found,
        scaled=by_hand,
        curves=lines,
        costs=check.store.get("costs").meta if "costs" in check.store else None,
    )
    path.write_text(json.dumps(result, indent=1) + "\n")


PARTS = dict(costs=costs, picks=picks, scaled=scaled, curves=curves)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("task", nargs="?", default="shapes")
    p.add_argument("--only", choices=[*PARTS, "results"], help="one part")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--predictor", default="runs/predictor", help="folder of predictor.py")
    p.add_argument("--store", default="runs/donna")
    a = p.parse_args()
    torch.set_num_threads(1)
    task = Task(a.task, Path(a.predictor))
    task.library.train(task.data, n_images=task.settings["blocks"])
    check = Check(task, Path(a.store), a.seeds)
    for name, part in PARTS.items():
        if a.only in (None, name):
            part(check)
    if a.only in (None, "results"):
        results(check, HERE / "results" / "donna.json")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
