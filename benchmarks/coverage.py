"""What works on whose networks: recorded by what, how much runs on integers, whether the file agrees, how fast it is.

    python benchmarks/coverage.py [--only NAME ...] [--group GROUP ...] [--store FILE]

Networks have random weights; batch norms have seen some images. Rows that are stored already are
kept, so that an interrupted run goes on. Families of timm are left out where timm isn't installed."""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn

from mep.deploy import export_onnx, latencies, machine
from mep.graph import TraceError, trace
from mep.quant import export_int8, quantize

HERE = Path(__file__).parent
CLASSIFIERS = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d
    shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32 wide_resnet50_2""".split()
SEGMENTATION = "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large".split()
TIMM = """beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convmixer_768_32 convnext_atto
    convnextv2_atto crossvit_tiny_240 cspdarknet53 darknet17 davit_tiny deit_tiny_patch16_224 densenet121 dla34
    dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_dw fastvit_t8 fbnetc_100 focalnet_tiny_srf gernet_s ghostnet_050 gmlp_s16_224
    hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_050 levit_128s mambaout_femto maxvit_pico_rw_256
    mixer_s32_224 mixnet_s mnasnet_small mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny nf_resnet26 pit_ti_224 poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002
    regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resmlp_12_224 resnest14d resnet10t
    rexnet_100 selecsls42b semnasnet_075 seresnet18 skresnet18 spnasnet_100 starnet_s1 swin_tiny_patch4_window7_224
    tf_efficientnet_lite0 tiny_vit_5m_224 tinynet_e tresnet_m twins_svt_small visformer_tiny vgg11 vit_tiny_patch16_224
    volo_d1_224 xception41 xcit_nano_12_p16_224""".split()


def torchvision_net(name):
    kw = dict(init_weights=True) if name in ("googlenet", "inception_v3") else {}
    size = {"inception_v3": 299, "swin_v2_t": 256}.get(name, 224)
    net = torchvision.models.get_model(name, weights=None, **kw)
    if name.startswith("vit"):
        nn.init.normal_(net.heads.head.weight, std=0.02)  # zeros, which would hide every error
    return net, size


def segmentation_net(name):
    return torchvision.models.get_model(name, weights=None, weights_backbone=None), 128


def timm_net(name):
    import timm

    net = timm.create_model(name)
    return net, net.default_cfg["input_size"][-1]


def habit_net(name):
    sys.path.insert(0, str(HERE.parent / "tests"))
    import test_habits

    return test_habits.HABITS[name](), 32


HABITS = "same_padding bottlenecks hidden windows scaled mixer encoder".split()
GROUPS = dict(
    habits=(habit_net, HABITS),
    torchvision=(torchvision_net, CLASSIFIERS),
    segmentation=(segmentation_net, SEGMENTATION),
    timm=(timm_net, TIMM),
)


def settled(net, x):
    "Batch norms that have seen some images, as after a training"
    net.train()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = None
            m.reset_running_stats()
    with torch.no_grad():
        net(x)
    return net.eval()


def recorded_by(net, x):
    "Without images, torch.fx alone is asked; with them, torch.export too"
    try:
        trace(net)
        alone = True
    except TraceError:
        alone = False
    trace(net, x=x)
    return "torch.fx" if alone else "torch.export"


def measure(make, name, folder, rounds):
    torch.manual_seed(0)
    net, size = make(name)
    x = torch.randn(8, 3, size, size)
    row = dict(size=size)
    try:
        settled(net, x)
        row["recorded_by"] = recorded_by(net, x[:2])
        began = time.perf_counter()
        qm = quantize(net, x, per_channel=True, progress=False)
        row["quantize_s"] = round(time.perf_counter() - began, 1)
        check = export_int8(qm, folder / "int8.onnx", x=x[:4])
    except Exception as e:
        return row | dict(refused=f"{type(e).__name__}: {str(e)[:300]}")
    row |= dict(
        integer_macs=round(check.integer_macs, 4),
        float_layers=check.float_layers,
        every_bit=check.sqnr_db == float("inf"),
        file_db=None if check.sqnr_db == float("inf") else round(check.sqnr_db, 1),
        apart=None if check.apart is None else check.apart._asdict(),
        floats=len(qm.report.floats),
    )
    return row | speed(net, size, folder, rounds)


def speed(net, size, folder, rounds):
    try:
        export_onnx(net, folder / "fp32.onnx", (3, size, size))
    except Exception as e:
        return dict(float_file=f"{type(e).__name__}: {str(e)[:200]}")
    files = dict(fp32=folder / "fp32.onnx", int8=folder / "int8.onnx")
    times = latencies(files, (3, size, size), n=rounds, warmup=3)
    return dict(
        fp32_ms=times["fp32"].median_ms,
        int8_ms=times["int8"].median_ms,
        speed_up=1 / times["int8"].ratio,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="*")
    p.add_argument("--group", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--store", default=HERE / "results" / "coverage.json", type=Path)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = json.loads(args.store.read_text()) if args.store.exists() else {}
    results["machine"] = machine()
    rows = results.setdefault("networks", {})
    for group in args.group:
        make, names = GROUPS[group]
        if group == "timm" and importlib.util.find_spec("timm") is None:
            print("timm isn't installed: its families are left out")
            continue
        for name in names:
            key = f"{group}:{name}"
            if key in rows or args.only and name not in args.only:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows[key] = measure(make, name, Path(folder), args.rounds)
            print(key, json.dumps(rows[key]), flush=True)
            args.store.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
