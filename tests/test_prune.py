"""Magnitude pruning: exact counts, plain networks, zeros that survive training, bad input,
kill and resume."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from mep.compress.prune import (
    SCOPES,
    cubic,
    gradual_prune,
    keep_zeros,
    lamp,
    magnitude_prune,
    sparsity,
    storage,
)
from mep.deploy import export_onnx, run
from mep.train import fit, small_mobilenet, small_resnet


def forall(*strategies):
    return lambda test: settings(deadline=None, max_examples=30)(given(*strategies)(test))


def batches(n=4, shape=(3, 16, 16), classes=3, size=16):
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, *shape, generator=g), torch.randint(classes, (size,), generator=g))
        for _ in range(n)
    ]


def chain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )


def masks(net):
    return [w != 0 for n, w in net.state_dict().items() if n.endswith("weight") and w.ndim > 1]


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# What is pruned


@forall(st.sampled_from(list(SCOPES)), st.floats(0, 0.999), st.integers(0, 2**16))
def test_counts_are_exact(scope, share, seed):
    net = chain(seed)
    rows = sparsity(magnitude_prune(net, share, scope))
    groups = (
        rows
        if scope == "layer"
        else [(None, sum(r.weights for r in rows), sum(r.zeros for r in rows))]
    )
    for _, weights, zeros in groups:
        assert zeros == round(share * weights)


@forall(st.sampled_from(list(SCOPES)), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 2**16))
def test_zeros_are_nested_and_pruning_is_idempotent(scope, a, b, seed):
    net, (a, b) = chain(seed), sorted((a, b))
    few, many = magnitude_prune(net, a, scope), magnitude_prune(net, b, scope)
    assert all((keep | ~more).all() for keep, more in zip(masks(few), masks(many)))
    assert same(magnitude_prune(few, a, scope), few)
    if scope != "lamp":
        assert same(
            magnitude_prune(few, b, scope), many
        )  # what is left of a layer weighs less in lamp


@forall(st.sampled_from(["global", "layer"]), st.integers(1, 99))
def test_same_zeros_as_torch(scope, percent):
    net, theirs = chain(percent), chain(percent)
    layers = [(m, "weight") for m in theirs if isinstance(m, (nn.Conv2d, nn.Linear))]
    if scope == "global":
        prune.global_unstructured(layers, prune.L1Unstructured, amount=percent / 100)
    else:
        [prune.l1_unstructured(m, n, percent / 100) for m, n in layers]
    for m, _ in layers:
        prune.remove(m, "weight")
    assert same(magnitude_prune(net, percent / 100, scope), theirs)


@forall(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30))
def test_lamp_is_the_formula(values):
    w = torch.tensor(values, dtype=torch.float64)
    score, squares = lamp(w), w.square()
    order = squares.argsort(stable=True)
    for i, at in enumerate(order):
        left = squares[order[i:]].sum()
        assert score[at] == pytest.approx(
            float(squares[at] / left) if left > 1e-290 else 0.0, abs=1e-12
        )


def test_lamp_never_empties_a_layer():
    net = chain()
    net[0].weight.data *= 1e-4
    assert sparsity(magnitude_prune(net, 0.95, "global"))[0].share == 1
    assert sparsity(magnitude_prune(net, 0.95, "lamp"))[0].share < 1


def test_equal_weights_go_in_order():
    layer = nn.Linear(4, 1, bias=False)
    nn.init.ones_(layer.weight)
    assert magnitude_prune(layer, 0.5).weight.tolist() == [[0, 0, 1, 1]]


def test_all_zero_weights_stay_zero():
    net = chain()
    for p in net.parameters():
        p.data.zero_()
    for scope in SCOPES:
        assert sparsity(magnitude_prune(net, 0.5, scope)).total == 1


def test_input_is_unchanged_and_output_plain():
    net = small_mobilenet(3).train()
    before = copy.deepcopy(net.state_dict())
    pruned = magnitude_prune(net, 0.5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (
        pruned.training
        and pruned.state_dict().keys() == before.keys()
        and not pruned[0][0]._forward_hooks
    )
    assert torch.equal(pruned.stem[1].weight, net.stem[1].weight)  # norms are left alone


def test_no_negative_zeros():
    w = magnitude_prune(nn.Linear(50, 50), 0.5).weight
    assert not torch.signbit(w[w == 0]).any()


def test_patterns():
    net = small_resnet(3)
    share = {
        r.name: r.share
        for r in sparsity(magnitude_prune(net, 0.5, "layer", skip=["stem.*", "head.2"]))
    }
    assert share["stem.0"] == share["head.2"] == 0 and share["blocks.0.body.0"] == 0.5
    share = {
        r.name: r.share
        for r in sparsity(
            magnitude_prune(
                net, {"blocks.*": 0.5, "blocks.0.body.0": 0.75, "stem.0": 0}, skip=["blocks.1.*"]
            )
        )
    }
    assert (
        share["blocks.0.body.0"] == 0.75
        and share["blocks.0.body.3"] == 0.5
        and share["stem.0"] == share["head.2"] == share["blocks.1.body.0"] == 0
    )


# Shared weights


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again, self.tied = self.a, nn.Linear(8, 8)
        self.tied.weight = self.c.weight

    def forward(self, x):
        return self.tied(self.again(self.c(self.a(x))))


def test_shared_weights_count_once_and_stay_shared():
    pruned = magnitude_prune(Shared(), 0.5)
    rows = sparsity(pruned)
    assert (
        [r.name for r in rows] == ["a = again", "c = tied"]
        and sum(r.weights for r in rows) == 128
        and rows.total == 0.5
    )
    assert pruned.again is pruned.a and pruned.tied.weight is pruned.c.weight
    assert (
        sparsity(magnitude_prune(Shared(), 0.5, skip=["again"]))[0].zeros == 0
    )  # by any of its names
    assert [r.share for r in sparsity(magnitude_prune(Shared(), {"tied": 0.5}))] == [0, 0.5]


# Bad input


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 1.5, 90, float("nan"), True, "0.5", None])
def test_bad_sparsity(value):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        magnitude_prune(chain(), value)
    with pytest.raises(ValueError, match=r"sparsity\['0'\]"):
        magnitude_prune(chain(), {"0": value})


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: magnitude_prune(chain(), 0.5, "whole"), ValueError, "global, layer, lamp"),
        (
            lambda: magnitude_prune(chain(), 0.5, skip=["layer9.*"]),
            ValueError,
            "'layer9.*' matches no layer",
        ),
        (
            lambda: magnitude_prune(chain(), {"layer9": 0.5}),
            ValueError,
            "'layer9' matches no layer",
        ),
        (lambda: magnitude_prune(chain(), 0.5, skip=["*"]), ValueError, "leaves no layer"),
        (
            lambda: magnitude_prune(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), 0.5),
            ValueError,
            "no convolution or linear layer",
        ),
        (lambda: sparsity(nn.ReLU()), ValueError, "no convolution or linear layer"),
        (lambda: gradual_prune(chain(), batches(), 0.5, window=(0.5, 0.5)), ValueError, "window"),
        (lambda: gradual_prune(chain(), batches(), 0.5, updates=0), ValueError, "updates"),
        (lambda: gradual_prune(chain(), batches(), 2, progress=False), ValueError, "sparsity=2"),
        (
            lambda: gradual_prune(chain(), batches(), 0.5, optimizer="adam", progress=False),
            ValueError,
            "unknown optimizer",
        ),
    ],
)
def test_bad_arguments(make, error, text):
    with pytest.raises(error) as e:
        make()
    assert text in str(e.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    net = chain()
    net[3].weight.data[0, 0, 0, 0] = bad
    for f in (lambda: magnitude_prune(net, 0.5), lambda: sparsity(net), lambda: storage(net)):
        with pytest.raises(ValueError, match="layer '3' has weights that are NaN or infinite"):
            f()


def test_computed_weights_are_refused():
    for spoil in (
        lambda m: parametrizations.weight_norm(m),
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ):
        net = chain()
        spoil(net[3])
        with pytest.raises(TypeError, match="layer '3' computes its weight"):
            magnitude_prune(net, 0.5)


# Training


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_zeros_survive_training(name):
    pruned = magnitude_prune(chain(), 0.7)
    tuned = fit(
        pruned, batches(), 2, optimizer=keep_zeros(name, lr=0.01), progress=False, device="cpu"
    ).model
    before, after = sparsity(pruned), sparsity(tuned)
    assert (
        before == after
        and all(torch.equal(a, b) for a, b in zip(masks(pruned), masks(tuned)))
        and not same(pruned, tuned)
    )


@pytest.mark.parametrize("scope", list(SCOPES))
@pytest.mark.parametrize("extra", [{}, dict(ema=0.9)])
def test_gradual_reaches_the_sparsity(scope, extra):
    net = chain()
    tuned, history = gradual_prune(
        net,
        batches(),
        0.8,
        epochs=2,
        scope=scope,
        skip=["0"],
        progress=False,
        device="cpu",
        lr=0.01,
        **extra,
    )
    rows = sparsity(tuned)
    assert (
        rows[0].zeros == 0
        and sum(r.zeros for r in rows)
        == pytest.approx(0.8 * sum(r.weights for r in rows[1:]), abs=1)
        and len(history) == 2
    )
    assert sparsity(net).total == 0


def test_gradual_by_layer():
    tuned = gradual_prune(
        chain(), batches(), {"0": 0.5, "6": 0.9}, epochs=1, progress=False, device="cpu"
    ).model
    assert [round(r.share, 2) for r in sparsity(tuned)] == [0.5, 0, 0.9]


def test_gradual_follows_the_schedule():
    seen = []

    def watch(net):
        seen.append(sparsity(net).total)
        return 0.0

    gradual_prune(
        chain(),
        batches(10),
        0.8,
        epochs=2,
        window=(0.25, 0.75),
        updates=100,
        penalty=watch,
        progress=False,
        device="cpu",
    )
    for step, found in enumerate(seen):
        assert found == pytest.approx(cubic((step / 20 - 0.25) / 0.5, 0.8), abs=0.01)
    assert seen == sorted(seen)


@forall(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99))
def test_cubic_rises(a, b, final):
    a, b = sorted((a, b))
    assert 0 <= cubic(a, final) <= cubic(b, final) + 1e-12 <= final + 1e-11 and cubic(
        1, final
    ) == pytest.approx(final)


class Cut(Exception):
    "The power fails."


def test_gradual_resumes_with_the_same_bits(tmp_path):
    def training(path, cut=None):
        def penalty(net):
            steps.append(1)
            if len(steps) == cut:
                raise Cut
            return 0.0

        steps = []
        return gradual_prune(
            chain(),
            batches(),
            0.8,
            epochs=3,
            checkpoint=path,
            penalty=penalty,
            progress=False,
            device="cpu",
        ).model

    whole = training(tmp_path / "whole.safetensors")
    with pytest.raises(Cut):
        training(tmp_path / "cut.safetensors", cut=7)
    assert same(training(tmp_path / "cut.safetensors"), whole)


def test_a_checkpoint_of_another_sparsity_is_refused(tmp_path):
    common = dict(epochs=1, checkpoint=tmp_path / "run.safetensors", progress=False, device="cpu")
    gradual_prune(chain(), batches(), 0.8, **common)
    with pytest.raises(ValueError, match="checkpoint of another run"):
        gradual_prune(chain(), batches(), 0.7, **common)


# Storage and files


@forall(st.floats(0, 0.99), st.sampled_from([torch.float32, torch.float16]))
def test_storage_counts_real_formats(share, dtype):
    layer = magnitude_prune(nn.Linear(30, 20).to(dtype), share)
    csr, w = layer.weight.detach().to_sparse_csr(), layer.weight
    found = storage(layer)
    assert found["dense"] == w.numel() * w.element_size()
    assert found["csr"] == csr.values().numel() * w.element_size() + 4 * (
        csr.col_indices().numel() + csr.crow_indices().numel()
    )
    assert found["bitmap"] == csr.values().numel() * w.element_size() + 75 and found["deflate"] > 0


def test_a_pruned_network_exports_and_its_file_is_not_smaller(tmp_path):
    net = small_resnet(4).eval()
    pruned = magnitude_prune(net, 0.9)
    files = [
        export_onnx(m, tmp_path / f"{i}.onnx", (3, 32, 32)) for i, m in enumerate((net, pruned))
    ]
    x = torch.randn(4, 3, 32, 32)
    assert torch.allclose(torch.from_numpy(run(files[1], x)), pruned(x), atol=1e-5)
    assert abs(files[0].stat().st_size - files[1].stat().st_size) < 1000


def test_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pruned = gradual_prune(chain().cuda(), batches(), 0.8, epochs=1, progress=False).model
    assert (
        pruned[0].weight.is_cuda
        and sparsity(pruned).total == pytest.approx(0.8, abs=0.01)
        and storage(pruned)["dense"]
    )
