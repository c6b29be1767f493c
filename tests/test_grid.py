"""Properties of quantization grids: bounds on the error, ranges no worse than min-max,
agreement with onnxruntime, bad input."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mep.quant.grid import (
    RANGES,
    Grid,
    dequantize,
    fake_quant,
    fit_grid,
    int_range,
    make_grid,
    minmax_range,
    mse_range,
    percentile_range,
    quantize,
)

BITS = st.integers(2, 16)
NUMBERS = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0)
KINDS = st.sampled_from(
    [
        dict(symmetric=False),
        dict(symmetric=False, signed=True),
        dict(symmetric=True),
        dict(symmetric=True, narrow=True),
        dict(symmetric=True, narrow=False),
    ]
)


def forall(*strategies):
    "hypothesis' `given`, without a wall-clock deadline"
    return lambda test: settings(deadline=None, max_examples=50)(given(*strategies)(test))


@st.composite
def tensors(draw, max_channels=4):
    "Random tensors [C, n] whose channels may differ a lot in scale and offset."
    rows, cols, seed = (
        draw(st.integers(1, max_channels)),
        draw(st.integers(1, 60)),
        draw(st.integers(0, 2**20)),
    )
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g) * torch.logspace(-3, 2, rows)[:, None]
    return x + draw(st.sampled_from([0.0, 0.0, 1.0, -30.0]))


def mse(x, grid):
    return (fake_quant(x, grid) - x).double().square().mean()


# The grid


@forall(NUMBERS, NUMBERS, BITS, KINDS)
def test_a_grid_covers_its_range_and_holds_zero(a, b, n_bits, kind):
    lo, hi = min(a, b), max(a, b)
    grid = make_grid(lo, hi, n_bits, **kind)
    slack = grid.scale * (
        0.501 if not kind["symmetric"] else 1e-3
    )  # an asymmetric grid moves up to half a step to meet zero
    assert grid.lo <= lo + slack and grid.hi >= hi - slack
    assert fake_quant(torch.zeros(3), grid).eq(0).all()
    assert grid.qmin <= grid.zero_point <= grid.qmax
    assert grid.qmax - grid.qmin + 1 == 2**n_bits - grid.narrow
    if kind["symmetric"]:
        assert grid.zero_point == 0


@forall(tensors(), BITS, KINDS, st.sampled_from([None, 0]))
def test_rounding_moves_a_number_at_most_half_a_step(x, n_bits, kind, axis):
    grid = make_grid(*minmax_range(x, axis), n_bits, axis=axis, **kind)
    scale = grid.scale if axis is None else grid.scale[:, None]
    shift = (
        1.0 if kind["symmetric"] else 2.0
    )  # the zero-point's own rounding may clip another half step
    assert ((fake_quant(x, grid) - x).abs() <= scale * 0.5 * shift * 1.001 + x.abs() * 1e-6).all()


@forall(tensors(), BITS, KINDS, st.sampled_from([None, 0, 1, -1]))
def test_simulation_is_quantize_then_dequantize(x, n_bits, kind, axis):
    grid = make_grid(*minmax_range(x, axis), n_bits, axis=axis, **kind)
    q, sim = quantize(x, grid), fake_quant(x, grid)
    assert (
        q.dtype == torch.int32
        and q.shape == x.shape
        and q.min() >= grid.qmin
        and q.max() <= grid.qmax
    )
    assert torch.equal(sim, dequantize(q, grid))
    assert torch.equal(fake_quant(sim, grid), sim)  # idempotent
    assert torch.equal(quantize(dequantize(q, grid), grid), q)


@forall(tensors(), BITS)
def test_quantization_keeps_the_order(x, n_bits):
    q = quantize(x.flatten().sort().values, fit_grid(x, n_bits))
    assert (q.diff() >= 0).all()


@forall(tensors(), BITS)
def test_a_narrow_grid_mirrors(x, n_bits):
    grid = fit_grid(x, n_bits, symmetric=True, narrow=True)
    assert torch.equal(fake_quant(-x, grid), -fake_quant(x, grid))


@forall(tensors(), st.integers(2, 8), KINDS, st.sampled_from(list(RANGES)))
def test_a_grid_per_channel_is_one_grid_per_row(x, n_bits, kind, method):
    together = fake_quant(x, fit_grid(x, n_bits, method, axis=0, **kind))
    alone = torch.stack([fake_quant(row, fit_grid(row, n_bits, method, **kind)) for row in x])
    torch.testing.assert_close(together, alone)


def test_channels_may_lie_on_any_axis():
    x = torch.randn(3, 5, 2, 4)
    for axis in range(4):
        moved = fake_quant(x.movedim(axis, 0), fit_grid(x.movedim(axis, 0), 4, axis=0)).movedim(
            0, axis
        )
        assert torch.equal(fake_quant(x, fit_grid(x, 4, axis=axis)), moved)
        assert torch.equal(fake_quant(x, fit_grid(x, 4, axis=axis - 4)), moved)


def test_input_is_never_changed():
    x = torch.randn(4, 30, requires_grad=True)
    before = x.detach().clone()
    for axis in (None, 0):
        for method in RANGES:
            grid = fit_grid(x, 4, method, axis=axis)
            parts = grid.scale.clone(), grid.zero_point.clone()
            fake_quant(x, grid), quantize(x, grid), fake_quant(x.detach(), grid)
            assert (
                torch.equal(x, before)
                and torch.equal(grid.scale, parts[0])
                and torch.equal(grid.zero_point, parts[1])
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_computed_in_float32_or_better(dtype):
    x = torch.randn(100).to(dtype)
    grid = fit_grid(x, 16)
    assert fake_quant(x, grid).dtype == dtype
    assert torch.equal(quantize(x, grid), quantize(x.double(), grid)) or dtype != torch.float64
    assert (
        torch.equal(fake_quant(x, grid), fake_quant(x.float(), grid).to(dtype))
        or dtype == torch.float64
    )


def test_infinity_goes_to_the_ends():
    grid = make_grid(-1.0, 1.0)
    assert quantize(torch.tensor([-math.inf, math.inf]), grid).tolist() == [0, 255]


def test_a_grid_cannot_be_changed_and_describes_itself():
    grid = make_grid(
        torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]), 4, symmetric=True, axis=0
    )
    assert "int4 -8..7" in repr(grid) and "2 channels on axis 0" in repr(grid)
    with pytest.raises(FrozenInstanceError):
        grid.n_bits = 8


# onnxruntime computes the same integers


def onnx_integers(x, grid):
    kind = getattr(TensorProto, f"{'' if grid.signed else 'U'}INT{grid.n_bits}")
    np_kind = np.dtype(f"{'' if grid.signed else 'u'}int{grid.n_bits}")
    axis = {} if grid.axis is None else dict(axis=grid.axis)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **axis)
    shape = list(grid.scale.shape)
    parts = [
        helper.make_tensor("s", TensorProto.FLOAT, shape, grid.scale.numpy().ravel()),
        helper.make_tensor("z", kind, shape, grid.zero_point.numpy().astype(np_kind).ravel()),
    ]
    graph = helper.make_graph(
        [node],
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("q", kind, x.shape)],
        parts,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x.numpy()}
    )[0]


@pytest.mark.parametrize("n_bits", [8, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("axis", [None, 0])
def test_integers_equal_onnxruntimes(n_bits, signed, axis):
    g = torch.Generator().manual_seed(n_bits + 2 * signed)
    x = torch.randn(4, 3001, generator=g) * 2
    ranges = (
        (-1.3, 2.0) if axis is None else (-torch.rand(4, generator=g), torch.rand(4, generator=g))
    )
    grid = make_grid(*ranges, n_bits, signed=signed, axis=axis)
    assert np.array_equal(quantize(x, grid).numpy(), onnx_integers(x, grid).astype(np.int32))


@pytest.mark.parametrize("zero", [0, 3, 128])
def test_ties_equal_onnxruntimes(zero):
    x = torch.arange(-300, 300) * 0.25
    grid = Grid(torch.tensor(0.5), torch.tensor(zero))
    assert np.array_equal(quantize(x, grid).numpy(), onnx_integers(x, grid).astype(np.int32))
    assert quantize(torch.tensor([0.25, 0.75, 1.25, 1.75]), grid).sub(zero).tolist() == [0, 2, 2, 4]


# Ranges


@forall(tensors(), st.integers(2, 10), KINDS, st.sampled_from([None, 0]))
def test_mse_range_is_never_worse_than_minmax(x, n_bits, kind, axis):
    best, widest = (fit_grid(x, n_bits, method, axis=axis, **kind) for method in ("mse", "minmax"))
    assert mse(x, best) <= mse(x, widest) * 1.0001 + 1e-12


SAMPLES = dict(
    gauss=lambda n: torch.randn(n),
    relu=lambda n: torch.randn(n).relu(),
    skewed=lambda n: torch.randn(n).exp() - 1,
    heavy=lambda n: torch.randn(n) / torch.randn(n).abs().clamp(min=0.02),
)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_finds_what_an_exhaustive_search_finds(name, n_bits, symmetric):
    torch.manual_seed(0)
    x = SAMPLES[name](4000)
    lo, hi = minmax_range(x)
    parts = torch.linspace(0.02, 1, 25 if not symmetric else 400).tolist()
    pairs = (
        [(a, a) for a in parts]
        if symmetric
        else [(a, b) for a in (parts if lo < 0 else [1]) for b in parts]
    )
    least = min(mse(x, make_grid(a * lo.clamp(max=0), b * hi, n_bits, symmetric)) for a, b in pairs)
    assert mse(x, fit_grid(x, n_bits, "mse", symmetric)) <= least * 1.03


def test_a_histogram_stands_for_a_large_tensor():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(300_000), torch.tensor([25.0])])
    for n_bits in (3, 8):
        lo, hi = mse_range(x, n_bits=n_bits)
        least = min(
            mse(x, make_grid(a * lo, b * hi, n_bits))
            for a in (0.9, 0.95, 1, 1.05)
            for b in (0.9, 0.95, 1, 1.05)
        )
        assert mse(x, make_grid(lo, hi, n_bits)) <= least * 1.02


@forall(tensors(), st.floats(51, 100))
def test_percentiles_lie_inside_minmax_and_keep_their_share(x, percentile):
    (lo, hi), (least, most) = percentile_range(x, percentile=percentile), minmax_range(x)
    assert least <= lo <= hi <= most
    assert (x <= hi).float().mean() >= percentile / 100 - 1e-6 and (
        x >= lo
    ).float().mean() >= percentile / 100 - 1e-6


def test_more_bits_less_error():
    torch.manual_seed(0)
    x = torch.randn(5000)
    for method in RANGES:
        errors = [mse(x, fit_grid(x, b, method)) for b in (2, 3, 4, 6, 8)]
        assert errors == sorted(errors, reverse=True), method


@pytest.mark.parametrize("method", list(RANGES))
@pytest.mark.parametrize(
    "values", [[0.0, 0.0, 0.0], [3.0, 3.0], [-3.0], [1e-42, 0.0], [1e30, -1e30], [5.0]]
)
def test_degenerate_tensors(method, values):
    x = torch.tensor(values)
    for symmetric in (True, False):
        for axis, y in ((None, x), (0, torch.stack([x, torch.zeros_like(x)]))):
            grid = fit_grid(y, 8, method, symmetric, axis=axis)
            assert grid.scale.isfinite().all() and (grid.scale > 0).all()
            torch.testing.assert_close(fake_quant(y, grid), y, rtol=5e-3, atol=1e-37)


# Gradients


@forall(tensors(), st.sampled_from([None, 0]))
def test_gradient_is_straight_through_and_zero_where_clipped(x, axis):
    x = x.requires_grad_()
    lo, hi = minmax_range(x, axis)
    grid = make_grid(lo.clamp(max=0) / 2, hi.clamp(min=0) / 2, 4, axis=axis)
    g = torch.randn_like(x)
    fake_quant(x, grid).backward(g)
    scale, low, high = (o if axis is None else o[:, None] for o in (grid.scale, grid.lo, grid.hi))
    clear = ((x - low + scale / 2).abs() > scale * 1e-3) & (
        (x - high - scale / 2).abs() > scale * 1e-3
    )  # away from the two edges
    inside = (x > low - scale / 2) & (x < high + scale / 2)
    torch.testing.assert_close(x.grad[clear], (g * inside)[clear])


@pytest.mark.parametrize("axis", [None, 0])
def test_scale_gets_the_gradient_of_lsq(axis):
    "LSQ (2020), equation 3: q - x/s on the grid, the end's integer outside."
    x = torch.randn(3, 200) * 2
    scale = torch.full([] if axis is None else [3], 0.25).requires_grad_()
    grid = Grid(scale, torch.zeros_like(scale).int(), 4, signed=True, axis=axis)
    fake_quant(x, grid).sum().backward()
    v = x / 0.25
    expected = torch.where(
        (v.round() >= -8) & (v.round() <= 7), v.round() - v, v.round().clamp(-8, 7)
    )
    torch.testing.assert_close(
        scale.grad, expected.sum() if axis is None else expected.sum(1), rtol=1e-4, atol=1e-3
    )


def test_gradient_reaches_the_ends_of_a_range():
    end = torch.tensor(1.0, requires_grad=True)
    fake_quant(torch.tensor([5.0]), make_grid(-end, end, 8, symmetric=True)).sum().backward()
    assert end.grad == pytest.approx(1)  # a clipped number moves with the end (PACT)


# Integer arithmetic


@forall(st.integers(0, 1000), st.integers(2, 8), st.integers(2, 8))
def test_integer_product_equals_the_simulation(seed, w_bits, a_bits):
    g = torch.Generator().manual_seed(seed)
    w, x = torch.randn(5, 7, generator=g).double(), torch.rand(7, 4, generator=g).double() * 3 - 0.5
    gw, gx = fit_grid(w, w_bits), fit_grid(x, a_bits)  # both with zero-points
    qw, qx, zw, zx, n = quantize(w, gw), quantize(x, gx), gw.zero_point, gx.zero_point, 7
    total = qw @ qx - zw * qx.sum(0, keepdim=True) - zx * qw.sum(1, keepdim=True) + n * zw * zx
    torch.testing.assert_close(
        gw.scale.double() * gx.scale.double() * total, fake_quant(w, gw) @ fake_quant(x, gx)
    )


# Bad input


@pytest.mark.parametrize("n_bits", [-1, 0, 1, 17, 32, 33, 4.5, "8", None, True])
def test_bits_out_of_range_are_refused(n_bits):
    for f in (
        int_range,
        lambda b: make_grid(-1.0, 1.0, b),
        lambda b: fit_grid(torch.randn(9), b),
        lambda b: mse_range(torch.randn(9), n_bits=b),
        lambda b: Grid(torch.tensor(1.0), torch.tensor(0), b),
    ):
        with pytest.raises(ValueError, match=r"n_bits=.*2 to 16 bits"):
            f(n_bits)


@pytest.mark.parametrize(
    "lo, hi, message",
    [
        (1.0, -1.0, "swapped"),
        (math.nan, 1.0, "NaN"),
        (0.0, math.inf, "infinite"),
        (-3e38, 3e38, "infinite"),
        (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), "lo=2 is above hi=1"),
    ],
)
def test_bad_ranges_are_refused(lo, hi, message):
    axis = 0 if isinstance(lo, torch.Tensor) else None
    with pytest.raises(ValueError, match=message):
        make_grid(lo, hi, axis=axis)


def test_ranges_per_channel_need_an_axis():
    with pytest.raises(ValueError, match="axis=None"):
        make_grid(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="axis=0"):
        make_grid(0.0, 1.0, axis=0)
    with pytest.raises(
        ValueError, match=r"3 channels on axis 1, but the tensor has shape \(3, 4\)"
    ):
        fake_quant(torch.randn(3, 4), make_grid(torch.zeros(3), torch.ones(3), axis=1))


@pytest.mark.parametrize(
    "scale, zero, message",
    [
        (-1.0, 0, "positive"),
        (math.nan, 0, "positive"),
        (math.inf, 0, "positive"),
        (1.0, 300, "zero is not on the grid"),
        (1.0, -1, "zero is not on the grid"),
    ],
)
def test_bad_grids_are_refused(scale, zero, message):
    with pytest.raises(ValueError, match=message):
        Grid(torch.tensor(scale), torch.tensor(zero))


def test_a_zero_point_is_an_integer():
    with pytest.raises(TypeError, match="integers"):
        Grid(torch.tensor(1.0), torch.tensor(0.5))


@pytest.mark.parametrize("find", [minmax_range, percentile_range, mse_range])
def test_bad_tensors_are_refused(find):
    with pytest.raises(ValueError, match="no numbers"):
        find(torch.empty(0, 4))
    with pytest.raises(ValueError, match="2 of 3 numbers are NaN or infinite"):
        find(torch.tensor([math.nan, 1.0, -math.inf]))
    with pytest.raises(ValueError, match=r"axis=2, but the tensor has shape \(3, 4\)"):
        find(torch.randn(3, 4), axis=2)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'kl' is unknown; known are minmax, percentile, mse"):
        fit_grid(torch.randn(5), method="kl")
    with pytest.raises(ValueError, match="percentile=30"):
        percentile_range(torch.randn(5), percentile=30)
    with pytest.raises(ValueError, match="no negative numbers"):
        make_grid(-1.0, 1.0, symmetric=True, signed=False)
    with pytest.raises(ValueError, match="1 of 2 numbers are NaN"):
        quantize(torch.tensor([math.nan, 0.0]), make_grid(-1.0, 1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grids_work_on_cuda():
    x = torch.randn(8, 5000)
    for axis in (None, 0):
        for method in RANGES:
            there = fit_grid(x.cuda(), 4, method, symmetric=True, axis=axis)
            assert there.scale.is_cuda
            torch.testing.assert_close(
                fake_quant(x.cuda(), there).cpu(), fake_quant(x, there.to("cpu"))
            )
