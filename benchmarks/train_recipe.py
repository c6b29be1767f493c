"""What each ingredient of the training recipe buys, on a short and on a long budget: mean and
spread over seeds.

    python benchmarks/train_recipe.py [--jobs 2] [--keep FOLDER]   # about 15 CPU-minutes;
    writes results/train_recipe.json

With --keep, each training's score is stored in FOLDER, and an interrupted run goes on where it stopped."""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import joblib  # noqa: E402
import torch  # noqa: E402

from mep import data, store, train  # noqa: E402

SEEDS, BUDGETS, DATA = (
    range(6),
    dict(short=4, long=10),
    dict(n_train=3000, n_valid=1, n_test=2000, difficulty=0.2),
)
STUDENT, TEACHER = dict(name="small_resnet", width=8), dict(name="small_resnet", width=24)


def constant(step, steps, warmup):
    return 1.0


RECIPES = {
    "constant rate": dict(schedule=constant, lr=0.05),
    "constant rate + averaging": dict(schedule=constant, lr=0.05, ema=0.99),
    "cosine": dict(),
    "cosine, 1.75 x the epochs": dict(stretch=1.75),  # about the time that distillation takes
    "cosine + smoothing": dict(label_smoothing=0.1),
    "cosine + averaging": dict(ema=0.99),
    "cosine + distillation": dict(teacher=True),
}
OPTIMIZERS = {
    (o, lr): dict(optimizer=o, lr=lr)
    for o, lrs in (("sgd", (0.1, 0.2, 0.4)), ("adamw", (0.01, 0.02, 0.04)))
    for lr in lrs
}


def network(spec, classes, seed=0):
    return train.reference(
        spec["name"], classes, seed=seed, **{k: v for k, v in spec.items() if k != "name"}
    )


def score(spec, epochs, seed, recipe, teacher, folder, key):
    "Test accuracy and CPU seconds of one training; data, weights and batches all follow from the seed."
    kept = store.Store(folder)
    if key in kept:
        return kept.get(key).meta
    d = data.load("shapes", seed=seed, **DATA)
    recipe = recipe | (dict(teacher=teacher) if recipe.get("teacher") else {})  # a copy
    epochs = round(epochs * recipe.pop("stretch", 1))
    start = time.process_time()
    done = train.fit(
        network(spec, 16, seed), d.train, epochs, seed=seed, progress=False, device="cpu", **recipe
    )
    kept.put(key, meta=[train.accuracy(done.model, d.test), time.process_time() - start])
    return kept.get(key).meta


def summary(runs):
    acc = [a for a, _ in runs]
    return dict(
        mean=statistics.mean(acc),
        sd=statistics.stdev(acc),
        acc=acc,
        cpu_seconds=statistics.mean(s for _, s in runs),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(joblib.Parallel(args.jobs), Path(args.keep or temporary))


def measure(jobs, folder):
    d = data.load(
        "shapes", seed=99, **DATA
    )  # the teacher sees other training images than any student
    teacher = train.fit(
        network(TEACHER, 16, 99),
        d.train,
        12,
        progress=False,
        device="cpu",
        checkpoint=folder / "teacher.safetensors",
    ).model
    todo = [
        ("recipes", b, name, (STUDENT, epochs, s, r))
        for b, epochs in BUDGETS.items()
        for name, r in RECIPES.items()
        for s in SEEDS
    ]
    todo += [
        ("optimizers", net, " ".join(map(str, key)), (dict(name=net), BUDGETS["short"], s, r))
        for net in train.REFERENCES
        for key, r in OPTIMIZERS.items()
        for s in SEEDS
    ]
    scores = jobs(
        joblib.delayed(score)(
            *args,
            teacher,
            folder / "scores",
            f"{part} {name} {args[2]}".replace(" ", "_")
            .replace(".", "-")
            .replace("+", "and")
            .replace(",", ""),
        )
        for _, part, name, args in todo
    )
    result = {}
    for (table, part, name, _), run in zip(todo, scores):
        result.setdefault(table, {}).setdefault(part, {}).setdefault(name, []).append(run)
    result = {
        table: {
            part: {name: summary(runs) for name, runs in rows.items()}
            for part, rows in parts.items()
        }
        for table, parts in result.items()
    }
    result |= dict(
        teacher=train.accuracy(teacher, d.test),
        seeds=list(SEEDS),
        budgets=BUDGETS,
        data=DATA,
        student=STUDENT,
        teacher_network=TEACHER,
        machine=dict(
            processor=platform.machine(), system=platform.system(), cores=os.cpu_count(), threads=1
        ),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
    )
    Path(__file__).with_name("results").joinpath("train_recipe.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    for part, rows in (result["recipes"] | result["optimizers"]).items():
        for name, r in rows.items():
            print(
                f"{part:16}{name:40}{r['mean']:.3f} ± {r['sd']:.3f}  {r['cpu_seconds']:.1f} CPU-s"
            )


if __name__ == "__main__":
    main()
