"""One file, right on every processor: pairs of 8-bit weights, the sums that x86 without VNNI
cuts off, and files that say where they are right."""

import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mep.deploy import ModelFileError, run
from mep.moments import Quadratic
from mep.quant import (
    adaround,
    dfq,
    export_int8,
    load_quantized,
    overflows,
    quantize,
    save_quantized,
    without_vnni,
)
from mep.quant.adaround import descend, feedback, solve, tabu, try_all
from mep.quant.bayesian_bits import bayesian_bits, compact
from mep.quant.grid import (
    PAIR_LIMIT,
    Grid,
    bound_pairs,
    bounded_grid,
    fit_grid,
    neighbours,
    pair_sums,
)
from mep.quant.grid import quantize as to_integers
from mep.quant.sim import Quantizer, QuantLayer
from mep.train import sqnr_db

BYTES = Grid(torch.tensor(1.0), torch.tensor(0), 8, signed=True, narrow=True, pair_limit=PAIR_LIMIT)


def bright(n=16, c=16, size=8):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(0))


def positive(*layers):
    "A network whose weights are all large and of one sign: nearly every pair offends at 8 bits"
    torch.manual_seed(0)
    net = nn.Sequential(*layers).eval()
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data = 0.9 + 0.1 * torch.rand(m.weight.shape)
    return net


def offending(qm):
    return sum(
        int((pair_sums(m.weight_q).abs() > PAIR_LIMIT).sum())
        for m in qm.layers().values()
        if m.pair_limit(m.grid.n_bits)
    )


# ---- the grid


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_bounded_integers_keep_the_limit_and_are_the_nearest_that_do(c_out, c_in, k, seed):
    w = 100 * torch.randn(c_out, c_in, k, k, generator=torch.Generator().manual_seed(seed))
    q = bound_pairs(w, BYTES)
    assert pair_sums(q).abs().max() <= PAIR_LIMIT if pair_sums(q).numel() else True
    assert q.abs().max() <= 127 and (q == q.round()).all()
    flat, got = w.movedim(1, -1).flatten(1), q.movedim(1, -1).flatten(1)
    steps = torch.arange(-127, 128.0)
    for i in range(0, flat.shape[1] // 2 * 2, 2):
        for a, b, x, y in zip(flat[:, i], flat[:, i + 1], got[:, i], got[:, i + 1]):
            cost = (steps[:, None] - a) ** 2 + (steps[None] - b) ** 2
            cost[(steps[:, None] + steps[None]).abs() > PAIR_LIMIT] = torch.inf
            assert (x - a) ** 2 + (y - b) ** 2 <= cost.min() * (1 + 1e-5) + 1e-4


def test_weights_that_offend_nobody_stay_as_they_are():
    w = torch.randn(8, 8, 3, 3).clamp(-1, 1) * torch.tensor([1.0, 0.1] * 4).view(8, 1, 1)
    grid = fit_grid(w, 8, symmetric=True, axis=0)
    if (pair_sums(to_integers(w, grid)).abs() <= PAIR_LIMIT).all():
        assert torch.equal(bounded_grid(w, grid).scale, grid.scale)
    halves = w / 2
    half = fit_grid(torch.cat([halves, torch.ones(8, 1, 3, 3)], 1), 8, symmetric=True, axis=0)
    assert torch.equal(to_integers(halves, half), to_integers(halves, bounded_grid(halves, half)))


@pytest.mark.parametrize("axis", [0, None])
def test_eight_safe_bits_lose_less_than_seven(axis):
    w = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    eight, seven = (fit_grid(w, b, symmetric=True, narrow=True, axis=axis) for b in (8, 7))
    error = lambda g: (
        (to_integers(w, g) * (g.scale.view(-1, 1, 1, 1) if axis == 0 else g.scale) - w)
        .square()
        .sum()
    )
    assert error(eight) < error(bounded_grid(w, eight)) < error(seven)


@given(st.integers(1, 6), st.integers(1, 9))
def test_neighbours_are_those_whose_products_are_added(c_in, taps):
    d = c_in * taps
    partner = neighbours(d, taps)
    row = torch.arange(1, d + 1) * 1000
    sums = pair_sums(row.view(1, c_in, taps, 1))[0].tolist()
    found = {tuple(sorted((i, j))) for i, j in enumerate(partner.tolist()) if j >= 0}
    assert sorted(int(row[i] + row[j]) for i, j in found) == sorted(sums) and len(found) == d // 2


# ---- the searches


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("search", [descend, tabu, feedback, solve, try_all])
def test_searches_keep_the_limit(search, taps):
    g = torch.Generator().manual_seed(3)
    d = 9 if search is try_all else 36
    x = torch.rand(d, 400, generator=g) + 0.2
    w = torch.rand(1, 6, d, generator=g) + 1.5
    h = (x @ x.T / 400)[None]
    f = Quadratic(
        h, w @ h, ((w[0] @ x).square().mean(1))[None], torch.zeros(1, d), torch.zeros(1, 6)
    )
    scale = torch.full((1, 6, 1), 2.5 / 127)
    start = bound_pairs((w / scale).reshape(6, d // taps, taps), BYTES).reshape(w.shape)
    q = {
        "feedback": lambda: feedback(scale, f, BYTES, taps),
        "solve": lambda: solve(
            w,
            Grid(torch.tensor(2.5 / 127), torch.tensor(0), 8, True, None, True, PAIR_LIMIT),
            f,
            taps=taps,
        )[0],
    }.get(search.__name__, lambda: search(start, scale, f, BYTES, taps=taps))()
    partner = neighbours(d, taps)
    both = q + q[..., partner].where(partner >= 0, 0)
    assert both.abs().max() <= PAIR_LIMIT and q.abs().max() <= 127
    if search in (descend, tabu, try_all):
        assert (f.error(q * scale) <= f.error(start * scale) + 1e-4).all()


# ---- networks

CONVOLUTIONS = [
    nn.Conv2d(16, 8, 1),
    nn.Conv2d(16, 8, 3),
    nn.Conv2d(16, 32, 3, groups=4),
    nn.Conv2d(16, 32, 3, groups=16),
    nn.Conv2d(16, 16, 3, groups=16),
]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_every_file_is_right_on_every_processor(conv, per_channel, tmp_path):
    net = positive(
        conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(conv.out_channels, 10)
    )
    x = bright()
    qm = quantize(net, x, per_channel=per_channel, progress=False)
    check = export_int8(qm, tmp_path / "net.onnx")
    assert check.overflows == 0 == offending(qm) and overflows(tmp_path / "net.onnx") == []
    assert check.images == 16 and "with and without VNNI" in repr(check)
    with torch.no_grad():
        assert torch.equal(without_vnni(qm)(x), qm(x))


def test_a_processor_with_vnni_may_have_the_unbounded_bits(tmp_path):
    net, x = (
        positive(
            nn.Conv2d(16, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        ),
        bright(),
    )
    qm, safe = (quantize(net, x, cpu=cpu, progress=False) for cpu in ("vnni", "any"))
    assert offending(qm) > 0
    with torch.no_grad():
        want, wrong = qm(x), without_vnni(qm)(x)
        assert sqnr_db(want, wrong) < 20
        assert sqnr_db(net(x), qm(x)) >= sqnr_db(net(x), safe(x)) - 0.5
    check = export_int8(qm, tmp_path / "net.onnx", min_sqnr_db=-99)
    assert check.overflows == offending(qm) == sum(
        o.offending for o in overflows(tmp_path / "net.onnx")
    ) and "WRONG on x86 without VNNI" in repr(check)
    got = torch.as_tensor(run(tmp_path / "net.onnx", x))
    assert torch.equal(got, want) or torch.equal(
        got, wrong
    )  # this processor has VNNI (or is no x86), or it hasn't


def test_a_linear_layer_is_cut_like_sixteen_bit_sums_say():
    linear = nn.Linear(5, 3)
    source, out = Quantizer(8), Quantizer(None)
    source.grid = Grid(torch.tensor(1.0), torch.tensor(0), 8)
    layer = QuantLayer(linear, 8, source, out)
    layer.set_grid(Grid(torch.tensor(1.0), torch.tensor(0), 8, True, None, True))
    layer.set_weight_q(
        torch.tensor([[127, 127, -127, -127, 127], [100, -100, 1, 127, 0], [64, 64, 64, 65, 127]])
    )
    linear.bias.data.zero_()
    from mep.quant.export import _SaturatingLayer

    layer.__class__ = _SaturatingLayer
    x = torch.full((1, 5), 255.0)
    expected = [[32767 - 32768 + 127 * 255, 128 * 255, 128 * 255 + 32767 + 127 * 255]]
    assert layer(x).tolist() == expected


def test_few_bits_of_activations_need_no_limit():
    net, x = positive(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), bright()
    qm = quantize(net, x, a_bits=7, progress=False)
    assert all(m.pair_limit() is None for m in qm.layers().values()) and all(
        m.grid.pair_limit is None for m in qm.layers().values()
    )


def test_adaround_dfq_and_bayesian_bits_keep_the_limit(tmp_path):
    net, x = (
        positive(
            nn.Conv2d(16, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ),
        bright(32),
    )
    labels = torch.arange(32) % 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [
            adaround(net, x, 8, progress=False),
            adaround(net, x, 8, method="sampled", iterations=5, progress=False),
            dfq(net, x, progress=False),
            compact(
                bayesian_bits(
                    net, [(x, labels)], mu=0.0, epochs=1, finetune=0, prune=False, progress=False
                )
            ),
        ]
    for qm in made:
        assert offending(qm) == 0


def test_integers_beyond_the_limit_are_refused():
    net, x = positive(nn.Conv2d(16, 8, 1)), bright()
    layer = quantize(net, x, progress=False).layers()["0"]
    with pytest.raises(ValueError, match="64 pairs of neighbouring integers .* cpu='vnni'"):
        layer.set_weight_q(torch.full_like(layer.weight_q, 127))
    with pytest.raises(ValueError, match="cpu='avx'"):
        quantize(net, x, cpu="avx", progress=False)


def test_the_limit_is_saved(tmp_path):
    net, x = positive(nn.Conv2d(16, 8, 1), nn.ReLU()), bright()
    qm = quantize(net, x, progress=False)
    save_quantized(qm, tmp_path / "q.safetensors")
    again = load_quantized(tmp_path / "q.safetensors", net)
    assert again.layers()["0"].grid.pair_limit == qm.layers()["0"].grid.pair_limit == PAIR_LIMIT


# ---- files of others


def file(path, op, weight, x_type=np.uint8, operator=False, **attributes):
    "A layer as quantizers spell it: with quantize and dequantize around it, or as an operator of integers"
    one, zero = np.float32(1), x_type(0)
    c = dict(s=one, z=zero, w=weight, wz=np.zeros((), weight.dtype))
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    if operator:
        nodes += [
            helper.make_node(
                "QLinearConv",
                ["q", "s", "z", "w", "s", "wz", "s", "z"],
                ["yq"],
                name="layer",
                **attributes,
            ),
            helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
        ]
    else:
        nodes += [
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wd"]),
            helper.make_node(op, ["d", "wd"], ["y"], name="layer", **attributes),
        ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in c.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return overflows(path)


def full(*shape):
    return np.full(shape, 127, np.int8)


def test_files_of_others_are_asked(tmp_path):
    p = tmp_path / "f.onnx"
    assert [
        (o.name, o.op, o.pairs, o.offending, o.worst) for o in file(p, "Conv", full(4, 3, 3, 3))
    ] == [("layer", "Conv", 52, 52, 254)]
    assert file(p, "Conv", full(4, 3, 3, 3), operator=True)[0].op == "QLinearConv"
    assert (
        file(p, "Gemm", full(4, 5), transB=1)[0].pairs == 8
        and file(p, "Gemm", full(5, 4))[0].pairs == 8
    )
    assert file(p, "MatMul", full(5, 4))[0].pairs == 8
    assert file(p, "Conv", full(6, 1, 3, 3), group=6) == []  # depthwise
    assert (
        file(p, "Conv", full(12, 1, 3, 3), group=6)[0].pairs == 48
    )  # one input, two outputs in each group
    assert file(p, "Conv", full(4, 3, 3, 3) // 2) == []
    assert (
        file(p, "Conv", full(4, 3, 3, 3), x_type=np.int8) == []
        and file(p, "Conv", full(4, 3, 3, 3).astype(np.uint8)) == []
    )
    (tmp_path / "no.onnx").write_text("no file")
    with pytest.raises(ModelFileError):
        overflows(tmp_path / "no.onnx")


# ---- what is lost is said


def test_a_great_loss_is_a_warning_and_a_number(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).eval()
    x = 30000 + 50 * bright(16, 3, 16)
    with torch.no_grad():
        y = net[0](x)
        net[1].running_mean.copy_(y.mean((0, 2, 3)))
        net[1].running_var.copy_(y.var((0, 2, 3)))
    with pytest.warns(UserWarning, match="keep only .* dB"):
        qm = quantize(net, x, progress=False)
    check = export_int8(qm, tmp_path / "net.onnx", min_sqnr_db=-99)
    with torch.no_grad():
        assert (
            check.float_db == pytest.approx(sqnr_db(net(x), qm(x)), abs=0.1) and check.float_db < 10
        )


def test_adaround_is_never_worse_than_nearest_on_images_held_out():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 5),
        nn.ReLU(),
        nn.Conv2d(32, 32, 5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()
    x = torch.cat([torch.zeros(12, 3, 12, 12), torch.randn(4, 3, 12, 12)])[torch.randperm(16)]
    held = x[3::4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, rounded = (
            quantize(
                net,
                torch.cat([b for i, b in enumerate(x.split(1)) if i % 4 != 3]),
                w_bits=4,
                progress=False,
            ),
            adaround(net, x, 4, progress=False),
        )
    with torch.no_grad():
        want = net(held)
        assert sqnr_db(want, rounded(held)) >= sqnr_db(want, plain(held)) - 1e-3


def test_ranges_that_the_output_feels_beat_those_of_the_squared_error():
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = (
                nn.Conv2d(3, 32, 3, padding=1),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.Linear(32, 10),
            )

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.head(F.relu(self.b(y) * 3 + y - 1.5).mean((2, 3)))

    net, x = Sum().eval(), torch.randn(128, 3, 12, 12)
    db = {}
    for ranges in ("output", "mse"):
        qm = quantize(net, x[:64], a_bits=5, w_bits=None, ranges=ranges, progress=False)
        with torch.no_grad():
            db[ranges] = sqnr_db(net(x[64:]), qm(x[64:]))
    assert db["output"] >= db["mse"]


def test_the_shell_asks_files(tmp_path, capsys):
    from mep.pipeline.cli import main

    file(tmp_path / "bad.onnx", "Conv", full(4, 3, 3, 3))
    file(tmp_path / "good.onnx", "Conv", full(4, 3, 3, 3) // 2)
    with pytest.raises(SystemExit) as e:
        main(["check", str(tmp_path / "bad.onnx"), str(tmp_path / "good.onnx")])
    out = capsys.readouterr().out
    assert (
        e.value.code == 1
        and "52 of 52 pairs" in out
        and "good.onnx: right on every processor" in out
    )


def test_transposed_convolutions_count_as_float_and_by_their_macs(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check = export_int8(
            quantize(net, torch.randn(16, 3, 16, 16), progress=False), tmp_path / "net.onnx"
        )
    convolutions = 8 * 8 * 8 * 27 + 16 * 16 * 6 * 3
    transposed = 8 * 8 * 8 * 6 * 16
    assert check.float_layers == 1 and check.integer_macs == pytest.approx(
        convolutions / (convolutions + transposed)
    )
