"""What `fit` costs over a bare loop: both train the same network on the same batches,
alternated in one run; CPU time, one thread.

python benchmarks/train_overhead.py [--rounds 9]   # about 3 CPU-minutes; writes
results/train_overhead.json"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from mep import data, train  # noqa: E402


def bare(model, batches):
    "The loop without anything: no schedule, no guard, no bar."
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for x, y in batches:
        loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    batches = list(data.load("shapes", n_train=2560, n_valid=1, n_test=1, batch_size=128).train)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        variants = dict(
            bare=None,
            bare_again=None,
            fit=dict(),
            fit_ema=dict(ema=0.99),
            fit_checkpoint=dict(checkpoint=Path(folder) / "run.safetensors", resume=False),
            fit_nchw=dict(channels_last=False),
            fit_bf16=dict(amp="bf16"),
        )
        for name in train.REFERENCES:
            model, seconds = train.reference(name, 16), {v: [] for v in variants}
            for r in range(rounds + 1):
                order = list(variants) if r % 2 else list(variants)[::-1]
                for v in order:
                    start = time.process_time()
                    bare(model, batches) if variants[v] is None else train.fit(
                        model, batches, 1, progress=v == "fit", device="cpu", **variants[v]
                    )
                    if r:
                        seconds[v].append(time.process_time() - start)  # round 0 warms up
            quickest = {
                v: min(s) / min(seconds["bare"]) for v, s in seconds.items()
            }  # other work on the machine only ever adds time
            ratios = {
                v: sorted(a / b for a, b in zip(s, seconds["bare"]))
                for v, s in seconds.items()
                if v != "bare"
            }
            result[name] = dict(
                bare_cpu_ms_per_step=1e3 * statistics.median(seconds["bare"]) / len(batches),
                ratio_to_bare={
                    v: dict(
                        quickest=quickest[v],
                        median=statistics.median(q),
                        p10=q[len(q) // 10],
                        p90=q[-1 - len(q) // 10],
                    )
                    for v, q in ratios.items()
                },
            )
    result |= dict(
        rounds=rounds,
        batch=128,
        steps=len(batches),
        machine=dict(
            processor=platform.machine(), system=platform.system(), cores=os.cpu_count(), threads=1
        ),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
    )
    Path(__file__).with_name("results").joinpath("train_overhead.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
