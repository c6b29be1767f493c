"""The reference networks on the default data set with default settings: accuracy and time.

OMP_NUM_THREADS=1 python benchmarks/train_reference.py   # about 3 minutes; writes
results/train_reference.json"""

import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from mep import data, train  # noqa: E402


def main():
    d, result = data.load("shapes"), {}
    for name in train.REFERENCES:
        wall, cpu = time.perf_counter(), time.process_time()
        done = train.fit(
            train.reference(name, len(d.classes), d.input_shape), d, epochs=10, device="cpu"
        )
        result[name] = dict(
            test=train.accuracy(done.model, d.test),
            history=[h["acc"] for h in done.history],
            parameters=sum(p.numel() for p in done.model.parameters()),
            wall_seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
        )
    result = dict(
        networks=result,
        epochs=10,
        n_train=len(d.train.dataset),
        machine=dict(
            processor=platform.machine(),
            system=platform.system(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
        ),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        versions=dict(python=platform.python_version(), torch=torch.__version__),
    )
    Path(__file__).with_name("results").joinpath("train_reference.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
