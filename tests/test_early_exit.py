"""Early exits: stages equal the network, dropping equals masking, thresholds meet budgets,
promises hold, cascades equal torch, bad input, save and load, resume."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.conditional.early_exit import (
    Cascade,
    EarlyExit,
    Exits,
    MSDNet,
    budgeted_thresholds,
    calibrate,
    confidence,
    evaluate,
    exit_logits,
    exit_loss,
    exit_table,
    export_cascade,
    fit_exits,
    fit_temperature,
    guaranteed_thresholds,
    image_latencies,
    joint_thresholds,
    load_exits,
    p_value,
    save_exits,
    stage_inputs,
)
from mep.cost import profile
from mep.deploy import ModelFileError, export_onnx
from mep.graph import TraceError
from mep.store import StoreError, save
from mep.train import accuracy, evaluating, small_resnet


def forall(*strategies):
    return lambda test: settings(deadline=None, max_examples=25)(given(*strategies)(test))


def images(n=6, shape=(3, 32, 32), seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def batches(n=2, classes=5, size=16):
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 16, 16, generator=g), torch.randint(classes, (size,), generator=g))
        for _ in range(n)
    ]


def small(classes=5, after=("blocks.0", "blocks.1"), **kw):
    return EarlyExit(
        small_resnet(classes, width=8), after, **dict(dict(input_shape=(3, 16, 16)), **kw)
    )


@pytest.fixture(scope="module")
def net():
    return small()


def run(model, x):
    with torch.no_grad(), evaluating(model):
        return model(x)


def table(n, seed, exits=4):
    "Confidences and answers of made-up exits: the later, the better; confidences say what is true"
    g = torch.Generator().manual_seed(seed)
    hard = 8 * torch.rand(n, generator=g)
    p = torch.stack(
        [torch.sigmoid(4 + k - hard + torch.randn(n, generator=g)) for k in range(exits)]
    ).double()
    return Exits(p, torch.rand(n, generator=g)[None] < p, [1.0 + k for k in range(exits)])


# Any network


@pytest.mark.parametrize(
    "name, after",
    [
        ("resnet18", ["layer1", "layer2.0"]),
        ("mobilenet_v3_small", ["features.2", "features.6"]),
        ("shufflenet_v2_x0_5", ["stage2"]),
        ("squeezenet1_1", ["features.5"]),
        ("densenet121", ["features.denseblock1"]),
        ("efficientnet_b0", ["features.3"]),
    ],
)
def test_torchvision_networks_keep_their_function(name, after):
    model, x = getattr(torchvision.models, name)(weights=None, num_classes=7).eval(), images(3)
    net = EarlyExit(model, after)
    out = run(net, x)
    assert [o.shape for o in out] == [(3, 7)] * (len(after) + 1)
    assert torch.allclose(out[-1], run(model, x), atol=1e-4)
    assert net.costs == sorted(net.costs) and net.costs[-1] >= profile(model, (3, 32, 32)).macs


class Branchy(nn.Module):
    """Several values are alive at the exit; a size is read; a module is called twice; an
    activation works in place"""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.relu, self.fc = (
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.Conv2d(4, 6, 3, 1, 1),
            nn.Conv2d(6, 6, 3, 1, 1),
            nn.ReLU(inplace=True),
            nn.Linear(13, 5),
        )

    def forward(self, x):
        s = self.relu(self.stem(x))
        a = self.relu(self.a(s))
        b = self.relu(self.b(self.b(a)))
        pooled = torch.cat([s.mean((2, 3)), b.mean((2, 3)), x.mean((2, 3))], 1)
        return self.fc(pooled.view(x.size(0), -1))


def test_values_that_skip_an_exit_are_handed_on():
    model, x = Branchy(), images(4, (3, 16, 16))
    net = EarlyExit(model, ["stem", "a"], input_shape=(3, 16, 16))
    assert net.shapes[1:] == [(4 * 64 + 3 * 256,), (6 * 64 + 4 * 64 + 3 * 256,)]  # packed
    assert torch.allclose(run(net, x)[-1], run(model, x), atol=1e-5)
    exit_loss(
        net.train()(x), torch.tensor([0, 1, 2, 3])
    ).backward()  # an activation in place would have spoilt what an exit reads
    assert all(p.grad is not None for p in net.parameters())
    assert torch.equal(net.eval().predict(x, [1, 0]).exit, torch.ones(4, dtype=torch.long))


def test_the_input_is_not_changed():
    model = small_resnet(5, width=8).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    EarlyExit(model, ["blocks.0"])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_exits_are_ordered_as_the_network_runs():
    forth, back = small(), small(after=("blocks.1", "blocks.0"))
    assert forth.costs == back.costs


def test_the_seed_fixes_the_exits(net):
    again, other = small(), small(seed=1)
    x = images(2, (3, 16, 16))
    assert torch.equal(run(net, x)[0], run(again, x)[0]) and not torch.equal(
        run(net, x)[0], run(other, x)[0]
    )


def test_msdnet_is_cut_and_computed_lazily():
    model = MSDNet(5, exits=3, layers=2, channels=4, growth=2)
    net, x = EarlyExit(model), images(3)
    for a, b in zip(run(net, x), run(model, x), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert net.costs[-1] < profile(model, (3, 32, 32)).macs  # what no exit reads is not computed
    with pytest.raises(ValueError, match="came with its own exits"):
        fit_exits(net, batches(), frozen=True)


class Asks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: small(after=("block.0",)), "Near it are blocks.0"),
        (lambda: small(after=("head",)), "no feature map"),
        (lambda: small(after=()), "after is empty"),
        (lambda: small(after=("blocks.0", "blocks.0")), "twice"),
        (lambda: small(after=("blocks.0", "blocks.0.relu")), "twice"),
        (lambda: small(n_classes=7), "network has 5"),
        (lambda: small(after=None), "only one exit"),
        (lambda: small(measure="guess"), "max or entropy"),
        (lambda: small(input_shape=(1, 16, 16)), "do not fit"),
        (lambda: EarlyExit(nn.Conv2d(3, 4, 3), [""]), "exits need logits"),
        (lambda: EarlyExit(MSDNet(5, exits=2, channels=4), ["stem"]), "several values already"),
    ],
)
def test_impossible_exits_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_refusals():
    with pytest.raises(TypeError, match=r"after='blocks.0': give a list"):
        small(after="blocks.0")
    with pytest.raises(TraceError, match="torch.fx can't trace"):
        EarlyExit(nn.Sequential(Asks(), nn.Flatten(), nn.Linear(3072, 5)), ["0"])


# Stopping


@forall(st.lists(st.floats(0, 1), min_size=2, max_size=2), st.sampled_from(["max", "entropy"]))
def test_dropping_equals_masking(net, thresholds, measure):
    net.settings["measure"] = measure
    x = images(12, (3, 16, 16), seed=3)
    dense = torch.stack(run(net, x))
    leave = torch.cat(
        [
            confidence(dense[:-1], measure)
            > torch.tensor(thresholds, dtype=torch.float64)[:, None],
            torch.ones(1, 12, dtype=torch.bool),
        ]
    )
    logits, exit = net.predict(x, thresholds)
    assert torch.equal(exit, leave.int().argmax(0))
    assert torch.allclose(
        logits, dense.gather(0, exit[None, :, None].expand(1, -1, 5))[0], atol=1e-5
    )
    net.settings["measure"] = "max"


def test_finished_samples_are_not_computed(net):
    x, seen = images(12, (3, 16, 16)), []
    hook = net.stages[1].register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    middle = confidence(run(net, x)[0]).median().item()
    exit = net.predict(x, [middle, 1]).exit
    hook.remove()
    assert seen == [12, int((exit > 0).sum())] and 0 < seen[1] < 12


def test_all_or_nobody_leaves(net):
    x = images(4, (3, 16, 16))
    assert (
        net.predict(x, [0, 0]).exit.tolist() == [0] * 4
        and net.predict(x, [1, 1]).exit.tolist() == [2] * 4
    )
    assert net.predict(x).exit.tolist() == [2] * 4  # without thresholds nobody leaves early
    assert evaluate(net, batches(), [0, 0]).shares == [1, 0, 0]


def test_predict_leaves_the_mode_alone(net):
    net.train()
    a = net.predict(images(4, (3, 16, 16)), [0.2, 0.2])
    assert net.training
    assert torch.equal(a.logits, net.eval().predict(images(4, (3, 16, 16)), [0.2, 0.2]).logits)


@pytest.mark.parametrize(
    "thresholds, message",
    [
        ([0.5], "1 thresholds for 3 exits: give 2"),
        ([0.5, 1.1], r"must be in \[0, 1\]"),
        ([-0.1, 0.5], "must be in"),
        ([math.nan, 0.5], "must be in"),
    ],
)
def test_thresholds_that_do_not_fit(net, thresholds, message):
    for use in (
        net.set_thresholds,
        lambda t: net.predict(images(2, (3, 16, 16)), t),
        table(10, 0, 3).outcome,
    ):
        with pytest.raises(ValueError, match=message):
            use(thresholds)


def test_bad_images(net):
    x = images(4, (3, 16, 16))
    with pytest.raises(ValueError, match="empty batch"):
        net.predict(x[:0])
    x[2, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="image 2 are not finite"):
        net.predict(x)
    with pytest.raises(ValueError, match="not finite"):
        exit_table(net, [(x, torch.zeros(4).long())])
    for f in (exit_logits, exit_table, evaluate):
        with pytest.raises(ValueError, match="no batch"):
            f(net, [])


@forall(st.integers(2, 12), st.floats(-30, 30))
def test_confidence_is_a_share(classes, top):
    z = torch.zeros(classes)
    z[0] = top
    for measure in ("max", "entropy"):
        assert 0 <= confidence(z, measure) <= 1
    assert torch.allclose(confidence(z), z.double().softmax(0).max())


# Training


def test_frozen_training_moves_nothing_but_the_exits(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trained = fit_exits(
        net, batches(), frozen=True, epochs=1, warmup=0, progress=False, device="cpu"
    ).model
    moved = {k for k, v in trained.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(".exit" in k for k in moved)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(
        p.requires_grad for p in trained.parameters()
    )


def test_joint_training_resumes_bit_for_bit(net, tmp_path):
    kw = dict(epochs=2, distil=0.5, progress=False, device="cpu")
    whole = fit_exits(net, batches(4), **kw).model

    class Killed(Exception):
        pass

    def dying():
        for i, b in enumerate(batches(4)):
            if dying.calls == 1 and i == 2:
                raise Killed
            yield b
        dying.calls += 1

    dying.calls = 0

    class Loader:
        def __len__(self):
            return 4

        def __iter__(self):
            return dying()

    with pytest.raises(Killed):
        fit_exits(net, Loader(), checkpoint=tmp_path / "c.safetensors", **kw)
    resumed = fit_exits(net, batches(4), checkpoint=tmp_path / "c.safetensors", **kw).model
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values())
    )


def test_loss_and_its_refusals(net):
    outs, y = [torch.randn(4, 5), torch.randn(4, 5)], torch.tensor([0, 1, 2, 3])
    parts = [nn.functional.cross_entropy(o, y) for o in outs]
    assert torch.allclose(exit_loss(outs, y), sum(parts)) and torch.allclose(
        exit_loss(outs, y, [0, 2]), 2 * parts[1]
    )
    assert torch.allclose(
        exit_loss([outs[1], outs[1]], y, distil=1), parts[1]
    )  # the same answers: nothing to learn
    with pytest.raises(ValueError, match="3 weights for 2 exits"):
        exit_loss(outs, y, [1, 1, 1])
    with pytest.raises(ValueError, match="labels reach from 0 to 9"):
        exit_loss(outs, torch.tensor([0, 9, 0, 0]))
    with pytest.raises(ValueError, match="distil=2"):
        fit_exits(net, batches(), distil=2)


def test_calibration_changes_no_answer(net):
    logits, y = exit_logits(net, batches())
    cold = calibrate(net, batches())
    assert torch.equal(net.temperatures, torch.ones(3)) and not torch.equal(
        cold.temperatures, net.temperatures
    )
    assert torch.equal(exit_logits(cold, batches())[0], logits)
    assert (
        fit_temperature(5 * logits[0], y)
        == pytest.approx(5 * fit_temperature(logits[0], y), rel=0.01)
        or fit_temperature(logits[0], y) > 4
    )  # at its bound


# Thresholds


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 50), st.integers(2, 4), st.floats(0, 1))
def test_budgets_are_met_and_joint_is_never_worse(seed, exits, share):
    t = table(100, seed, exits)
    budget = t.costs[0] + share * (t.costs[-1] - t.costs[0])
    published, joint = (
        t.outcome(budgeted_thresholds(t, budget)),
        t.outcome(joint_thresholds(t, budget)),
    )
    assert published.cost <= budget + 1e-9 and joint.cost <= budget + 1e-9
    assert joint.accuracy >= published.accuracy
    assert sum(joint.shares) == pytest.approx(1)


def test_probabilities_of_the_exits_beat_counting_few_labels():
    def drawn(
        n, seed
    ):  # four exits, each nearly as good as the next, and honest about how sure they are
        g = torch.Generator().manual_seed(seed)
        sure = (
            torch.rand(n, generator=g, dtype=torch.float64) * 0.7
            + torch.tensor([[0.1], [0.13], [0.16], [0.19]])
            + 0.2 * torch.rand(4, n, generator=g, dtype=torch.float64)
        ).clamp(max=0.999)
        return Exits(
            sure,
            torch.rand(4, n, generator=g, dtype=torch.float64) < sure,
            [1.0, 2.0, 3.0, 4.0],
            sure,
        )

    lost = []
    for seed in range(8):
        few, many = drawn(150, seed), drawn(50_000, 100 + seed)
        lost.append(
            [
                many.outcome(joint_thresholds(few, 2.0, labels=labels)).accuracy
                for labels in (True, False)
            ]
        )
    by_labels, by_probability = torch.tensor(lost).mean(0).tolist()
    assert by_probability > by_labels + 0.005


def test_without_probabilities_labels_count():
    t = table(100, 3)
    assert t.expected is None and torch.equal(
        joint_thresholds(t, 2.0), joint_thresholds(t, 2.0, labels=True)
    )
    some = t._replace(expected=t.confidence).some(slice(10))
    assert some.expected.shape == some.right.shape == (4, 10)
    both = some.joined(t._replace(expected=t.confidence))
    assert both.expected.shape == both.right.shape == (4, 110) and torch.equal(
        both.some(slice(10)).right, some.right
    )


def test_published_shares_are_geometric():
    t = table(5000, 0)
    shares = t.outcome(budgeted_thresholds(t, 2.0)).shares
    ratios = [b / a for a, b in zip(shares, shares[1:])]
    assert max(ratios) - min(ratios) < 0.01


def test_joint_thresholds_skip_a_useless_exit():
    t = table(2000, 0)
    t.right[1] = t.right[0]
    t.confidence[1] = t.confidence[0]  # the second exit knows what the first knows, and costs more
    outcome = t.outcome(joint_thresholds(t, 2.0))
    assert (
        outcome.shares[1] < 0.05
        and outcome.accuracy > t.outcome(budgeted_thresholds(t, 2.0)).accuracy + 0.02
    )


def test_budgets_that_cannot_be_met():
    t = table(100, 0)
    for choose in (budgeted_thresholds, joint_thresholds):
        with pytest.raises(ValueError, match="the first exit alone costs 1, the last 4"):
            choose(t, 0.9)
        with pytest.raises(ValueError, match="can't be met"):
            choose(t, math.nan)
        with pytest.raises(ValueError, match="no sample"):
            choose(t.some(slice(0)), 2)
        assert t.outcome(choose(t, 1.0)).shares[0] == 1
    assert budgeted_thresholds(t, 99).tolist() == [1, 1, 1]


def test_ties_and_extremes():
    same = Exits(torch.ones(2, 10).double(), torch.ones(2, 10, dtype=torch.bool), [1.0, 2.0])
    assert (
        same.outcome([1]).shares == [0, 1] and same.outcome(joint_thresholds(same, 1.0)).cost == 1
    )
    one = table(1, 0)
    assert one.outcome(joint_thresholds(one, 4.0)).cost <= 4


def test_costs_may_be_milliseconds(net):
    t = exit_table(net, batches(), costs=[0.1, 0.2, 0.4])
    assert (
        t.outcome([1, 1]).cost == pytest.approx(0.4)
        and t.outcome(joint_thresholds(t, 0.2)).cost <= 0.2
    )


# The promise


def test_p_value_is_exact():
    for n, alpha in ((50, 0.1), (20, 0.5)):
        chance = [math.comb(n, k) * alpha**k * (1 - alpha) ** (n - k) for k in range(n + 1)]
        for k in (0, 3, n):
            assert p_value(k, n, alpha) == pytest.approx(sum(chance[: k + 1]))


def test_promises_are_kept():
    "Over many validation sets, more than alpha is lost no more often than delta"
    world = table(40_000, 1)
    full = world.right[-1].double().mean()
    lost = [
        full
        - world.outcome(
            guaranteed_thresholds(table(1000, 100 + s), 0.02, 0.1, seed=s).thresholds
        ).accuracy
        for s in range(60)
    ]
    assert np.mean([x > 0.02 for x in lost]) <= 0.1
    assert np.mean([x > 0 for x in lost]) > 0.5  # and it isn't kept by never leaving


def test_a_promise_needs_data():
    few = guaranteed_thresholds(table(20, 0), 0.01, 0.1)
    assert (
        few.thresholds.tolist() == [1, 1, 1] and few.cost == 4 and few.lost == 0
    )  # too few to promise anything
    for kw in (dict(alpha=0), dict(alpha=1), dict(delta=0), dict(delta=2)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            guaranteed_thresholds(table(20, 0), **kw)
    with pytest.raises(ValueError, match="at least 2"):
        guaranteed_thresholds(table(1, 0))


# Files


def test_save_and_load(net, tmp_path):
    path, x = tmp_path / "net.safetensors", images(4, (3, 16, 16))
    mine = calibrate(net, batches()).set_thresholds([0.3, 0.4])
    save_exits(mine, path)
    again = load_exits(small_resnet(5, width=8, seed=7), path)
    assert all(torch.equal(a, b) for a, b in zip(mine.predict(x), again.predict(x)))
    with pytest.raises(ValueError, match="another network"):
        load_exits(small_resnet(5, width=12), path)
    save(tmp_path / "other.safetensors", {}, {})
    with pytest.raises(ValueError, match="not written by save_exits"):
        load_exits(small_resnet(5, width=8), tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(StoreError):
        load_exits(small_resnet(5, width=8), path)


@pytest.mark.parametrize(
    "make",
    [
        small,
        lambda: EarlyExit(
            MSDNet(5, exits=3, layers=1, channels=4, growth=2), input_shape=(3, 16, 16)
        ),
        lambda: EarlyExit(Branchy(), ["stem", "a"], input_shape=(3, 16, 16)),
        lambda: small(measure="entropy"),
    ],
)
def test_a_cascade_is_the_network(make, tmp_path):
    net, x = make(), images(20, (3, 16, 16))
    middle = [
        confidence(o, net.settings["measure"]).sort().values[9:11].mean().item()
        for o in run(net, x)[:-1]
    ]  # between two images
    cascade = Cascade(
        export_cascade(net.set_thresholds(middle), tmp_path, meta=dict(classes=list("abcde")))
    )
    for a, b in zip(cascade(x), run(net, x), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert cascade.costs == net.costs and cascade.meta == dict(classes=list("abcde"))
    logits, exit = cascade.predict(x)
    want = net.predict(x)
    assert (
        np.array_equal(exit, want.exit.numpy())
        and len(set(exit)) == len(net.stages)
        and np.allclose(logits, want.logits, atol=1e-4)
    )
    one_by_one = np.concatenate([cascade.predict(x[i : i + 1].numpy()).exit for i in range(20)])
    assert np.array_equal(one_by_one, exit)
    y = [(x, want.logits.argmax(1))]
    assert evaluate(cascade, y) == evaluate(net, y) and accuracy(cascade, y) == accuracy(net, y)


def test_a_later_session_runs_only_if_needed(net, tmp_path):
    cascade, ran = Cascade(export_cascade(net, tmp_path)), []
    cascade.stages = [
        lambda x, f=f, k=k: (ran.append((k, len(x))), f(x))[1] for k, f in enumerate(cascade.stages)
    ]
    cascade.predict(images(3, (3, 16, 16)), [0, 0])
    assert ran == [(0, 3)]


def test_cascades_refuse_what_does_not_fit(net, tmp_path):
    cascade, x = Cascade(export_cascade(net, tmp_path / "a")), images(2, (3, 16, 16))
    with pytest.raises(ValueError, match="empty batch"):
        cascade.predict(x[:0])
    with pytest.raises(ValueError, match="not finite"):
        cascade.predict(x * math.nan)
    with pytest.raises(ValueError, match="1 thresholds for 3 exits"):
        cascade.predict(x, [0.5])
    with pytest.raises(FileNotFoundError, match="no cascade in"):
        Cascade(tmp_path)
    export_cascade(small(seed=1), tmp_path / "b")
    (tmp_path / "b" / "stage0.onnx").replace(tmp_path / "a" / "stage0.onnx")
    with pytest.raises(
        ModelFileError, match="stage0.onnx is missing, damaged or of another export"
    ):
        Cascade(tmp_path / "a")
    with pytest.raises(ModelFileError, match="missing, damaged"):
        Cascade(tmp_path / "b")
    (tmp_path / "b" / "cascade.json").write_text("{")
    with pytest.raises(ModelFileError, match="is damaged"):
        Cascade(tmp_path / "b")
    (tmp_path / "b" / "cascade.json").write_text(json.dumps({}))
    with pytest.raises(ModelFileError, match="not what export_cascade writes"):
        Cascade(tmp_path / "b")


def threshold(facts):
    facts["thresholds"][0] = 0.99


def swapped(facts):
    facts["stages"].reverse()


def classes(facts):
    facts["meta"]["classes"] = ["b", "a"]


def unsigned(facts):
    del facts["sha256"]


@pytest.mark.parametrize("change", [threshold, swapped, classes, unsigned])
def test_a_cascade_whose_facts_were_changed_is_refused(net, change, tmp_path):
    export_cascade(net, tmp_path, meta={"classes": ["a", "b"], "sizes": (1, 2), "names": {3: "c"}})
    path = tmp_path / "cascade.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts))  # spaces and line ends say nothing
    assert len(Cascade(tmp_path).stages) == len(net.stages)
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(ModelFileError, match="cascade.json was changed"):
        Cascade(tmp_path)


def test_stage_files_that_changed_places_are_named(net, tmp_path):
    export_cascade(net, tmp_path)
    first, second = (tmp_path / f"stage{k}.onnx" for k in (0, 1))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(ModelFileError, match="stage0.onnx is missing, damaged or of another"):
        Cascade(tmp_path)


def test_stages_go_through_quantization(net, tmp_path):
    from mep.quant import export_int8, quantize

    entering = stage_inputs(net, images(32, (3, 16, 16)))
    assert [tuple(e.shape[1:]) for e in entering] == net.shapes
    reports = []

    def write(k, stage, path):
        reports.append(
            export_int8(quantize(stage, entering[k], per_channel=True, progress=False), path)
        )

    cascade, x = Cascade(export_cascade(net, tmp_path, write)), images(8, (3, 16, 16), seed=5)
    assert all(r.float_layers == 0 for r in reports)
    for a, b in zip(cascade(x), run(net, x)):
        assert (a - b).norm() < 0.2 * b.norm()


def test_latencies_have_one_number_per_image(net, tmp_path):
    cascade, static = (
        Cascade(export_cascade(net, tmp_path / "c")),
        export_onnx(small_resnet(5, width=8), tmp_path / "s.onnx", (3, 16, 16)),
    )
    times = image_latencies(
        {"static": static, "cascade": cascade}, images(5, (3, 16, 16)), repeats=1
    )
    assert all(len(t.samples_ms) == 5 and min(t.samples_ms) > 0 for t in times.values())
    with pytest.raises(ValueError, match="no image"):
        image_latencies({"static": static}, images(0, (3, 16, 16)))
