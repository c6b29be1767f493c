"""Channel pruning: the small network computes what the masked one does, on any architecture;
the Gram forms are what they claim; bad input is named."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from torch import nn

from mep.compress.channel import (
    SELECT,
    _contributions,
    _curve,
    _Surgeon,
    channel_groups,
    channel_prune,
    least_squares,
    macs_left,
    mask,
    rank_channels,
    reconstruct,
    remove,
    shares,
)
from mep.cost import profile
from mep.data import load
from mep.deploy import export_onnx, parity
from mep.graph import TraceError
from mep.moments import observe, rows
from mep.train import fit, logits, small_mobilenet, small_resnet

SHAPE = (3, 16, 16)


def lively(net, seed=0):
    "Batch norms that do something, so that a wrong cut shows"
    random = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, lo, hi in (
                (m.weight, 0.5, 1.5),
                (m.bias, -0.3, 0.3),
                (m.running_mean, -0.2, 0.2),
                (m.running_var, 0.5, 1.5),
            ):
                t.data.copy_(torch.rand(t.shape, generator=random) * (hi - lo) + lo)
    return net.eval()


def thirty_percent_off(groups, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        g: torch.randperm(g.width, generator=random)[: max(1, round(0.7 * g.width))]
        for g in groups
        if not g.locked
    }


def differ(net, shape, kept):
    "Largest difference of the small and the masked network, relative to the output"
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(
        next(net.parameters())
    )
    with torch.no_grad():
        a, b = remove(net, kept)(x), mask(net, kept)(x)
    return ((a - b).abs().max() / b.abs().max()).item()


ZOO = dict(
    resnet18=64,
    resnet50=64,
    resnext50_32x4d=64,
    mobilenet_v2=64,
    mobilenet_v3_small=64,
    efficientnet_b0=64,
    densenet121=64,
    googlenet=64,
    inception_v3=96,
    squeezenet1_1=64,
    shufflenet_v2_x0_5=64,
    mnasnet0_5=64,
    regnet_y_400mf=64,
)
RESIDUAL = dict(
    resnet18=4,
    resnet50=4,
    resnext50_32x4d=4,
    mobilenet_v2=5,
    mobilenet_v3_small=4,
    efficientnet_b0=5,
    mnasnet0_5=5,
    regnet_y_400mf=4,
)


@pytest.mark.parametrize("name", ZOO)
def test_torchvision(name):
    "Small and masked compute the same, to float64's precision"
    torch.manual_seed(0)
    options = dict(init_weights=False) if name in ("googlenet", "inception_v3") else {}
    net, shape = (
        lively(getattr(torchvision.models, name)(weights=None, num_classes=10, **options)).double(),
        (3, ZOO[name], ZOO[name]),
    )
    groups = channel_groups(net, shape)
    assert sum(g.residual for g in groups) == RESIDUAL.get(name, 0)
    assert [g.locked for g in groups if "output" in g.locked] and len(
        [g for g in groups if not g.locked]
    ) >= 10
    assert all(not g.locked for g in groups[:-1]) or name.startswith("shuffle")
    kept = thirty_percent_off(groups)
    assert differ(net, shape, kept) < 1e-12
    assert sum(p.numel() for p in remove(net, kept).parameters()) < 0.8 * sum(
        p.numel() for p in net.parameters()
    )


def test_vgg_flattens():
    net, shape = (
        torchvision.models.vgg.VGG(
            torchvision.models.vgg.make_layers([8, "M", 16, "M", 16]), num_classes=10
        ).eval(),
        (3, 32, 32),
    )
    net.classifier[0] = nn.Linear(16 * 49, 32)
    net.classifier[3] = nn.Linear(32, 16)
    net.classifier[6] = nn.Linear(16, 10)
    groups = channel_groups(net, shape)
    assert groups[2].consumers["classifier.0"].tolist() == [c for c in range(16) for _ in range(49)]
    assert differ(net.double(), shape, thirty_percent_off(groups)) < 1e-12


class Random(nn.Module):
    "A random network: each step takes earlier results, and all that are left are read at the end"

    def __init__(self, steps):
        super().__init__()
        self.steps, self.layers, widths = steps, nn.ModuleList(), [4]
        self.stem = nn.Conv2d(3, 4, 1)
        for kind, i, j in steps:
            a, b = widths[i % len(widths)], widths[j % len(widths)]
            layer, width = nn.Identity(), a
            if kind == "conv":
                width = 4 if j % 2 else 6
                layer = nn.Conv2d(a, width, 3, padding=1)
            elif kind == "depthwise":
                layer, width = nn.Conv2d(a, 2 * a, 3, padding=1, groups=a), 2 * a
            elif kind == "grouped":
                layer, width = nn.Conv2d(a, 2 * a, 1, groups=2), 2 * a
            elif kind == "norm":
                layer = nn.Sequential(nn.BatchNorm2d(a), nn.PReLU(a))
            elif kind == "gate":
                layer = nn.Sequential(
                    nn.AdaptiveAvgPool2d(1),
                    nn.Conv2d(a, 3, 1),
                    nn.ReLU(),
                    nn.Conv2d(3, a, 1),
                    nn.Sigmoid(),
                )
            elif kind == "cat":
                width = a + b
            elif kind == "add":
                layer = nn.Identity() if a == b else nn.Conv2d(b, a, 1)
            self.layers.append(layer)
            widths.append(width)
        self.head = nn.Linear(4 * sum(widths), 3)

    def forward(self, x):
        found = [self.stem(x)]
        for (kind, i, j), layer in zip(self.steps, self.layers):
            a, b = found[i % len(found)], found[j % len(found)]
            if kind == "gate":
                found.append(a * layer(a))
            elif kind == "cat":
                found.append(torch.cat([a, b], 1))
            elif kind == "add":
                found.append(F.relu(a + layer(b)))
            else:
                found.append(layer(a))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(torch.cat(found, 1), 2), 1))


KINDS = st.sampled_from("conv conv depthwise grouped norm gate cat add add".split())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(KINDS, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7),
    st.integers(0, 99),
)
def test_any_network(steps, seed):
    torch.manual_seed(seed)
    net = lively(Random(steps), seed).double()
    kept = thirty_percent_off(channel_groups(net, (3, 5, 5)), seed)
    assert differ(net, (3, 5, 5), kept) < 1e-10


def test_plain_copy():
    "The same tree of the same classes; the original, its mode and its gradients' flags untouched"
    net = small_mobilenet(5, se=True).train()
    net.head[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    small = remove(net, thirty_percent_off(channel_groups(net, SHAPE)))
    assert [(n, type(m)) for n, m in small.named_modules()] == [
        (n, type(m)) for n, m in net.named_modules()
    ]
    assert list(small.state_dict()) == list(before) and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )
    assert (
        small.training
        and not small.head[0].weight.requires_grad
        and small.blocks[1].body[0].weight.requires_grad
    )
    conv = small.blocks[1].body[3]
    assert conv.groups == conv.in_channels == conv.out_channels == len(conv.weight)
    assert all(
        m.weight.shape[1] * m.groups == m.in_channels and len(m.weight) == m.out_channels
        for m in small.modules()
        if isinstance(m, nn.Conv2d)
    )


def test_macs_left_is_exact():
    for net in (small_resnet(5), small_mobilenet(5, se=True)):
        kept = thirty_percent_off(channel_groups(net, SHAPE))
        assert macs_left(profile(net, SHAPE), kept) == profile(remove(net, kept), SHAPE).macs


# The forms in moments


def layer_and_data(n=4000, c=6, r=5, seed=0):
    "A chain of two layers, and the samples that the second one sees"
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, c), nn.ReLU(), nn.Linear(c, r)).eval()
    x = torch.randn(n, 8) @ torch.randn(8, 8)
    with torch.no_grad():
        z = F.relu(net[0](x))
    return net, x, z - z.mean(0)


def test_lasso_is_that_of_the_samples():
    "The coefficients from two small matrices are those that scikit-learn finds from the samples"
    net, x, z = layer_and_data()
    group = channel_groups(net, (8,))[0]
    quads = observe(net, x, samples=len(x), progress=False)
    gram, target = _contributions(shares(net, group, quads, ridge=1e-9)[0])
    from sklearn.linear_model import lars_path_gram

    lambdas, _, betas = lars_path_gram(target.numpy(), gram.numpy(), n_samples=1)
    y = z @ net[2].weight.T.detach()
    design = (
        torch.stack([z[:, [i]] @ net[2].weight.T[[i]].detach() for i in range(6)], -1)
        / y.square().sum(1).mean().sqrt()
    )  # [n, r, 6]
    at = float(lambdas[2] + lambdas[3]) / 2
    model = Lasso(alpha=at / y.shape[1], fit_intercept=False, tol=1e-10, max_iter=100_000).fit(
        design.flatten(0, 1).numpy(), (y / y.square().sum(1).mean().sqrt()).flatten().numpy()
    )
    assert np.allclose(model.coef_, (betas[:, 2] + betas[:, 3]) / 2, atol=2e-3)


def test_costs_are_the_rise_of_the_least_error():
    net, x, _ = layer_and_data()
    s = shares(net, channel_groups(net, (8,))[0], observe(net, x, progress=False))[0]
    best = lambda at: 1 - (s.c[:, at] * torch.linalg.solve(s.h[at][:, at], s.c[:, at].T).T).sum()
    surgeon, left = _Surgeon(s), list(range(6))
    for gone in (3, 0, 4):
        costs = surgeon.costs()
        for i, u in enumerate(left):
            assert math.isclose(
                costs[i], best([v for v in left if v != u]) - best(left), rel_tol=1e-6, abs_tol=1e-9
            )
        surgeon.drop(torch.tensor([left.index(gone)]))
        left.remove(gone)


@pytest.mark.parametrize("select", SELECT)
def test_ranking(select):
    net = lively(small_resnet(5, width=6))
    x = torch.randn(64, *SHAPE)
    quads = observe(net, x, progress=False)
    for group in channel_groups(net, SHAPE)[:-1]:
        r = rank_channels(net, group, quads, select)
        assert (
            sorted(r.order.tolist()) == list(range(group.width)) and len(r.error) == group.width + 1
        )
        assert (
            (r.error.diff() > -1e-9).all()
            and len(r.keep(3)) == 3
            and set(r.keep(3).tolist()) == set(r.order[-3:].tolist())
        )
        assert math.isclose(
            r.error[-1], len([n for n in group.consumers if n in quads]), rel_tol=0.5
        )  # nothing left: a constant, for each that reads


def test_exact_cost_beats_the_others_on_the_curve():
    torch.manual_seed(0)
    net, x = lively(small_resnet(5, width=8)), torch.randn(128, *SHAPE).cumsum(-1) / 4
    quads, groups = observe(net, x, progress=False), channel_groups(net, SHAPE)
    for group in groups[:-1]:
        half = {s: rank_channels(net, group, quads, s).error[group.width // 2] for s in SELECT}
        assert half["cost"] <= 1.02 * min(half.values())


def test_curve_of_two_readers_adds_up():
    net, x = lively(small_resnet(5, width=6)), torch.randn(32, *SHAPE)
    group = channel_groups(net, SHAPE)[0]
    found = shares(net, group, observe(net, x, progress=False))
    assert len(found) == 3
    r = rank_channels(net, group, observe(net, x, progress=False))
    assert torch.allclose(r.error, sum(_curve(s, r.order) for s in found))


# Repair


def test_least_squares_is_the_minimum():
    net, x, _ = layer_and_data()
    f, w = observe(net, x, progress=False)["2"], rows(net[2].weight.detach(), net[2])
    stays = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    best = least_squares(f, w, stays, 1e-8)
    assert (best[..., ~stays] == 0).all()
    for _ in range(20):
        other = best + 0.05 * torch.randn_like(best) * stays
        assert f.error(other).sum() >= f.error(best).sum() - 1e-6


@pytest.mark.parametrize("bias, norm", [(True, False), (False, True), (False, False), (True, True)])
def test_means_are_made_up_for(bias, norm):
    "Wherever the mean of the error can go, it goes"
    torch.manual_seed(0)
    net = lively(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, bias=bias),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
        )
    )
    x = torch.randn(256, *SHAPE) + 1
    kept = {channel_groups(net, SHAPE)[0]: [0, 2, 4, 5]}
    full = reconstruct(net, kept, x, progress=False)
    with torch.no_grad():
        want, masked, got, small = net(x), mask(net, kept)(x), full(x), remove(full, kept)(x)
    assert torch.allclose(got, small, atol=1e-5)
    assert (got - want).mean((0, 2, 3)).abs().max() < 0.03 * want.std()
    assert (got - want).square().mean() < 0.9 * (masked - want).square().mean()
    assert (small := remove(full, kept))[2].bias is None or bias or not norm


def test_repair_helps_a_whole_network():
    data = load("shapes", n_train=1500, n_valid=0, n_test=400, difficulty=0.1)
    net = fit(
        small_resnet(len(data.classes), width=8),
        (data.train, None),
        epochs=3,
        device="cpu",
        progress=False,
    ).model
    want, _ = logits(net, data.test)
    error = {}
    for repair in (False, True):
        small = channel_prune(net, data, macs=0.6, repair=repair, progress=False)
        assert (
            0.5 < profile(small, data.input_shape).macs / profile(net, data.input_shape).macs <= 0.6
        )
        error[repair] = (logits(small, data.test)[0] - want).square().mean()
    assert error[True] < 0.5 * error[False]


def test_same_call_same_network():
    net, x = lively(small_resnet(5, width=6)), torch.randn(40, *SHAPE)
    a, b = (channel_prune(net, x, keep=0.5, progress=False) for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values()))


def test_double_precision():
    net, x = lively(small_mobilenet(5, se=True)), torch.randn(200, *SHAPE)
    single, double = (
        channel_prune(n, x, keep=0.5, progress=False) for n in (net, copy.deepcopy(net).double())
    )
    assert all(t.dtype == torch.float64 for t in double.parameters())
    with torch.no_grad():
        assert torch.allclose(single(x), double(x.double()).float(), atol=1e-2)


def test_export_and_store(tmp_path):
    net, x = lively(small_mobilenet(5, se=True)), torch.randn(64, *SHAPE)
    small = channel_prune(net, x, macs=0.6, multiple=4, progress=False)
    path = export_onnx(small, tmp_path / "small.onnx", SHAPE)
    assert parity(small, path, x[:8]).max_abs < 1e-3
    torch.save(small.state_dict(), tmp_path / "small.pt")
    again = remove(
        net,
        {
            g: range(small.get_submodule(g.name).weight.shape[0])
            for g in channel_groups(net, SHAPE)
            if not g.locked
        },
    )
    again.load_state_dict(torch.load(tmp_path / "small.pt"))
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_after_svd():
    "Convolutions that became sequences of convolutions, with ranks as channels between"
    from mep.compress.svd import spatial_svd

    torch.manual_seed(0)
    net, x = lively(small_resnet(5, width=12)), torch.randn(64, *SHAPE)
    svd = spatial_svd(net, macs=0.75, data=x)
    small = channel_prune(svd, x, macs=0.66, progress=False)
    assert profile(small, SHAPE).macs <= 0.66 * profile(svd, SHAPE).macs
    assert differ(svd.double(), SHAPE, thirty_percent_off(channel_groups(svd, SHAPE))) < 1e-12


def test_options():
    net, x = lively(small_resnet(5, width=8)), torch.randn(40, *SHAPE)
    sizes = lambda small: {
        n: len(m.weight) for n, m in small.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    full = sizes(net)
    left = sizes(channel_prune(net, x, keep=0.5, residual="leave", progress=False))
    assert {n for n in full if left[n] < full[n]} == {
        "blocks.0.body.0",
        "blocks.1.body.0",
        "blocks.2.body.0",
    }
    skipped = sizes(channel_prune(net, x, keep=0.5, skip=["blocks.2.*"], progress=False))
    assert (
        all(skipped[n] == full[n] for n in full if n.startswith("blocks.2"))
        and skipped["stem.0"] == 4
    )
    given = sizes(
        channel_prune(
            net,
            x,
            keep={"blocks.1.body.0": 0.25, "blocks.1.body.3": 5, "blocks.1.shortcut.0": 5},
            progress=False,
        )
    )
    assert {n: given[n] for n in full if given[n] < full[n]} == {
        "blocks.1.body.0": 4,
        "blocks.1.body.3": 5,
        "blocks.1.shortcut.0": 5,
    }
    assert all(
        n % 4 == 0
        for k, n in sizes(channel_prune(net, x, keep=0.6, multiple=4, progress=False)).items()
        if k != "head.2"
    )


# Bad input


def chain(**heads):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *heads.values()
    )


IMAGES = torch.randn(32, *SHAPE)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(macs=0), "macs=0"),
        (dict(macs=1), "macs=1"),
        (dict(macs=1.5), "macs=1.5"),
        (dict(keep=0.0), "keep=0.0"),
        (dict(keep=1.0), "keep=1.0"),
        (dict(keep=-0.5), "keep=-0.5"),
        (dict(macs=True), "macs=True"),
        (dict(macs="half"), "macs='half'"),
        (dict(), "either"),
        (dict(macs=0.5, keep=0.5), "either"),
        (dict(keep={"0": 0}), "keep 1 to 8"),
        (dict(keep={"0": 9}), "keep 1 to 8"),
        (dict(keep={"0": 1.2}), "keep of 0=1.2"),
        (dict(keep={"0": 8}), "nothing to remove"),
        (dict(keep={"nine": 0.5}), "'nine'"),
        (dict(keep={"2": 0.5}), "the network's output"),
        (dict(keep=0.5, skip=["7"]), "'7'"),
        (dict(keep=0.5, skip=["0"]), "no channels can be removed"),
        (dict(keep=0.5, select="best"), "select='best'"),
        (dict(keep=0.5, residual="both"), "residual='both'"),
        (dict(macs=0.01), "can't be met"),
        (dict(keep=0.5, multiple=0), "multiple=0"),
        (dict(keep=0.99), "nothing to remove"),
        (dict(keep=float("nan")), "keep=nan"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        channel_prune(chain(), IMAGES, progress=False, **options)


def test_conflicting_ratios_are_named():
    net = small_resnet(5, width=8)
    with pytest.raises(ValueError, match="stem.0 and blocks.0.body.3 are joined by add"):
        channel_prune(net, IMAGES, keep={"stem.0": 0.5, "blocks.0.body.3": 0.25}, progress=False)


def test_keep_needs_channels():
    net = chain()
    group = channel_groups(net, SHAPE)[0]
    for keep, says in (([], "at least one"), ([8], "not 8"), ([-1], "not -1")):
        with pytest.raises(ValueError, match=says):
            remove(net, {group: keep})


@pytest.mark.parametrize(
    "images, says",
    [
        (IMAGES[:0], "empty"),
        (IMAGES.long(), "int64"),
        (IMAGES * math.nan, "NaN"),
        (torch.randn(4, 5, 16, 16), "do not fit|don't fit"),
    ],
)
def test_bad_images(images, says):
    with pytest.raises(ValueError, match=says):
        channel_prune(chain(), images, keep=0.5, progress=False)


def test_too_few_images():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 256, 5)
    )
    with pytest.raises(
        ValueError, match="3 has 2048 weights in a row, and the images give 32 samples"
    ):
        channel_prune(net, IMAGES, keep=0.5, progress=False)
    small = channel_prune(
        net, IMAGES, keep=0.5, repair=False, progress=False
    )  # the choice then looks at weights only
    assert small[3].in_features == 8 * 256
    deep = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *net)
    deep[2] = nn.Conv2d(8, 16, 3, padding=1)
    with pytest.warns(UserWarning, match="5 has 2048 weights in a row.*keeps its weights"):
        channel_prune(deep, IMAGES, keep=0.5, progress=False)


@pytest.mark.parametrize("where", ["0.weight", "2.bias"])
def test_nan_weights(where):
    net = chain()
    net.get_parameter(where).data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=f"{where} holds NaN"):
        channel_prune(net, IMAGES, keep=0.5, progress=False)


@pytest.mark.parametrize("select", SELECT)
def test_zero_weights(select):
    "Dead channels go first; a network of zeros is no reason to fail"
    net = chain(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, 3))
    for m in (net[0].weight, net[0].bias):
        m.data[:4] = 0
    net[2].weight.data[:, :4] = 0
    group = channel_groups(net, SHAPE)[0]
    order = rank_channels(net, group, observe(net, IMAGES, progress=False), select).order
    if select != "random":
        assert set(order[:4].tolist()) == {0, 1, 2, 3}
    for p in net.parameters():
        p.data.zero_()
    assert all(
        t.isfinite().all()
        for t in channel_prune(net, IMAGES, keep=0.5, select=select, progress=False)
        .state_dict()
        .values()
    )


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x):
        return self.head(self.c(self.b(F.relu(self.b(self.a(x))))))


def test_shared_modules_stay():
    net = Shared()
    groups = channel_groups(net, SHAPE)
    assert {g.name: "b is shared" in g.locked for g in groups} == dict(a=True, c=False, head=False)
    assert len(channel_prune(net, IMAGES, keep=0.5, progress=False).c.weight) == 3
    with pytest.raises(ValueError, match="b is shared"):
        channel_prune(net, IMAGES, keep={"a": 0.5}, progress=False)
    tied = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
    )
    tied[2].weight = tied[1].weight
    assert [bool(g.locked) for g in channel_groups(tied, SHAPE)] == [True, True]


class Odd(nn.Module):
    "A network that does `what` with eight channels"

    def __init__(self, what, width=8):
        super().__init__()
        self.what, self.a, self.b = what, nn.Conv2d(3, 8, 1), nn.Conv2d(width, 4, 1)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x):
        return self.b(self.what(self, F.relu(self.a(x)))).mean((2, 3))


@pytest.mark.parametrize(
    "what, width, says",
    [
        (lambda self, x: x.chunk(2, 1)[0], 4, "chunk"),
        (lambda self, x: x.split(4, 1)[1], 4, "split"),
        (lambda self, x: x.flip(1), 8, "flip"),
        (lambda self, x: x * self.scale, 8, "mul"),
        (lambda self, x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10, "pad"),
        (lambda self, x: x.softmax(1), 8, "softmax"),
        (lambda self, x: x[:, :4], 4, "getitem"),
        (lambda self, x: x.transpose(1, 2).reshape(x.shape[0], 8, 16, 16), 8, "transpose"),
        (lambda self, x: x.view(x.shape[0], 8, 16, 16), 8, "view"),
        (lambda self, x: x - x.mean(), 8, "mean"),
        (lambda self, x: F.layer_norm(x, (8, 16, 16)), 8, "layer_norm"),
        (lambda self, x: x + x.mean(1, keepdim=True), 8, "mean"),
    ],
)
def test_what_mixes_channels_is_locked(what, width, says):
    group = channel_groups(Odd(what, width), SHAPE)[0]
    assert says in group.locked
    with pytest.raises(ValueError, match=says):
        channel_prune(Odd(what, width), IMAGES, keep=0.5, progress=False)


@pytest.mark.parametrize(
    "what",
    [
        lambda self, x: x * 2 + 1,
        lambda self, x: x.mean((2, 3), keepdim=True),
        lambda self, x: F.pad(x, (1, 1, 0, 0)),
        lambda self, x: x[:, :, ::2],
        lambda self, x: F.interpolate(x, scale_factor=2),
        lambda self, x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda self, x: x.transpose(2, 3),
        lambda self, x: torch.maximum(x, -x),
        lambda self, x: F.dropout(x, training=self.training),
        lambda self, x: F.instance_norm(x),
        lambda self, x: torch.einsum("nchw,nchw->nchw", x, x),
    ],
)
def test_what_keeps_channels_apart_is_free(what):
    net = Odd(what).eval()
    groups = channel_groups(net, SHAPE)
    assert not groups[0].locked
    assert differ(net.double(), SHAPE, {groups[0]: [0, 3, 5]}) < 1e-12


def test_computed_weights_are_locked():
    net = chain(relu=nn.ReLU(), last=nn.Conv2d(8, 2, 1))
    nn.utils.parametrizations.weight_norm(net[2])
    assert [bool(g.locked) for g in channel_groups(net, SHAPE)] == [True, True]


def test_a_forward_that_counts_channels():
    "Not seen in the graph, but in what comes out"
    net = Odd(lambda self, x: x / x.shape[1] ** 2)
    with pytest.raises(ValueError, match="depends on the number of channels"):
        channel_prune(net, IMAGES, keep=0.5, progress=False)


def test_untraceable():
    net = Odd(lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(TraceError, match="test_channel.py"):
        channel_prune(net, IMAGES, keep=0.5, progress=False)
    with pytest.raises(TypeError):
        channel_groups("resnet18", SHAPE)


def test_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            b = self.b(self.a(x).relu())
            return dict(early=b, late=self.c(b.relu()))

    net = Two()
    assert [bool(g.locked) for g in channel_groups(net, SHAPE)] == [False, True, True]
    assert channel_prune(net, IMAGES, keep=0.5, progress=False).a.out_channels == 4


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for select in SELECT:
            channel_prune(
                small_mobilenet(5, se=True, width=0.5),
                torch.randn(300, *SHAPE),
                macs=0.5,
                select=select,
                progress=False,
            )
