"""Does compression show up in latency? torchvision's ResNet-18 at 224 px with random weights
in onnxruntime; writes results/compress_latency.json.

    python benchmarks/compress_latency.py        # about ten minutes on 2 quiet cores

Every method at 50 % of the MACs; the staircase of one layer over its ranks; and a network
compressed to a share of its measured latency. Weights don't matter for the time, so they
are random, and the fits use random images."""

import argparse
import json
import os
from pathlib import Path

import torch
from torchvision.models import resnet18

from mep.compress.channel import channel_groups
from mep.compress.select import METHODS, Layer, MsCost, Plan, apply_plan, compress
from mep.cost import profile
from mep.deploy import latencies, machine
from mep.store import write_atomic

HERE, SHAPE = Path(__file__).parent, (3, 224, 224)


def at_share(net, method, share, multiple):
    "Every layer that the method can cut at the same share, so that the whole network costs `share`"
    whole, layers = (
        profile(net, SHAPE),
        {n: m for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)},
    )
    if method == "channel":
        groups = [g for g in channel_groups(net, SHAPE) if not g.locked and not g.residual]
        make = lambda s: Plan(
            SHAPE,
            {},
            {
                g.name: list(range(max(multiple, round(s * g.width / multiple) * multiple)))
                for g in groups
            },
        )
    else:
        m, ranks, hw = METHODS[method], {}, {l.name: l.input_shape[2:] for l in whole.layers}
        for n, op in layers.items():
            if not m.why_not(op):
                ranks[n] = [
                    (m.macs(op, r, hw[n]) / whole[n].macs, r)
                    for r in spread(m.max_rank(op), multiple)
                ]
        make = lambda s: Plan(
            SHAPE,
            {
                n: (method, max((c, r) for c, r in rs if c <= s)[1])
                for n, rs in ranks.items()
                if rs[0][0] <= s < 1
            },
        )
    low, high = 0.0, 1.0
    for _ in range(12):
        mid = (low + high) / 2
        low, high = (
            (mid, high)
            if profile(apply_plan(net, make(mid)), SHAPE).macs <= share * whole.macs
            else (low, mid)
        )
    return randomised(apply_plan(net, make(low)))


def spread(tops, multiple):
    "Ranks from low to high, all parts of a tuple alike"
    found = {
        tuple(max(1, min(t, round(q / 40 * t / multiple) * multiple)) for t in tops)
        for q in range(1, 41)
    }
    return [r[0] if len(r) == 1 else r for r in sorted(found)]


def randomised(net):
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p)
    return net.eval()


def staircase(c, side, ms):
    "One 3x3 layer: milliseconds of each rank, spatial SVD, beside its MACs"
    op = torch.nn.Conv2d(c, c, 3, padding=1)
    layer, rows = Layer(op, "", torch.ones(c), op.weight.numel() * side * side, (side, side)), {}
    for method in ("spatial_svd", "weight_svd_out", "cp"):
        ranks = range(4, c * 3 // 4 + 1, 4) if method != "cp" else range(16, 2 * c + 1, 16)
        whole, *times = ms(op, layer, [(method, r) for r in ranks])
        rows[method] = [
            dict(rank=r, ms=t, share=METHODS[method].macs(op, r, (side, side)) / layer.macs)
            for r, t in zip(ranks, times)
        ]
    return dict(channels=c, side=side, whole_ms=whole, rows=rows)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--only", nargs="*", default=["methods", "staircase", "target"])
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    net, path = resnet18(weights=None).eval(), HERE / "results" / "compress_latency.json"
    out = json.loads(path.read_text()) if path.exists() else {}
    out |= dict(
        what="torchvision resnet18, 224 px, batch 1, onnxruntime, random weights",
        machine=machine(),
        threads=a.threads,
        load=os.getloadavg()[0],
    )
    if "methods" in a.only:
        nets = dict(whole=net) | {
            m: at_share(net, m, 0.5, 8)
            for m in (
                "spatial_svd",
                "weight_svd_in",
                "weight_svd_out",
                "tucker2",
                "cp",
                "tensor_train",
                "channel",
            )
        }
        times, whole = (
            latencies(nets, SHAPE, threads=a.threads, n=a.rounds),
            profile(net, SHAPE).macs,
        )
        out["methods"] = {
            k: dict(
                share=profile(n, SHAPE).macs / whole,
                speedup=1 / times[k].ratio,
                **times[k].to_dict(),
            )
            for k, n in nets.items()
        }
        for k, r in out["methods"].items():
            print(
                f"{k:15} {r['share']:.1%} of the MACs, {r['median_ms']:.1f} ms, {r['speedup']:.2f}x",
                flush=True,
            )
    if "staircase" in a.only:
        out["staircase"] = staircase(128, 28, MsCost(a.threads, a.rounds))
    write_atomic(path, (json.dumps(out, indent=1) + "\n").encode())
    if "target" in a.only:
        made = compress(
            net,
            torch.randn(208, *SHAPE),
            latency=0.6,
            methods=("spatial_svd", "weight_svd_out"),
            shares=(0.3, 0.45, 0.6, 0.8),
            samples=2**14,
            steps=0,
            multiple=16,
            refit=False,
            allow_closest=True,
            threads=a.threads,
        )
        again = latencies(dict(whole=net, target=made.model), SHAPE, threads=a.threads, n=a.rounds)[
            "target"
        ]
        out["target"] = dict(
            asked=0.6,
            got=again.ratio,
            ci=again.ratio_ci,
            share=made.report.share,
            facts=made.report.facts,
            plan=made.report.plan.to_dict(),
        )
        print(
            f"latency target 0.6: {again.ratio:.2f} at {made.report.share:.1%} of the MACs",
            flush=True,
        )
    write_atomic(path, (json.dumps(out, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
