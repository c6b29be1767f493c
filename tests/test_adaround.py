"""AdaRound: the quadratic and its solvers, whole networks of many kinds, bad input, resuming."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.moments import Moments, Quadratic
from mep.quant.adaround import (
    adaround,
    descend,
    feedback,
    refit_scale,
    solve,
    tabu,
    try_all,
)
from mep.quant.grid import fit_grid, make_grid
from mep.quant.sim import load_quantized, quantize, save_quantized
from mep.store import DamagedError, LockedError, Store
from mep.train import sqnr_db

ar = sys.modules[
    "mep.quant.adaround"
]  # the module: the package's attribute of that name is the function

FAST = settings(max_examples=15, deadline=None)


def problem(g, r, d, bits, seed, n=None):
    "A random layer: its weights, their grid, and its quadratic"
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(g, d, n or 4 * d + 8, generator=random).cumsum(1) / 2 + 1
    w = torch.randn(g, r, d, generator=random)
    moments = Moments()
    moments.add(x, w @ x)
    return w, fit_grid(w.flatten(0, 1), bits, "mse", symmetric=True), moments.quadratic()


def scales(grid, w):
    return grid.scale.expand(*w.shape[:2], 1)


def nearest(w, grid):
    return (w / scales(grid, w)).round().clamp(grid.qmin, grid.qmax)


@FAST
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 99),
)
def test_solve_is_never_worse_than_nearest(g, r, d, bits, seed):
    w, grid, f = problem(g, r, d, bits, seed)
    q, scale = solve(w, grid, f)
    f = f.near(w)
    assert (
        f.error(q * scale).sum()
        <= f.error(nearest(w, grid) * scales(grid, w)).sum() * (1 + 1e-4) + 1e-5
    )
    assert q.min() >= grid.qmin and q.max() <= grid.qmax and (q == q.round()).all()
    assert (scale > 0).all() and (scale == scale[0, 0, 0]).all()  # one scale for all


@FAST
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(0, 99))
def test_searches_only_improve_and_try_all_is_exact(g, r, d, seed):
    w, grid, f = problem(g, r, d, 2, seed)
    f, s, q = f.near(w), scales(grid, w), nearest(w, grid)
    error = {m.__name__: f.error(m(q, s, f, grid) * s) for m in (descend, tabu, try_all)}
    tolerance = 1e-4 * f.var + 1e-5
    assert (error["descend"] <= f.error(q * s) + tolerance).all()
    assert (error["tabu"] <= error["descend"] + tolerance).all()
    every = torch.cartesian_prod(*[torch.arange(-2.0, 2)] * d)  # all 4^d integers
    best = torch.stack([f.error(e.expand_as(w) * s) for e in every]).amin(0)
    assert (error["try_all"] >= best - tolerance).all()
    one = every[(every - try_all(q, s, f, grid)[0, 0]).abs().amax(1) <= 1]
    assert (
        f.error(try_all(q, s, f, grid) * s)[0, 0]
        <= min(f.error(e.expand_as(w) * s)[0, 0] for e in one) + tolerance[0, 0]
    )


@FAST
@given(st.integers(0, 99))
def test_a_new_scale_never_hurts(seed):
    w, grid, f = problem(1, 4, 8, 3, seed)
    q, s = nearest(w, grid), scales(grid, w)
    for shared in (True, False):
        assert f.error(q * refit_scale(q, s, f, shared)).sum() <= f.error(q * s).sum() + 1e-4
    assert torch.equal(refit_scale(0 * q, s, f, True), s)  # nothing to fit


def test_feedback_of_uncorrelated_inputs_is_nearest():
    w = torch.randn(1, 3, 7)
    f = Quadratic(
        torch.eye(7)[None], w.clone(), w.square().sum(-1), torch.zeros(1, 7), torch.zeros(1, 3)
    )
    grid = make_grid(-4, 4, 8, symmetric=True)
    assert torch.equal(feedback(scales(grid, w), f, grid, block=3), nearest(w, grid))


def test_try_all_refuses_long_rows():
    w, grid, f = problem(1, 1, 10, 4, 0)
    with pytest.raises(ValueError, match="tabu"):
        try_all(nearest(w, grid), scales(grid, w), f, grid)


class Residual(nn.Module):
    "Shortcut, depthwise, grouped, linear; one module called twice"

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.a, self.b = (
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
        )
        self.twice, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.head(self.twice(torch.relu(self.twice(x))).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    return Residual().eval()


def images(n=48, seed=1):
    return torch.randn(n, 3, 10, 10, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / 2


def noise(model, qm, x):
    with torch.no_grad():
        return sqnr_db(model(x), qm(x))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_beats_nearest_and_leaves_the_network_alone(bits, per_channel):
    model, x = net(), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a = adaround(model, x, bits, per_channel=per_channel, progress=False)
    b = quantize(model, x, bits, per_channel=per_channel, progress=False)
    assert noise(model, a, images(seed=2)) > noise(model, b, images(seed=2)) - (
        0.5 if bits == 8 else 0
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {n: l.grid.n_bits for n, l in a.layers().items()} == {n: bits for n in b.layers()}


def test_sampled_lowers_its_own_error():
    layer = quantize(net(), images(), 3, progress=False).layers()["b"]
    x = torch.randn(64, 8, 6, 6).cumsum(1)
    with torch.no_grad():
        y = layer.op(x)

    def error(q):
        with torch.no_grad():
            out = layer._compute(x, q * layer.scale, layer.bias)
        return (layer.out.clip(out) - layer.out.clip(y)).square().sum()

    q = ar.learn_rounding(layer, x, y, iterations=300, lr=0.01)
    assert error(q) < 0.9 * error(layer.weight_q.float())
    assert (
        (q - layer.weight / layer.scale).abs() <= 1.001
    ).all() or q.abs().max() >= 3  # down or up, or clipped


def test_sampled_network():
    qm = adaround(net(), images(), 3, method="sampled", iterations=20, lr=0.02, progress=False)
    assert qm(images(4)).isfinite().all() and all(l.grid.n_bits == 3 for l in qm.layers().values())


def test_same_seed_same_bits():
    model, x = net(), images()
    one, two = (adaround(model, x, samples=500, progress=False).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_layer_bits_and_skip():
    with pytest.warns(UserWarning, match="left in float"):
        qm = adaround(
            net(), images(), 4, layer_bits={"a": 8, "head": (3, 8)}, skip=["b"], progress=False
        )
    bits = {n: l.grid.n_bits for n, l in qm.layers().items()}
    assert bits["a"] == 8 and bits["head"] == 3 and bits["twice"] == 4 and "b" not in bits


def test_linear_only_network():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval(),
        torch.randn(200, 12),
    )
    assert (
        noise(model, adaround(model, x, 3, progress=False), x)
        > noise(model, quantize(model, x, 3, progress=False), x) + 1
    )


def test_one_image_and_odd_weights():
    model = net()
    with torch.no_grad():
        model.b.weight.zero_()  # a layer whose range is zero
        model.stem[1].weight[2] = 0  # a dead channel
        model.stem[1].bias[2] = 0
    for x in (images(1), images(8)):
        out = adaround(model, x, progress=False)(images(4))
        assert out.isfinite().all()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(calib=images().index_fill(0, torch.tensor(3), math.nan)), ValueError, "NaN"),
        (dict(calib=images(0)), ValueError, "empty"),
        (dict(calib=images()[:, :2]), ValueError, "do not fit"),
        (dict(w_bits=1), ValueError, "w_bits=1"),
        (dict(layer_bits={"a": 1}), ValueError, "w_bits=1 for a"),
        (dict(layer_bits={"nothing": 8}), ValueError, "no layer is called 'nothing'"),
        (dict(method="magic"), ValueError, "gram, sampled"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        adaround(**(dict(model=net(), calib=images(), progress=False) | change))


def test_refuses_a_quantized_network():
    with pytest.raises(ValueError, match="already quantized"):
        adaround(quantize(net(), images(), progress=False), images(), progress=False)


def test_few_images_if_memory_is_short():
    with pytest.warns(UserWarning, match="the first .* are used"):
        adaround(net(), images(), memory=2e5, progress=False)


def test_the_memory_bounds_the_calibration_too(monkeypatch):
    asked = []
    for name in ("quantize", "_logits", "_float_logits"):
        real = getattr(ar, name)

        def noted(*args, real=real, **kw):
            asked.append(kw.get("memory", args[-1]))
            return real(*args, **kw)

        monkeypatch.setattr(ar, name, noted)
    with pytest.warns(UserWarning, match="the first .* are used"):
        adaround(net(), images(), memory=2e5, progress=False)
    assert set(asked) == {2e5}


def test_killed_and_resumed(tmp_path, monkeypatch):
    model, x = net(), images()
    whole, calls, real = adaround(model, x, progress=False), [], ar.solve

    def dies(*args, **kw):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(ar, "solve", dies)
    with pytest.raises(KeyboardInterrupt):
        adaround(model, x, checkpoint=tmp_path, progress=False)
    assert len(Store(tmp_path).keys()) == 3
    again = adaround(model, x, checkpoint=tmp_path, progress=False)
    assert len(calls) == 4 + len(whole.layers()) - 3  # three layers were not solved again
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    adaround(
        model, x, 3, checkpoint=tmp_path, progress=False
    )  # other settings don't meet the old results
    assert len(Store(tmp_path).keys()) == 2 * len(whole.layers())


def test_damaged_and_locked_checkpoints(tmp_path):
    adaround(net(), images(), checkpoint=tmp_path, progress=False)
    file = next(Path(tmp_path).rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=file.name):
        adaround(net(), images(), checkpoint=tmp_path, progress=False)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from mep.store import Store\nwith Store({str(tmp_path)!r}).lock(): print('held', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline().strip() == "held"
    with pytest.raises(LockedError):
        adaround(net(), images(), checkpoint=tmp_path, progress=False)
    holder.communicate("\n")


def test_saved_and_loaded(tmp_path):
    qm = adaround(net(), images(), progress=False)
    save_quantized(qm, tmp_path / "net.safetensors")
    again = load_quantized(tmp_path / "net.safetensors", net(seed=5))
    with torch.no_grad():
        assert torch.equal(again(images()), qm(images()))


@pytest.mark.parametrize("bits, per_channel", [(4, False), (4, True), (3, False), (8, True)])
def test_file_computes_the_same(tmp_path, bits, per_channel):
    from mep.quant.export import export_int8

    check = export_int8(
        adaround(net(), images(), bits, per_channel=per_channel, progress=False),
        tmp_path / "net.onnx",
        x=images(8),
    )
    assert check.sqnr_db > 35


def test_benchmark_record():
    "What the chapter prints is there, and what was not run says so"
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "adaround_resnet20.json"
    if not path.exists():
        pytest.skip("benchmarks/results/adaround_resnet20.json was not made yet")
    methods = json.loads(path.read_text())["methods"]
    ours, theirs = methods["gram_w4"], methods["aimet_adaround_500"]
    assert ours["sqnr_db"] > theirs["sqnr_db"] and ours["agreement"] > theirs["agreement"]
    assert methods["aimet_adaround_defaults"]["not_run"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu():
    model, x = net().cuda(), images()
    assert noise(model, adaround(model, x, progress=False), x.cuda()) > 10
