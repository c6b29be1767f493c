"""Does the library rank networks? Kendall's tau between predicted accuracy and the accuracy of
trained networks; writes results/predictor.json.

    MEP_DATA=/path/to/data python benchmarks/predictor.py shapes            # library,
    networks, results: about 2 hours of one core
    MEP_DATA=/path/to/data python benchmarks/predictor.py cifar10
    python benchmarks/predictor.py shapes --part 0/2 &  python benchmarks/predictor.py
    shapes --part 1/2    # networks shared among processes

Networks are drawn from `default_space` within 5 % of ten levels of MACs, so that MACs alone
can't rank them. Each starts from the library and is distilled from the teacher until its
learning rate is zero. 40 of them are to develop and fit predictors with, 60 are sealed:
their accuracies are looked at by `--open` alone. Resumes in runs/predictor."""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeCV

from mep import data, train
from mep.deploy import machine
from mep.nas.bkd import BlockLibrary
from mep.nas.finetune import answers, distil
from mep.nas.predictor import (
    FLOOR,
    AccuracyPredictor,
    Assembled,
    Score,
    block_ratios,
    kendall,
    kendall_gain,
)
from mep.nas.space import default_space
from mep.store import Store

HERE = Path(__file__).parent
TASKS = {  # data, images to learn blocks from, passes for a network
    "shapes": dict(
        load=dict(
            name="shapes",
            n_train=60_000,
            n_valid=4000,
            n_test=10_000,
            difficulty=0.6,
            size=24,
            augment=False,
        ),
        blocks=20_000,
        epochs=3,
        teacher=8,
        fit=40,
        sealed=60,
    ),
    "cifar10": dict(
        load=dict(name="cifar10", n_valid=4000, size=24, augment=False),
        blocks=20_000,
        epochs=4,
        teacher=12,
        fit=20,
        sealed=40,
    ),
}
LEVELS = 10


class Task:
    "Data, space, teacher and library of one experiment"

    def __init__(self, name, store):
        self.name, self.settings, self.store = name, TASKS[name], Store(store / name)
        self.data = data.load(**self.settings["load"])
        self.space = default_space(len(self.data.classes), self.data.input_shape, width=16)
        self.teacher = self.make_teacher()
        self.library = BlockLibrary(store / name / "library", self.space, self.teacher)
        n, m = self.settings["fit"], self.settings["sealed"]
        archs = self.space.sample(n + m, seed=0, levels=LEVELS, within=0.05)
        self.split = {
            a: "fit" if i % ((n + m) // 20) < n // 20 else "sealed" for i, a in enumerate(archs)
        }  # each part from all levels

    def archs(self, part):
        return [a for a, p in self.split.items() if p == part]

    def make_teacher(self):
        net = self.space.build(self.space.reference)

        def new():
            fitted = train.fit(
                net,
                (self.data.train, None),
                epochs=self.settings["teacher"],
                lr=0.1,
                progress=False,
                device="cpu",
            ).model
            return fitted.state_dict(), dict(accuracy=train.accuracy(fitted, self.data.test))

        found = self.store.cached("teacher", new)
        net.load_state_dict(found.tensors)
        print("teacher", found.meta, flush=True)
        return net.eval()

    def said(self):
        "The teacher's logits on all training images"
        return self.store.cached(
            "teacher_logits", lambda: (dict(logits=answers(self.teacher, self.data)), {})
        ).tensors["logits"]

    def network(self, arch, seed=0, scratch=False):
        "Accuracy of a trained network, and what it cost"
        start, epochs = time.process_time(), self.settings["epochs"] * (3 if scratch else 1)
        net = self.space.build(arch, seed + 1000) if scratch else self.library.build(arch)
        net = distil(
            net, self.data, epochs=epochs, told=self.said(), seed=seed, progress=False, device="cpu"
        ).model
        out, y = train.logits(net, self.data.test)
        return net.state_dict(), dict(
            accuracy=(out.argmax(1) == y).float().mean().item(),
            loss=torch.nn.functional.cross_entropy(out, y).item(),
            seconds=time.process_time() - start,
            arch=json.loads(arch.to_json()),
            macs=self.space.macs(arch),
            epochs=epochs,
        )


def jobs(task):
    """Key -> how to train: first those to fit with, then the sealed; then again with another
    seed, and from scratch"""
    for part in ("fit", "sealed"):
        for a in task.archs(part):
            yield f"{part}/{a.key}", a, {}
    for a in task.archs("fit")[::4]:
        yield f"again/{a.key}", a, dict(seed=1)
    for a in task.archs("fit")[::4]:
        yield f"scratch/{a.key}", a, dict(scratch=True)


STEPS = (0, 20, 60, 140)  # of distillation before an assembled network is judged


def features(task, arch, assembled):
    "All that a predictor may know of a network, without its training"
    net, a_net = task.space.build(arch), task.library.build(arch)
    x = task.data.valid.dataset[torch.arange(64)][0]
    found = dict(
        macs=task.space.macs(arch),
        params=task.space.params(arch),
        nsr=task.library.features([arch])[0].tolist(),
        options=task.space.encode(arch).tolist(),
        naswot=naswot(net, x),
        gradient=gradient_norm(a_net, x, task.teacher),
        arch=json.loads(arch.to_json()),
    )
    for steps, a in assembled.items():
        start = time.process_time()
        found[f"assembled{steps}"] = float(a([arch])[0, -1])
        found[f"seconds{steps}"] = time.process_time() - start
    return found


@torch.no_grad()
def naswot(net, x):
    "log |K| of the signs after the activations of an untrained network (Mellor et al., 2021)"
    signs, hooks = [], []
    for m in net.modules():
        if isinstance(m, (torch.nn.ReLU, torch.nn.SiLU, torch.nn.GELU)):
            hooks.append(
                m.register_forward_hook(lambda m, i, o: signs.append((o > 0).flatten(1).float()))
            )
    net.train()(x)
    for h in hooks:
        h.remove()
    k = sum(s @ s.T + (1 - s) @ (1 - s).T for s in signs)
    return torch.linalg.slogdet(k.double() + 1e-3 * torch.eye(len(k)))[1].item()


def gradient_norm(net, x, teacher):
    "Norm of the distillation loss's gradient in the assembled network"
    net.train()
    with torch.no_grad():
        target = teacher(x)
    train.soft_targets(net(x), target).backward()
    return sum(p.grad.square().sum().item() for p in net.parameters() if p.grad is not None) ** 0.5


# What came out

# the predictor that was chosen on the networks to fit with, before the sealed ones were opened
FIXED = "whole network, 140 steps"
UNSEEN = ("shift", "vit")


class Rows:
    "Networks of one part as arrays; what `AccuracyPredictor` wants of a library"

    def __init__(self, task, part, table=None, keep=lambda a: True, n=None):
        self.space, self.nsr_table = task.space, lambda: table or task.library.nsr_table()
        self.archs = [a for a in task.archs(part) if f"{part}/{a.key}" in task.store and keep(a)]
        if n:
            self.archs = [
                self.archs[i] for i in np.random.default_rng(n).permutation(len(self.archs))[:n]
            ]
        self.accuracy = np.array(
            [task.store.get(f"{part}/{a.key}").meta["accuracy"] for a in self.archs]
        )
        self.facts = [task.store.get(f"features/{a.key}").meta for a in self.archs]

    def __getitem__(self, name):
        return np.array([f[name] for f in self.facts], dtype=float)

    def ratios(self):
        return block_ratios(self.nsr_table(), self.space, self.archs)


def one_hot(rows):
    return np.concatenate(
        [
            np.eye(len(p.options))[v.astype(int)]
            for p, v in zip(rows.space.blocks, rows["options"].T)
        ],
        1,
    )


def predictions(fit, test):
    "Name -> predicted accuracy, or a number in its place, of the test networks"

    def ridge(kind, steps=None):
        columns = [f"assembled{n}" for n in sorted({0, steps})] if steps is not None else []
        known = (
            {
                a: e
                for rows in (fit, test)
                for a, e in zip(rows.archs, np.stack([rows[c] for c in columns], 1))
            }
            if columns
            else None
        )
        return (
            AccuracyPredictor(
                kind, (lambda archs: np.array([known[a] for a in archs])) if columns else None
            )
            .fit(fit, fit.archs, fit.accuracy)
            .predict(test.archs)
        )

    out = {
        "-sum log NSR": -np.log(test.ratios() + FLOOR).sum(1),
        "-sum NSR": -test.ratios().sum(1),
        "MACs": test["macs"],
        "parameters": test["params"],
        "NASWOT": test["naswot"],
        "gradient norm": -test["gradient"],
        "ridge one-hot": RidgeCV(np.logspace(-2, 3, 16))
        .fit(one_hot(fit), fit.accuracy)
        .predict(one_hot(test)),
    }
    kinds = {
        "ridge log NSR": ("log", None),
        "ridge NSR": ("raw", None),
        "ridge NSR, second order": ("second", None),
        "ridge log NSR + whole network, 140 steps": ("log", 140),
    }
    for name, (kind, steps) in (
        kinds | {f"whole network, {n} steps": ("none", n) for n in STEPS}
    ).items():
        try:
            out[name] = ridge(kind, steps)
        except ValueError as e:
            if "train at least" not in str(e):
                raise
    return out


def left_out(fit):
    "Predictions for the networks to fit with, each by a fit without it"

    def one(i):
        others = copy.copy(fit)
        alone = copy.copy(fit)
        keep = [j for j in range(len(fit.archs)) if j != i]
        for rows, at in ((others, keep), (alone, [i])):
            rows.archs, rows.accuracy, rows.facts = (
                [fit.archs[j] for j in at],
                fit.accuracy[at],
                [fit.facts[j] for j in at],
            )
        return predictions(others, alone)

    rows = [one(i) for i in range(len(fit.archs))]
    return {k: np.array([r[k][0] for r in rows]) for k in rows[0]}


def judged(found, actual):
    "Tau of each predictor, and its gain over MACs"
    return {
        k: dict(
            tau=kendall(p, actual)._asdict(),
            over_macs=kendall_gain(p, found["MACs"], actual)._asdict(),
        )
        for k, p in found.items()
    }


def seeds(task):
    "Spread of one network over seeds, of the networks, and the tau that nothing can exceed"
    pairs = [
        (
            task.store.get(k).meta["accuracy"],
            task.store.get(f"fit/{k.split('/')[1]}").meta["accuracy"],
        )
        for k in task.store.keys()
        if k.startswith("again/")
    ]
    acc, rng = Rows(task, "fit").accuracy, np.random.default_rng(0)
    sd = float(np.sqrt(np.mean([(a - b) ** 2 for a, b in pairs]) / 2)) if pairs else None
    return dict(
        pairs=pairs,
        sd_seeds=sd,
        sd_networks=float(acc.std(ddof=1)),
        ceiling=float(
            np.mean(
                [kendall(acc, acc + rng.normal(0, sd, len(acc)), draws=1).tau for _ in range(200)]
            )
        )
        if pairs
        else None,
    )


def summary(task, open_sealed):
    fit, meta = (
        Rows(task, "fit"),
        lambda part: [
            task.store.get(k).meta for k in task.store.keys() if k.startswith(part + "/")
        ],
    )
    out = dict(
        settings=task.settings,
        networks=task.space.size,
        teacher=task.store.get("teacher").meta["accuracy"],
        fixed=FIXED,
        seeds=seeds(task),
        cost=dict(
            seconds_network=float(np.mean([m["seconds"] for m in meta("fit")])),
            seconds_blocks=sum(
                task.library.store.get(k).meta["seconds"]
                for k in task.library.store.keys()
                if k != "library"
            ),
            seconds_steps={n: float(np.mean(fit[f"seconds{n}"])) for n in STEPS},
        ),
        scratch=[
            (m["accuracy"], task.store.get(f"fit/{k.split('/')[1]}").meta["accuracy"])
            for k in task.store.keys()
            if k.startswith("scratch/")
            for m in [task.store.get(k).meta]
        ],
        table=[list(map(float, t)) for t in task.library.nsr_table()],
        fit=rows_of(fit),
        left_out=judged(left_out(fit), fit.accuracy),
    )
    if not open_sealed:
        return out
    sealed = Rows(task, "sealed")
    found = predictions(fit, sealed)
    out |= dict(
        sealed=rows_of(sealed),
        opened=judged(found, sealed.accuracy),
        predicted={
            k: list(map(float, found[k])) for k in (FIXED, "ridge log NSR", "ridge NSR", "MACs")
        },
    )

    def has(cell):
        return lambda a: any(o.cell == cell for o in a.options)

    without, with_ = (
        Rows(task, "fit", keep=lambda a: not any(has(c)(a) for c in UNSEEN)),
        Rows(task, "sealed", keep=lambda a: any(has(c)(a) for c in UNSEEN)),
    )
    out["unseen"] = dict(
        cells=UNSEEN,
        fit=len(without.archs),
        tested=len(with_.archs),
        scores=judged(predictions(without, with_), with_.accuracy),
    )
    out["by_number"] = {
        n: {
            k: v["tau"]
            for k, v in judged(predictions(Rows(task, "fit", n=n), sealed), sealed.accuracy).items()
            if "ridge" in k
        }
        for n in (10, 15, 20, 30, 40)
        if n <= len(fit.archs)
    }
    out["by_epochs"] = {}
    for path in sorted((task.store.root).glob("library*")):
        epochs = float(path.name.split("_")[1]) if "_" in path.name else 1
        library = BlockLibrary(path, task.space, task.teacher)
        if library.missing():
            continue
        a, b = (Rows(task, part, library.nsr_table()) for part in ("fit", "sealed"))
        p = predictions(a, b)
        out["by_epochs"][epochs] = {
            k: kendall(p[k], b.accuracy)._asdict()
            for k in ("ridge log NSR", "ridge NSR", "-sum log NSR", "-sum NSR")
        }
    return out


def rows_of(rows):
    return [dict(f, accuracy=float(a)) for f, a in zip(rows.facts, rows.accuracy)]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("task", choices=list(TASKS))
    p.add_argument("--part", default="0/1", help="which of how many processes this is")
    p.add_argument(
        "--features", action="store_true", help="only what predictors look at, no training"
    )
    p.add_argument(
        "--summary", action="store_true", help="write what is known without the sealed networks"
    )
    p.add_argument(
        "--open", action="store_true", help="open the sealed networks and write all results"
    )
    p.add_argument("--store", default="runs/predictor")
    p.add_argument("--results", default=str(HERE / "results" / "predictor.json"))
    a = p.parse_args()
    torch.set_num_threads(1)
    k, n = map(int, a.part.split("/"))
    task = Task(a.task, Path(a.store))
    if k == 0:
        task.library.train(task.data, n_images=task.settings["blocks"])
        task.said()
    while task.library.missing() or "teacher_logits" not in task.store:
        time.sleep(5)
    if a.open or a.summary:
        results = Path(a.results)
        old = json.loads(results.read_text()) if results.exists() else {}
        new = summary(task, a.open)
        results.write_text(
            json.dumps(
                old | {a.task: new, "machine": machine()}, indent=None, separators=(",", ":")
            )
            + "\n"
        )
        for part in ("left_out", "opened"):
            for k, v in sorted(new.get(part, {}).items(), key=lambda t: -t[1]["tau"]["tau"]):
                print(
                    f"{part:9s} {k:36s} {Score(**v['tau'])}   over MACs {Score(**v['over_macs'])}"
                )
        return
    if a.features:
        assembled = {
            n: Assembled(task.library, task.data, steps=n) for n in STEPS
        }  # the last column is after the steps
        for arch in list(task.split)[k::n]:
            task.store.cached(f"features/{arch.key}", lambda: ({}, features(task, arch, assembled)))
        return
    for key, arch, how in list(jobs(task))[k::n]:
        if key in task.store:
            continue
        found = task.store.cached(key, lambda: task.network(arch, **how)).meta
        print(
            key,
            f"{found['macs'] / 1e6:.2f} M, {found['seconds']:.0f} s",
            "" if "sealed" in key else f"{found['accuracy']:.4f}",
            arch if "sealed" not in key else "",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
