"""Layers cut in two: exact at full rank, costs as measured, least error, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.compress import tensor as _tensor  # noqa: F401  adds its methods to METHODS
from mep.compress.svd import (
    METHODS,
    Method,
    alternate,
    balance,
    centred,
    chain,
    compose,
    factorize,
    highest_ranks,
    in_two,
    layer_macs,
    left_out,
    output_scales,
    spatial_svd,
    weight_svd,
)
from mep.cost import profile
from mep.moments import Quadratic, observe

SVDS = ("spatial_svd", "weight_svd_in", "weight_svd_out")


@st.composite
def convs(draw):
    g = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = (
        draw(st.sampled_from(["same", "valid", (0, 1), (2, 1)]))
        if stride == (1, 1)
        else draw(st.sampled_from([(0, 1), (2, 1), "valid"]))
    )
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    op = nn.Conv2d(
        g * draw(st.integers(1, 5)),
        g * draw(st.integers(1, 5)),
        kernel,
        stride,
        padding,
        dilation,
        g,
        draw(st.booleans()),
        mode,
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    return op.double().eval()


@settings(max_examples=80, deadline=None)
@given(convs(), st.sampled_from(sorted(METHODS)))
def test_full_rank_is_exact_and_costs_what_profile_counts(op, name):
    m, x = METHODS[name], torch.randn(2, op.in_channels, 11, 12, dtype=torch.float64)
    if m.why_not(op):
        return
    with torch.no_grad():
        cut = m.factor(op, m.max_rank(op))
        assert torch.allclose(cut(x), op(x), atol=1e-9)
    assert m.macs(op, m.max_rank(op), (11, 12)) == profile(cut, tuple(x.shape[1:])).macs
    assert layer_macs(op, (11, 12)) == profile(op, tuple(x.shape[1:])).macs


@settings(max_examples=25, deadline=None)
@given(convs(), st.sampled_from(sorted(METHODS)), st.data())
def test_any_rank_builds_what_the_cut_says(op, name, data):
    m = METHODS[name]
    if m.why_not(op):
        return
    rank = tuple(data.draw(st.integers(1, t)) for t in m.max_rank(op))
    bench = m.bench(op)
    (cut,) = bench.cuts([rank])
    x = torch.randn(2, op.in_channels, 11, 12, dtype=torch.float64)
    same = nn.Conv2d(
        op.in_channels,
        op.out_channels,
        op.kernel_size,
        op.stride,
        op.padding,
        op.dilation,
        op.groups,
        op.bias is not None,
        op.padding_mode,
    ).double()
    same.weight.data, same.bias = compose(m.formula, cut.factors).reshape_as(op.weight), op.bias
    with torch.no_grad():
        assert torch.allclose(bench.build(cut)(x), same(x), atol=1e-9)
    assert cut.error == pytest.approx(
        ((same.weight - op.weight).square().sum() / op.weight.square().sum()).item(), abs=1e-9
    )


def test_svd_is_the_best_of_its_rank():
    w = torch.randn(1, 6, 5, 3, 3, dtype=torch.float64)
    factors, (s,) = in_two(w, "orx,riy")
    kept = [factors[0][:, :, :4], factors[1][:, :4]]
    error = (compose("orx,riy", kept) - w).square().sum()
    assert error == pytest.approx(s[0, 4:].square().sum().item())
    better = alternate("orx,riy", [f[None] for f in kept], w, rounds=50)
    assert (compose("orx,riy", better) - w).square().sum() == pytest.approx(error.item(), rel=1e-6)


def correlated(n=64, c=8, size=10, seed=0):
    r = torch.Generator().manual_seed(seed)
    mix = torch.randn(c, c, generator=r)
    return (
        torch.einsum("ij,njyx->niyx", mix, torch.randn(n, c, size, size, generator=r).cumsum(2)) + 3
    )


@pytest.mark.parametrize("name", SVDS)
def test_output_space_loses_less_output(name):
    torch.manual_seed(0)
    op, x, m = nn.Conv2d(8, 12, 3, padding=1), correlated(), METHODS[name]
    f = centred(nn.Sequential(op), x)["0"]
    rank = max(1, m.max_rank(op)[0] // 3)
    with torch.no_grad():
        errors = [(m.factor(op, rank, q)(x) - op(x)).square().mean().item() for q in (None, f)]
    assert errors[1] < 0.7 * errors[0]
    assert m.bench(op, f).cuts([rank])[0].error == pytest.approx(
        errors[1] / op(x).detach().var((0, 2, 3), unbiased=False).mean().item(), rel=0.1
    )


def test_the_output_cut_is_the_closed_form():
    torch.manual_seed(0)
    op = nn.Conv2d(8, 12, 3, padding=1)
    f = Quadratic(*(t.double() for t in centred(nn.Sequential(op), correlated())["0"]))
    w = op.weight.detach().double().flatten(1)
    _, u = torch.linalg.eigh(w @ f.h[0] @ w.T)
    best = u[:, -4:] @ u[:, -4:].T @ w
    (cut,) = METHODS["weight_svd_out"].bench(op.double(), f, strength=1e-9).cuts([4])
    assert torch.allclose(compose("or,riyx", cut.factors).flatten(2)[0], best, atol=1e-4)


def test_general_c_is_followed():
    "Inputs that lost a factor of two: the cut layer makes up for it"
    torch.manual_seed(0)
    op, x = nn.Conv2d(8, 12, 3, padding=1), correlated()
    f = centred(nn.Sequential(op), x)["0"]
    halved = f._replace(h=f.h / 4, c=f.c / 2, mean_x=f.mean_x / 2)
    for m in METHODS.values():
        if m.why_not(op):
            continue
        rank = tuple(max(1, 2 * t // 3) for t in m.max_rank(op))
        errors = []
        for quad, seen in ((f, x), (halved, x / 2)):
            bench = m.bench(op, quad, strength=1e-6)
            with torch.no_grad():
                errors.append(
                    (bench.build(bench.cuts([rank], 20)[0])(seen) - op(x)).square().mean().item()
                )
        assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_ranks_from_macs_energy_and_multiples():
    op = nn.Conv2d(32, 48, 3)
    for m in METHODS.values():
        if m.why_not(op):
            continue
        bench = m.bench(op)
        for share in (0.2, 0.5, 0.9):
            rank = bench.rank(macs=share)
            assert m.macs(op, rank) <= share * layer_macs(op)
        for multiple in (8, 16):
            rank = bench.rank(macs=0.6, multiple=multiple)
            assert all(
                r % multiple == 0 or r < multiple
                for r in (rank if isinstance(rank, tuple) else (rank,))
            )
    bench = METHODS["spatial_svd"].bench(op)
    (s,) = bench.spectra
    for energy in (0.5, 0.9, 0.99):
        r = bench.rank(energy=energy)
        kept = s[0].square().cumsum(0) / s[0].square().sum()
        assert kept[r - 1] >= energy - 1e-5 and (r == 1 or kept[r - 2] < energy + 1e-5)
    assert bench.rank(energy=1.0) == 96


def test_dead_and_zero_weights():
    op = nn.Conv2d(8, 8, 3)
    nn.init.zeros_(op.weight)
    f = centred(nn.Sequential(op), torch.randn(8, 8, 6, 6))["0"]
    for m in METHODS.values():
        if m.why_not(op):
            continue
        for quad in (None, f):
            cut = m.factor(op, (1,) * len(m.letters), quad)
            assert torch.allclose(
                cut(torch.randn(1, 8, 6, 6)),
                op.bias.view(1, -1, 1, 1).expand(1, 8, 4, 4),
                atol=1e-5,
            )
    dark = centred(nn.Sequential(nn.Conv2d(8, 8, 3)), torch.zeros(4, 8, 6, 6))[
        "0"
    ]  # no image shows anything: the weights decide
    assert METHODS["spatial_svd"].factor(nn.Conv2d(8, 8, 3), 4, dark)[0].weight.isfinite().all()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()


def test_network_is_copied_and_plain():
    net, x = network(), torch.randn(16, 3, 12, 12)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cut = spatial_svd(net, macs=0.5, data=x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert {type(m) for m in cut.modules()} <= {type(m) for m in net.modules()}
    assert isinstance(cut[3], nn.Sequential) and isinstance(cut[5], nn.Conv2d)
    assert set(left_out(net)) == {"5", "8"} and list(output_scales(net)) == ["0"]
    assert not cut.training and spatial_svd(network().train(), macs=0.5)[3].training
    out = cut(x)
    out.sum().backward()
    assert cut[3][0].weight.grad is not None


def test_full_rank_network_is_the_same_in_every_space():
    net, x = network(), torch.randn(16, 3, 12, 12)
    top = {n: METHODS["spatial_svd"].max_rank(net.get_submodule(n))[0] for n in ("0", "3")}
    for data, sequential in ((None, False), (x, False), (x, True)):
        cut = spatial_svd(net, rank=top, data=data, sequential=sequential)
        assert torch.allclose(cut(x), net(x), atol=1e-3)
    quads = observe(net, x, progress=False)
    assert torch.allclose(spatial_svd(net, rank={"3": 48}, data=quads)(x), net(x), atol=1e-3)


def test_sequential_makes_up_for_earlier_losses():
    torch.manual_seed(0)
    net = nn.Sequential(
        *[m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    ).eval()
    x = correlated(32)
    with torch.no_grad():
        blind, single, order = (
            (spatial_svd(net, macs=0.4, data=d, sequential=s)(x) - net(x)).square().mean()
            for d, s in ((None, False), (x, False), (x, True))
        )
    assert order < single < blind


def test_methods_by_layer_and_the_best_of_several():
    net = network()
    cut = factorize(net, {"3": "spatial_svd", "8": "weight_svd_out"}, rank={"3": 5, "8": 2})
    assert (
        cut[3][0].out_channels == 5
        and cut[8][0].out_features == 2
        and isinstance(cut[0], nn.Conv2d)
    )
    assert len(weight_svd(net, macs=0.6)[8]) == 2
    op = nn.Conv2d(16, 16, 3)
    op.weight.data[:, 4:] = 0  # only 4 inputs are read: the cut at the input is exact
    assert weight_svd(op, macs=0.5)[0].kernel_size == (1, 1)
    assert weight_svd(op, macs=0.5, cut="out")[0].kernel_size == (3, 3)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(macs=0), "above 0 and below 1"),
        (dict(macs=1), "above 0 and below 1"),
        (dict(macs=1.5), "above 0 and below 1"),
        (dict(macs=float("nan")), "above 0"),
        (dict(energy=0), "at most 1"),
        (dict(energy=1.1), "at most 1"),
        (dict(), "give one of"),
        (dict(rank=2, macs=0.5), "give one of"),
        (dict(rank=99), "integer from 1 to 9"),
        (dict(rank=0), "integer from 1"),
        (dict(rank=2.5), "integer from 1"),
        (dict(rank=(2, 3)), "an integer from 1"),
        (dict(rank={"4": 2}), "no convolution or linear layer '4'"),
        (dict(rank={"5": 2}), "layer '5' can't be cut: its kernel is 1 x 1"),
        (dict(macs=0.01), "layer '0'.*rank 1 costs"),
        (dict(macs=0.5, multiple=0), "whole number"),
        (dict(macs=0.5, method="svd"), "unknown"),
    ],
)
def test_refused(kw, message):
    with pytest.raises(ValueError, match=message):
        factorize(network(), **kw)


def test_refused_modules():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(8, 8, 3))
    assert "one module under the names 0, 2" in left_out(twice)["0"]
    assert isinstance(spatial_svd(twice, macs=0.5)[3], nn.Sequential) and isinstance(
        spatial_svd(twice, macs=0.5)[0], nn.Conv2d
    )
    with pytest.raises(ValueError, match="under the names"):
        spatial_svd(twice, macs={"0": 0.5})
    with pytest.raises(TypeError, match="torch.nn.Module"):
        spatial_svd("net", macs=0.5)
    with pytest.raises(ValueError, match="transposed"):
        spatial_svd(nn.ConvTranspose2d(8, 8, 3), macs=0.5)
    with pytest.raises(ValueError, match="no layer of this Sequential"):
        spatial_svd(nn.Sequential(nn.ReLU()), macs=0.5)
    with pytest.raises(ValueError, match="too small"):
        weight_svd(nn.Conv2d(8, 8, 3, groups=8), macs=0.5)
    with pytest.raises(ValueError, match='cut="up"|cut=.up.'):
        weight_svd(nn.Linear(4, 4), rank=1, cut="up")
    broken = network()
    broken[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '3'.*NaN"):
        spatial_svd(broken, macs=0.5)
    with pytest.raises(ValueError, match="NaN"):
        spatial_svd(broken, macs=0.5, data=torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match="empty"):
        spatial_svd(network(), macs=0.5, data=torch.zeros(0, 3, 8, 8))


def test_one_image_is_no_worse_than_none():
    torch.manual_seed(0)
    op, x = nn.Conv2d(8, 12, 3, padding=1), correlated(64)
    with torch.no_grad():
        none, one = (
            (spatial_svd(op, macs=0.4, data=d)(x) - op(x)).square().mean() for d in (None, x[:1])
        )
    assert one < none


def test_a_network_that_cannot_be_traced():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    x = torch.rand(4, 8, 6, 6)
    with pytest.raises(ValueError, match="trace"):
        spatial_svd(Odd(), macs=0.5, data=x)
    assert isinstance(spatial_svd(Odd(), macs=0.5, data=x, sequential=False).conv, nn.Sequential)
    assert isinstance(spatial_svd(Odd(), macs=0.5).conv, nn.Sequential)


def test_linear_layers_on_vectors_and_tokens():
    torch.manual_seed(0)
    op = nn.Linear(20, 30)
    for x in (torch.randn(64, 20), torch.randn(16, 5, 20)):
        assert torch.allclose(weight_svd(op, rank=20, data=x)(x), op(x), atol=1e-4)
    assert (
        METHODS["weight_svd_out"].macs(op, 7)
        == 7 * 50
        == profile(weight_svd(op, rank=7), (20,)).macs
    )


def test_balance_changes_nothing_but_sizes():
    factors = [torch.randn(1, 1, 6, 4, 3) * 100, torch.randn(1, 1, 4, 5, 3)]
    even = balance("orx,riy", factors)
    assert torch.allclose(compose("orx,riy", even), compose("orx,riy", factors), atol=1e-3)
    assert torch.allclose(even[0].square().sum((2, 4)), even[1].square().sum((3, 4)), rtol=1e-3)


def test_half_precision_and_own_methods():
    op = nn.Conv2d(8, 8, 3).half()
    assert spatial_svd(op, macs=0.5)[0].weight.dtype == torch.float16
    own = Method("rows_first", "oryx,ri", in_two)
    cut = chain(own, nn.Conv2d(8, 8, 3), own.start(torch.randn(1, 8, 8, 3, 3), own.formula)[0])
    assert cut[1].bias is None and highest_ranks(own, nn.Conv2d(8, 8, 3)) == (8,)
