"""Layers cut in three and four: starts, fits, beside tensorly, and whole networks."""

from functools import partial

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac, tucker
from tensorly.decomposition import tensor_train as tensorly_tt
from torch import nn

from mep.compress.svd import METHODS, centred, compose, layer_macs
from mep.compress.tensor import cp, hosvd, separable, tensor_train, tt_svd, tucker2, whole_kernel
from mep.cost import profile

STARTS = dict(tucker2=hosvd, cp=separable, cp3=whole_kernel, tensor_train=tt_svd)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 2), *[st.integers(1, 5)] * 4),
    st.sampled_from(sorted(STARTS)),
    st.integers(0, 99),
)
def test_starts_are_exact(shape, name, seed):
    torch.manual_seed(seed)
    w = torch.randn(shape, dtype=torch.float64)
    factors, spectra = STARTS[name](w)
    assert torch.allclose(compose(METHODS[name].formula, factors), w, atol=1e-10)
    for s in spectra:
        assert torch.allclose(s.square().sum(-1), w.square().flatten(1).sum(-1))


@pytest.mark.parametrize("name", STARTS)
def test_the_start_loses_no_more_than_its_spectra_say(name):
    torch.manual_seed(0)
    op = nn.Conv2d(10, 12, 3).double()
    bench = METHODS[name].bench(op)
    rank = tuple(max(1, t // 2) for t in METHODS[name].max_rank(op))
    tails = (
        sum(s[0, r:].square().sum() for s, r in zip(bench.spectra, rank)) / op.weight.square().sum()
    )
    start, fitted = bench.cuts([rank], 0)[0].error, bench.cuts([rank], 30)[0].error
    assert fitted <= start + 1e-12 and start <= tails.item() + 1e-9


def test_as_good_as_tensorly():
    torch.manual_seed(0)
    op = nn.Conv2d(12, 16, 3)
    w = op.weight.detach().double().numpy()

    def lost(t):
        return ((t - w) ** 2).sum() / (w**2).sum()

    theirs = dict(
        cp=tensorly.cp_to_tensor(
            parafac(tensorly.tensor(w), 20, n_iter_max=50, init="random", random_state=0)
        ),
        tucker2=tensorly.tucker_to_tensor(tucker(tensorly.tensor(w), (6, 5, 3, 3))),
        tensor_train=tensorly.tt_to_tensor(
            tensorly_tt(tensorly.tensor(w.transpose(1, 2, 3, 0)), [1, 6, 9, 7, 1])
        ).transpose(3, 0, 1, 2),
    )
    for name, rank in (("cp", 20), ("tucker2", (5, 6)), ("tensor_train", (6, 9, 7))):
        ours = METHODS[name].bench(op).cuts([rank], 50)[0].error
        assert ours <= 1.03 * lost(theirs[name])


@pytest.mark.parametrize("name", STARTS)
def test_output_space_loses_less_output(name):
    torch.manual_seed(0)
    op, m = nn.Conv2d(8, 12, 3, padding=1), METHODS[name]
    x = torch.einsum("ij,njyx->niyx", torch.randn(8, 8), torch.randn(64, 8, 10, 10).cumsum(2)) + 3
    f = centred(nn.Sequential(op), x)["0"]
    with torch.no_grad():
        errors = [
            (m.factor(op, m.bench(op, q).rank(macs=0.4), q)(x) - op(x)).square().mean().item()
            for q in (None, f)
        ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    "name, layers", [("tucker2", 3), ("cp", 4), ("cp3", 3), ("tensor_train", 4)]
)
def test_networks(name, layers):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, (3, 5), 2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
    ).eval()
    x, cut = (
        torch.randn(8, 3, 16, 16),
        dict(tucker2=tucker2, cp=cp, cp3=partial(cp, whole=True), tensor_train=tensor_train)[name],
    )
    out = cut(net, macs=0.6, data=x)
    assert len(out[2]) == layers and isinstance(out[4], nn.Conv2d) and out(x).shape == net(x).shape
    inside = profile(out, (3, 16, 16))
    assert (
        sum(l.macs for l in inside.layers if l.name.startswith("2."))
        <= 0.6 * profile(net, (3, 16, 16))["2"].macs
    )
    rank = METHODS[name].max_rank(net[2])
    exact = cut(net, rank={"2": rank if len(rank) > 1 else rank[0]})
    assert torch.allclose(exact(x), net(x), atol=1e-4)
    with pytest.raises(ValueError, match="layer '2'"):
        cut(net, rank={"2": tuple(r + 1 for r in rank)})


def test_ranks_lose_alike():
    op = nn.Conv2d(32, 32, 3)
    nn.init.normal_(op.weight)
    op.weight.data[:, 8:] *= 0.01  # the inputs have 8 directions, the outputs 32
    q, p = METHODS["tucker2"].bench(op).rank(energy=0.9)
    assert q <= 8 < p
    for name in STARTS:
        m = METHODS[name]
        macs = [m.macs(op, r) for r in m.bench(op).ranks(8)]
        assert macs == sorted(macs) and m.macs(op, m.bench(op).rank(macs=0.3)) <= 0.3 * layer_macs(
            op
        )


def test_refused():
    for name in STARTS:
        assert "1 x 1" in METHODS[name].why_not(nn.Linear(8, 8)) and "1 x 1" in METHODS[
            name
        ].why_not(nn.Conv2d(8, 8, 1))
    assert METHODS["tucker2"].why_not(
        nn.Conv2d(16, 16, (1, 3))
    ) is None and "one dimension" in METHODS["cp"].why_not(nn.Conv2d(16, 16, (1, 3)))
    assert METHODS["cp3"].why_not(nn.Conv2d(16, 16, (1, 3))) is None
    with pytest.raises(ValueError, match="2 integers from 1 to \\(16, 16\\)"):
        tucker2(nn.Conv2d(16, 16, 3), rank=4)


def test_a_whole_kernel_loses_no_more_than_a_cut_one():
    torch.manual_seed(0)
    op, diagonal = nn.Conv2d(6, 8, 3), torch.eye(3)
    op.weight.data = torch.einsum(
        "or,ri,ryx->oiyx",
        torch.randn(8, 2),
        torch.randn(2, 6),
        torch.stack([diagonal, diagonal.flip(0)]),
    )  # no kernel of rank 1
    errors = {n: METHODS[n].bench(op).cuts([2], 50)[0].error for n in ("cp", "cp3")}
    assert errors["cp3"] < 1e-6 < 0.1 < errors["cp"]
