"""The search space: options and their keys, building, coding, sampling, MACs, files; networks
cut into one."""

import json
import pickle
from collections import Counter
from itertools import product

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from mep.cost import profile
from mep.deploy import export_onnx, run
from mep.graph import TraceError
from mep.nas.space import (
    ORIGINAL,
    Arch,
    Option,
    Position,
    SearchSpace,
    _Paths,
    choices,
    chop,
    default_options,
    default_space,
    draw_archs,
    draw_parts,
    draw_tree,
)
from mep.store import Store
from mep.train import small_mobilenet, small_resnet

SPACE = default_space(
    width=16,
    options=[
        *choices("basic", depth=(2, 1), width=(1.0, 0.5)),
        *choices("mobile", expansion=(2, 4), se=(False, True)),
        *choices("shift"),
        *choices("skip"),
    ],
)
SHAPE = (3, 64, 64)


def forall(*strategies, n=30):
    return lambda test: settings(deadline=None, max_examples=n)(given(*strategies)(test))


archs = st.tuples(*(st.integers(0, len(p.options) - 1) for p in SPACE.blocks)).map(
    lambda v: SPACE.arch(*v)
)


def two(options, c=8, **kw):
    "A space of one block"
    return SearchSpace(
        Position(3, c, 2, choices("conv")),
        [Position(c, c, 1, options)],
        Position(c, 4, 1, choices("classifier")),
        (3, 8, 8),
        **kw,
    )


# Options


@forall(st.sampled_from(default_options()), st.integers(1, 9))
def test_keys_read_back(option, depth):
    option = Option(option.cell, depth, option.options)
    assert Option.from_key(option.key) == option and hash(Option.from_key(option.key)) == hash(
        option
    )


def test_equal_options_are_equal_however_they_are_written():
    assert (
        choices("mobile", expansion=4)
        == choices("mobile", expansion=4.0, kernel=[3])
        == choices("mobile")
    )
    assert len(choices("basic", depth=(1, 2), width=(1, 0.5, 0.25), act=("relu", "swish"))) == 12


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: choices("basik"), "did you mean 'basic'"),
        (lambda: choices("basic", depth=0), "depth=0"),
        (lambda: choices("basic", depth=True), "depth=True"),
        (lambda: choices("basic", width=()), "leaves nothing to choose"),
        (lambda: choices("basic", kernel=(3, 4)), "kernel=4"),
        (lambda: Option.from_key("basic,depth"), "is no option's key"),
        (lambda: Option.from_key("basic,depth=x"), "is no option's key"),
        (lambda: Option.from_key("basic,kernel=two"), "is no option's key"),
        (lambda: Option.from_key("gone,depth=1"), "unknown cell 'gone'"),
    ],
)
def test_bad_options(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_block_keys_name_results_in_a_store(tmp_path):
    store = Store(tmp_path)
    keys = {SPACE.block_key(i, o) for i, p in enumerate(SPACE.blocks) for o in p.options}
    assert len(keys) == sum(len(p.options) for p in SPACE.blocks)
    for key in list(keys)[:3]:
        store.put(key, {"w": torch.ones(1)})
        assert key in store
    assert SPACE.block_key(0, 3) == SPACE.extend(choices("vit")).block_key(0, 3)


# Building


@forall(archs, st.integers(0, 99), n=10)
def test_a_block_alone_is_the_block_in_the_network(arch, seed):
    net = SPACE.build(arch, seed).eval()
    assert [n for n, _ in net.named_children()] == ["stem", "blocks", "head"] and len(
        net.blocks
    ) == 5
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = SPACE.block("stem", 0, seed).eval()(x)
        for i, o in enumerate(arch.options):
            assert y.shape[1:] == SPACE.shapes[i + 1]
            y = SPACE.block(i, o.key, seed).eval()(y)
        assert torch.equal(SPACE.block("head", 0, seed).eval()(y), net(x))


def test_seeds_differ_by_place_option_and_number():
    w = lambda *a: next(SPACE.block(*a).parameters()).flatten()[:8]
    assert torch.equal(w(2, 0, 1), w(2, 0, 1))
    for other in ((2, 0, 2), (4, 0, 1)):
        assert not torch.equal(w(2, 0, 1), w(*other))


@forall(archs, n=15)
def test_macs_and_parameters_add_up(arch):
    p = profile(SPACE.build(arch), SPACE.input_shape)
    assert (SPACE.macs(arch), SPACE.params(arch)) == (p.macs, p.params)


def test_the_default_space_has_the_largest_as_its_reference():
    space = default_space()
    assert all(
        table.argmax() == 0 and (table == table[0]).sum() == 1 for table in space.macs_table()
    )
    assert space.size == 23**5 and len({o.cell for o in default_options()}) >= 7


def test_built_networks_export(tmp_path):
    for arch in SPACE.sample(3, seed=2):
        net, x = SPACE.build(arch).eval(), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.allclose(
                torch.as_tensor(run(export_onnx(net, tmp_path / "a.onnx", (3, 32, 32)), x.numpy())),
                net(x),
                atol=1e-3,
            )


# Coding


@forall(archs)
def test_arch_vector_and_json_are_the_same_thing(arch):
    assert (
        SPACE.decode(SPACE.encode(arch))
        == arch
        == Arch.from_json(arch.to_json())
        == SPACE.decode(SPACE.encode(arch).astype(float))
    )
    assert (
        hash(arch) == hash(Arch.from_json(arch.to_json()))
        and len(str(arch).split(" | ")) == 5
        and len(arch.key) == 16
    )
    assert (SPACE.encode([arch, SPACE.reference])[1] == 0).all()


@forall(archs)
def test_neighbours_differ_in_one_block_and_are_mutual(arch):
    near = SPACE.neighbours(arch)
    assert len(set(near)) == len(near) == 5 * 9 and arch in SPACE.neighbours(near[0])
    assert all((SPACE.encode(n) != SPACE.encode(arch)).sum() == 1 for n in near)


@pytest.mark.parametrize(
    "use, why",
    [
        (lambda: SPACE.decode([0] * 4), "length must be 5"),
        (lambda: SPACE.decode([]), "length must be 5"),
        (lambda: SPACE.decode([0, 0, 0, 0, 10]), "options 0 to 9, not 10"),
        (lambda: SPACE.decode([0, 0, 0, 0, -1]), "not -1"),
        (lambda: SPACE.decode([0, 0, 0.2, 0, 0]), "no integers"),
        (lambda: SPACE.arch(0, 0), "2 options for 5 blocks"),
        (lambda: SPACE.arch(*choices("vit") * 5), "block 0 has no option"),
        (lambda: SPACE.block(7), "there is no block 7"),
        (lambda: SPACE.build(default_space(width=24).reference), "belongs to a space with frame"),
        (lambda: SPACE.macs(Arch(SPACE.reference.options[:4], SPACE.frame)), "4 options for 5"),
    ],
)
def test_what_the_space_does_not_have(use, why):
    with pytest.raises(ValueError, match=why):
        use()


def test_unknown_options_are_told_with_a_near_one():
    with pytest.raises(ValueError, match="did you mean"):
        SPACE.block(0, choices("mobile", expansion=3)[0])


# Sampling


def test_uniform_samples_are_different_seeded_and_exhaust_the_space():
    small = two(choices("basic", width=(1.0, 0.5, 0.25)))
    assert len(set(small.sample(3))) == 3 and SPACE.sample(5, 1) == SPACE.sample(
        5, 1
    ) != SPACE.sample(5, 2)
    with pytest.raises(ValueError, match="has 3 architectures"):
        small.sample(4)
    with pytest.raises(ValueError, match="n=0"):
        small.sample(0)


def test_uniform_is_uniform():
    counts = Counter(o.key for a in SPACE.sample(3000) for o in a.options)
    assert max(abs(n - 1500) for n in counts.values()) < 6 * (15000 * 0.1 * 0.9) ** 0.5


def test_spaces_larger_than_an_integer():
    blocks = [Position(8, 8, 1, default_options()[:6] + choices("skip"))] * 40
    space = SearchSpace(
        Position(3, 8, 2, choices("conv")),
        blocks,
        Position(8, 4, 1, choices("classifier")),
        (3, 8, 8),
    )
    assert (
        space.size == 7**40
        and len(set(space.sample(5))) == 5
        and len(space.sample(6, levels=3)) == 6
    )


@forall(st.integers(1, 12), st.integers(1, 40), st.integers(0, 9), n=15)
def test_stratified_samples_are_spread_evenly(levels, n, seed):
    found = SPACE.sample(n, seed, levels=levels)
    lo, hi = (
        sum(f(m) for m in SPACE.macs_table()) + SPACE.cost("stem").macs + SPACE.cost("head").macs
        for f in (np.min, np.max)
    )
    macs = np.array([SPACE.macs(a) for a in found])
    bands = np.clip(
        np.searchsorted(np.geomspace(lo, hi, levels + 1), macs, side="right") - 1, 0, levels - 1
    )
    counts = np.bincount(bands, minlength=levels)
    assert len(set(found)) == n and found == SPACE.sample(n, seed, levels=levels)
    if n > 2 * levels and levels <= 6:
        assert counts.min() >= n // levels - 2  # the outermost may hold few


def test_samples_within_a_narrow_band():
    for i, a in enumerate(found := SPACE.sample(12, levels=3, within=0.05)):
        middle = np.median([SPACE.macs(b) for b in found[i // 4 * 4 : i // 4 * 4 + 4]])
        assert abs(SPACE.macs(a) / middle - 1) < 0.11


def test_counting_is_exact_and_draws_are_fair():
    tables = [np.array([3, 5, 9]), np.array([1, 2, 4, 8]), np.array([0, 7])]
    paths, totals = _Paths(tables), [sum(v) for v in product(*tables)]
    for lo, hi in ((0, 30), (8, 12), (25, 99)):
        rng, inside = np.random.default_rng(0), [t for t in totals if lo <= t <= hi]
        import random

        draws = [
            v
            for _ in range(2000)
            if (v := paths.draw(random.Random(int(rng.integers(1 << 30))), lo, hi))
        ]
        assert all(lo <= sum(t[k] for t, k in zip(tables, v)) <= hi for v in draws)
        assert len(set(draws)) == len(inside)
        if inside:
            assert (
                max(Counter(draws).values()) < 2000 / len(inside) + 6 * (2000 / len(inside)) ** 0.5
            )


def test_more_than_there_are():
    with pytest.raises(ValueError, match="architectures found in 2 bands, 9 asked for"):
        two(choices("basic", width=(1.0, 0.5, 0.25))).sample(9, levels=2)
    with pytest.raises(ValueError, match="levels=-1"):
        SPACE.sample(9, levels=-1)


# Spaces that are refused

A, B = choices("basic", width=(1.0, 0.5)), choices("shift")
STEM, HEAD = Position(3, 16, 2, choices("conv")), Position(16, 4, 1, choices("classifier"))


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: SearchSpace(STEM, [], HEAD), "no blocks"),
        (lambda: SearchSpace(STEM, [Position(16, 16, 1, B)], HEAD), "one architecture"),
        (lambda: SearchSpace(STEM, [Position(16, 16, 1, [])], HEAD), "has no options"),
        (lambda: SearchSpace(STEM, [Position(16, 16, 1, A + A)], HEAD), "twice"),
        (
            lambda: SearchSpace(STEM, [Position(24, 16, 1, A)], HEAD),
            "stem gives 16 channels, but block 0 takes 24",
        ),
        (
            lambda: SearchSpace(STEM, [Position(16, 24, 1, A)], HEAD),
            "block 0 gives 24 channels, but block head takes 16",
        ),
        (
            lambda: SearchSpace(STEM, [Position(16, 16, 1, A)], HEAD, (1, 32, 32)),
            "images have 1 channels",
        ),
        (
            lambda: SearchSpace(STEM, [Position(16, 16, 3, A)], HEAD),
            "block 0.*stride 3.*stride 1 or 2",
        ),
        (
            lambda: SearchSpace(STEM, [Position(16, 16, 1, A + choices("shift", kernel=5))], HEAD),
            "'shift kernel=5' does not fit.*25 groups",
        ),
        (
            lambda: SearchSpace(STEM, [Position(16, 16, 1, A + choices("basic", groups=3))], HEAD),
            "'basic groups=3' does not fit",
        ),
        (
            lambda: SearchSpace(STEM, [Position(16, 16, 1, A + choices("classifier"))], HEAD),
            "gives .16,., but the reference",
        ),
        (
            lambda: SearchSpace(
                STEM, [Position(16, 16, 1, A)], Position(16, 4, 1, choices("conv"))
            ),
            "block head.*a head gives",
        ),
        (
            lambda: SearchSpace(
                STEM,
                [Position(16, 16, 1, A)],
                Position(16, 4, 1, choices("classifier", hidden=(0, 8))),
            ),
            "head is fixed",
        ),
        (
            lambda: SearchSpace(STEM, [Position(16, 16, 1, [ORIGINAL, *A])], HEAD),
            "originals has no module '0'",
        ),
    ],
)
def test_spaces_that_make_no_sense(make, why):
    with pytest.raises(ValueError, match=why):
        make()


# Frame, hash, files


def test_frame_is_what_stays_when_options_come_and_go():
    more, less = (
        SPACE.extend(choices("vit") + choices("shift")),
        SPACE.where(lambda o: o.cell != "mobile"),
    )
    assert more.frame == less.frame == SPACE.frame and len({more.hash, less.hash, SPACE.hash}) == 3
    assert (
        more.size == 11**5
        and less.size == 6**5
        and SPACE.where(lambda o: o.cell == "shift").reference == SPACE.reference
    )
    assert (
        more.check(SPACE.sample(1)[0])
        and (SPACE.encode(SPACE.sample(1)[0]) == more.encode(SPACE.sample(1)[0])).all()
    )
    with pytest.raises(ValueError, match="has no option"):
        less.check(SPACE.arch(5, 0, 0, 0, 0))
    assert (
        len(
            {
                default_space(**kw).frame
                for kw in ({}, dict(n_classes=4), dict(width=16), dict(stem_stride=1))
            }
        )
        == 4
    )


def test_files(tmp_path):
    path = SPACE.save(tmp_path / "space.json")
    assert SearchSpace.load(path) == SPACE and hash(SearchSpace.load(path)) == hash(SPACE)
    d = json.loads(path.read_text())
    d["places"]["1"]["options"].pop()
    path.write_text(json.dumps(d))
    with pytest.raises(
        ValueError, match=f"space.json holds a space with hash {SPACE.hash}.*changed by hand"
    ):
        SearchSpace.load(path)


def test_spaces_travel_to_other_processes():
    for space in (SPACE, chop(small_resnet(4), (3, 32, 32)).space(A)):
        again = pickle.loads(pickle.dumps(space))
        assert again == space and again.sample(1) == space.sample(1)


# Networks cut into a space


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "densenet121",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",
    ],
)
def test_the_parts_are_the_network(name):
    torch.manual_seed(0)
    net, x = getattr(models, name)(weights=None).eval(), torch.randn(2, *SHAPE)
    parts = chop(net, SHAPE)
    with torch.no_grad():
        assert torch.allclose(parts.network()(x), net(x), atol=1e-5, rtol=1e-4)
        y, kept = parts.stem(x), None
        for block, shape in zip(parts.blocks, parts.shapes[1:]):
            assert y.shape[1:] == shape
            kept = y.clone()
            block(y)
            assert torch.equal(
                y, kept
            )  # a part leaves what it is given as it is: features may be cached
            y = block(y)
    assert 3 <= len(parts.blocks) <= 5 and parts.n_classes == 1000
    assert all(round(a[1] / b[1]) in (1, 2) for a, b in zip(parts.shapes[1:], parts.shapes[2:]))
    assert sum(p.numel() for p in parts.network().parameters()) == sum(
        p.numel() for p in net.parameters()
    )


def test_edges_are_narrow():
    "The cut is before an inverted residual, not in its widened middle."
    assert [s[0] for s in chop(models.mobilenet_v2(weights=None), SHAPE).shapes] == [
        3,
        16,
        24,
        32,
        96,
        320,
    ]
    assert [s[0] for s in chop(models.densenet121(weights=None), SHAPE).shapes] == [
        3,
        64,
        128,
        256,
        512,
        1024,
    ]


def test_the_network_is_never_changed_and_nothing_is_shared():
    net = small_mobilenet(4).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    parts = chop(net, (3, 32, 32))
    for p in parts.network().parameters():
        p.data.zero_()
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_own_network_as_the_reference(tmp_path):
    net, x = small_resnet(4).eval(), torch.randn(2, 3, 32, 32)
    space = chop(net, (3, 32, 32), at=["stem", "blocks.0", "blocks.1", "blocks.2"]).space(
        lambda i, p: A if p.stride == 2 else A + B
    )
    assert [len(p.options) for p in space.blocks] == [4, 3, 3] and space.reference.options == (
        ORIGINAL,
    ) * 3
    with torch.no_grad():
        assert torch.allclose(space.build(space.reference)(x), net(x), atol=1e-6)
        changed = space.build(space.arch(0, 1, 0)).eval()
        assert torch.equal(changed.stem(x), space.block("stem")(x))
        assert torch.allclose(
            torch.as_tensor(run(export_onnx(changed, tmp_path / "c.onnx", (3, 32, 32)), x.numpy())),
            changed(x),
            atol=1e-3,
        )
    assert space.macs(space.reference) == profile(net, (3, 32, 32)).macs
    one = space.block(1)
    one(torch.zeros(1, *space.shapes[2]))
    next(one.parameters()).data.zero_()
    assert not torch.equal(next(space.block(1).parameters()), next(one.parameters()))


def test_a_file_of_a_chopped_network_asks_for_it(tmp_path):
    parts, other = (chop(small_resnet(4, seed=s), (3, 32, 32)) for s in (0, 1))
    path = parts.space(A).save(tmp_path / "own.json")
    assert (
        SearchSpace.load(path, parts) == SearchSpace.load(path, parts.originals()) == parts.space(A)
    )
    with pytest.raises(ValueError, match="own.json needs the part '0'"):
        SearchSpace.load(path)
    with pytest.raises(ValueError, match="made with another network: its part '0' has hash"):
        SearchSpace.load(path, other)
    assert parts.space(A).frame != other.space(A).frame


def test_options_that_do_not_fit_a_cut_network():
    parts = chop(models.alexnet(weights=None), SHAPE)
    with pytest.raises(ValueError, match="block 0.*stride 1 or 2|but the reference gives"):
        parts.space(A)


class Flow(nn.Module):
    "Carries a value from its beginning to its end"

    def __init__(self):
        super().__init__()
        self.net = small_resnet(4)

    def forward(self, x):
        return self.net(x) + x.mean((2, 3)).sum(1, keepdim=True)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_resnet(4)

    def forward(self, x):
        y = self.net(x)
        return y, y


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_resnet(4)

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


@pytest.mark.parametrize(
    "make, error, why",
    [
        (Flow, ValueError, "can't cut Flow.*passes nowhere"),
        (Heads, ValueError, "can't cut Heads.*one tensor of logits"),
        (Branch, TraceError, "can't trace"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
            ),
            ValueError,
            "can't cut Sequential.*at least three sizes",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)),
            ValueError,
            "can't cut Sequential",
        ),
        (
            lambda: models.VisionTransformer(
                image_size=32, patch_size=8, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
            ),
            ValueError,
            "can't cut VisionTransformer.*tokens",
        ),
    ],
)
def test_networks_that_cannot_be_cut(make, error, why):
    with pytest.raises(error, match=why):
        chop(make(), (3, 32, 32))


def test_cuts_by_name():
    net = models.resnet18(weights=None)
    parts = chop(net, SHAPE, at=["maxpool", "layer1.0", "layer1", "layer2", "layer3", "layer4"])
    assert len(parts.blocks) == 5 and [s[0] for s in parts.shapes] == [3, 64, 64, 64, 128, 256, 512]
    with pytest.raises(ValueError, match="can't cut after 'layer1.0.conv9'.*did you mean"):
        chop(net, SHAPE, at=["maxpool", "layer1.0.conv9", "layer2"])
    with pytest.raises(ValueError, match="names 1 places"):
        chop(net, SHAPE, at=["maxpool"])
    with pytest.raises(ValueError, match="do not fit"):
        chop(net, (1, 32, 32))


# Pictures


def test_pictures():
    parts = chop(small_resnet(4), (3, 32, 32))
    for ax in (
        draw_tree(SPACE.blocks[1]),
        draw_archs(SPACE, SPACE.sample(4)),
        draw_parts(parts),
        draw_archs(parts.space(A), [parts.space(A).reference]),
    ):
        plt.close(ax.figure)
