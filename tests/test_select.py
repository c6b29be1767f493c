"""Whole-network selection: the exact knapsack, plans, refit, saving, resuming, bad input, and
what composes with quantization."""

import copy
import importlib
import itertools
import json
import math
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from mep.compress.select import (
    CHOOSE,
    METHODS,
    RECIPE,
    Option,
    Plan,
    _taken,
    apply_plan,
    compress,
    cuts,
    folded,
    front_of,
    greedy,
    least_loss,
    load_compressed,
    save_compressed,
    sensitivity,
    target_of,
    tune,
)
from mep.cost import profile
from mep.data import load
from mep.graph import TraceError
from mep.moments import observe
from mep.pipeline import run
from mep.pipeline.convert import shrink
from mep.store import DamagedError, LockedError, Store
from mep.train import logits, small_mobilenet, small_resnet, sqnr_db

SHAPE = (3, 24, 24)
FAST = dict(samples=2**12, steps=2, fit_steps=12, shares=(0.3, 0.5, 0.7), progress=False)


def settled(net, seed=0):
    "A network whose batch norms have seen images"
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.2)
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(images(64))
    return net.eval()


def images(n=96, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / 4


@pytest.fixture(scope="module")
def net():
    return settled(small_resnet(5, width=8))


@pytest.fixture(scope="module")
def mobile():
    return settled(small_mobilenet(5, width=0.5))


@pytest.fixture(scope="module")
def half(net):
    return compress(net, images(), macs=0.5, **FAST)


# --- the knapsack
options = st.lists(st.builds(Option, st.integers(1, 30), st.floats(0, 3)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@example(items=[[Option(1, 2.2e-309), Option(2, 0.0)]], share=0.0)  # less than floats can divide by
@given(items=st.lists(options, min_size=1, max_size=5), share=st.floats(0, 1))
def test_knapsack_is_exact(items, share):
    least, most = (
        sum(min(o.cost for o in os) for os in items),
        sum(max(o.cost for o in os) for os in items),
    )
    budget = least + share * (most - least)
    best = min(
        sum(o.loss for o in c)
        for c in itertools.product(*items)
        if sum(o.cost for o in c) <= budget
    )
    got = least_loss(items, budget)
    assert sum(o.cost for o in got) <= budget and sum(o.loss for o in got) == pytest.approx(
        best, abs=1e-9
    )


def test_knapsack_says_what_the_least_costs():
    with pytest.raises(ValueError, match="cost 7 together, more than the budget of 5"):
        least_loss([[Option(3, 0.0)], [Option(4, 0.0)]], 5)


@given(options)
def test_front_has_no_beaten_option(os):
    kept = front_of(os)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in zip(kept, kept[1:]))
    assert all(any(k.cost <= o.cost and k.loss <= o.loss for k in kept) for o in os)


def test_greedy_takes_the_smallest_share_above_one_threshold():
    scores = {"a": {0.5: 0.9, 0.25: 0.2}, "b": {0.5: 0.8, 0.25: 0.7}}
    costs = {n: {1.0: 100, 0.5: 50, 0.25: 25} for n in "ab"}
    assert greedy(scores, costs, 75) == {"a": 0.5, "b": 0.25}


# --- the pieces
def test_folded_network_is_the_same_function(net, mobile):
    for n in (net, mobile):
        graph, layers = folded(n, images(2))
        assert sqnr_db(logits(n, images(8))[0], logits(graph, images(8))[0]) > 80
        assert layers and not any(
            isinstance(m, nn.BatchNorm2d)
            for m in (
                graph.get_submodule(x.target) for x in graph.graph.nodes if x.op == "call_module"
            )
        )
        assert sum(l.macs for l in layers.values()) == profile(n, SHAPE).macs


def test_sensitivity_predicts_what_noise_does(net):
    graph, layers = folded(net, images(2))
    name, x = list(layers)[2], images(64)
    g = sensitivity(graph, [x], [name], probes=8, progress=False)[name]
    before, random = logits(graph, x)[0], torch.Generator().manual_seed(0)
    hook = graph.get_submodule(name).register_forward_hook(
        lambda m, a, y: y + 1e-3 * torch.randn(y.shape, generator=random)
    )
    change = logits(graph, x)[0] - before
    hook.remove()
    felt = (change - change.mean(1, keepdim=True)).square().sum(1).mean().item()
    assert felt == pytest.approx(1e-6 * g.trace().item(), rel=0.3)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_cuts_never_get_worse_with_rank_and_are_exact_at_the_end(net, method):
    graph, layers = folded(net, images(2))
    name = next(
        n
        for n, l in layers.items()
        if not METHODS[method].why_not(l.op) and l.op.weight.ndim == 4 and l.op.weight.shape[-1] > 1
    )
    f, op = observe(graph, images(), [name], progress=False)[name], layers[name].op
    top = METHODS[method].max_rank(op)
    t = target_of(op, f, torch.eye(len(op.weight)))
    ranks = [tuple(max(1, r // 3) for r in top), top]
    (_, _, low), (_, factors, full) = cuts(
        t, f, method, [r if len(r) > 1 else r[0] for r in ranks], 5
    )
    assert 0 <= full <= low <= 1 and (full < 1e-3 or method == "cp")
    assert [tuple(x.shape) for x in factors] and all(x.isfinite().all() for x in factors)


# --- whole networks
def test_the_target_is_met_and_the_input_is_left_alone(net, half):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    new, report = compress(net, images(), macs=0.6, **FAST)
    assert 0.5 < report.share <= 0.6 and report.macs == profile(new, SHAPE).macs
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert type(new) is type(net) and not new.training
    assert sqnr_db(logits(net, images(32, 1))[0], logits(new, images(32, 1))[0]) > 8
    assert half.report.share <= 0.5


def test_the_check_takes_what_moves_the_outputs_least(net):
    x, methods = images(), ("spatial_svd", "weight_svd_out", "cp3")
    facts = compress(net, x, macs=0.5, methods=methods, **FAST | dict(fit_steps=8)).report.facts
    assert {"mixed"} < set(facts["tries"]) <= {"mixed", "corrected", *methods} and facts[
        "taken"
    ] in (min(facts["tries"], key=facts["tries"].get), *methods)
    assert (
        "tries"
        not in compress(
            net, x, macs=0.5, methods=methods, **FAST | dict(fit_steps=8, tries=0)
        ).report.facts
    )
    assert (
        "tries" not in compress(net, x, macs=0.6, methods=methods[:1], **FAST).report.facts
    )  # nothing to compare with


def test_of_equals_the_one_of_a_single_method_is_taken():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(200, generator=random, dtype=torch.float64)
    noise = 0.01 * torch.randn(200, generator=random, dtype=torch.float64)
    found = dict(
        mixed=images + 0.3,
        cp3=images + noise - noise.mean() + 1e-4,
        spatial_svd=images + 0.5,
        corrected=images,
    )
    assert (
        _taken(found, ["cp3", "spatial_svd"]) == "cp3"
        and _taken(found, ["spatial_svd"]) == "corrected"
    )
    found["cp3"] = images + 0.01  # hardly worse, but for every image
    assert _taken(found, ["cp3", "spatial_svd"]) == "corrected"


def test_what_is_tried_alone_uses_one_method(net, monkeypatch):
    import mep.compress.select as module

    built, real = [], module.realize
    monkeypatch.setattr(
        module,
        "realize",
        lambda model, plan, *a, **kw: built.append(plan) or real(model, plan, *a, **kw),
    )
    report = compress(
        net, images(), macs=0.6, methods=("spatial_svd", "cp3"), **FAST | dict(fit_steps=4)
    ).report
    used = [{m for m, _ in plan.layers.values()} for plan in built]
    assert {"spatial_svd"} in used and {"cp3"} in used and built[-1] == report.plan
    assert all(
        profile(apply_plan(net, plan), SHAPE).macs <= 0.6 * profile(net, SHAPE).macs
        for plan in built
    )


def test_more_steps_fit_better(net):
    x, want = images(64), logits(net, images(64))[0]
    a, b = (
        compress(net, images(), macs=0.4, methods=("cp3",), **FAST | dict(fit_steps=n)).model
        for n in (0, 60)
    )
    assert sqnr_db(want, logits(b, x)[0]) > sqnr_db(want, logits(a, x)[0])


def test_second_moments_that_are_not_quite_positive(net):
    graph, layers = folded(net, images(2))
    name = list(layers)[1]
    f = observe(graph, images(), [name], progress=False)[name]
    values, vectors = torch.linalg.eigh(f.h[0].double())
    bad = (
        vectors * values.clone().index_fill_(0, torch.tensor([0]), -0.01 * values.mean().item())
    ) @ vectors.T  # as cancellation leaves it
    t = target_of(
        layers[name].op, f._replace(h=bad[None].float()), torch.eye(len(layers[name].op.weight))
    )
    assert math.isfinite(t.power) and cuts(t, f, "spatial_svd", [4], 3)[0][2] < 1


def test_report_prints_every_layer(net, half):
    text = repr(half.report)
    assert (
        all(n in text for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        and "total" in text
    )
    assert (
        sum(r.macs for r in half.report) == half.report.macs
        and sum(r.macs_before for r in half.report) == half.report.macs_before
    )


@pytest.mark.parametrize("select", sorted(CHOOSE))
def test_every_selection_reaches_the_target(net, select):
    methods = ("spatial_svd", "weight_svd_out")

    def evaluate(n):
        return sqnr_db(logits(net, images(32))[0], logits(n, images(32))[0])

    report = compress(
        net, images(), macs=0.7, methods=methods, select=select, evaluate=evaluate, **FAST
    ).report
    assert 0.4 < report.share < 0.72


def test_refit_beats_weights_alone(net):
    x = images(64, 3)
    plain, fitted = (
        compress(net, images(), macs=0.5, methods=("spatial_svd",), refit=r, **FAST).model
        for r in (False, True)
    )
    want = logits(net, x)[0]
    assert sqnr_db(want, logits(fitted, x)[0]) > sqnr_db(want, logits(plain, x)[0]) + 3


@pytest.mark.filterwarnings("ignore:head.5")
def test_channels_make_a_mobilenet_smaller(mobile):
    new, report = compress(mobile, images(), macs=0.6, methods=("channel",), **FAST)
    assert report.share <= 0.6 and report.plan.channels and not report.plan.layers
    assert sum(p.numel() for p in new.parameters()) < sum(p.numel() for p in mobile.parameters())
    assert logits(new, images(4))[0].isfinite().all()


def test_multiple_holds_for_ranks_and_channels(net):
    plan = compress(
        net, images(), macs=0.6, methods=("weight_svd_out", "channel"), multiple=4, **FAST
    ).report.plan
    assert all(r % 4 == 0 or r < 4 for _, r in plan.layers.values()) and all(
        len(c) % 4 == 0 for c in plan.channels.values()
    )


# --- plans and files
def test_plan_survives_json_and_rebuilds_the_network(net, half, tmp_path):
    plan = Plan.from_dict(json.loads(json.dumps(half.report.plan.to_dict())))
    assert plan == half.report.plan
    twin = apply_plan(net, plan)
    twin.load_state_dict(half.model.state_dict())
    assert torch.equal(logits(twin, images(8))[0], logits(half.model, images(8))[0])


def test_save_and_load(net, mobile, half, tmp_path):
    path = tmp_path / "small.safetensors"
    save_compressed(path, half.model, half.report.plan)
    assert torch.equal(
        logits(load_compressed(path, net), images(8))[0], logits(half.model, images(8))[0]
    )
    with pytest.raises(ValueError, match="does not have"):
        load_compressed(path, nn.Sequential(nn.Conv2d(3, 4, 3)))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DamagedError):
        load_compressed(path, net)


def test_resume_gives_the_same_network_and_scores_nothing_twice(net, tmp_path, monkeypatch):
    import mep.compress.select as module

    whole = compress(net, images(), macs=0.6, methods=("spatial_svd",), checkpoint=tmp_path, **FAST)

    def never(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr(module, "layer_options", never)
    again = compress(net, images(), macs=0.6, methods=("spatial_svd",), checkpoint=tmp_path, **FAST)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values())
    )


def test_killed_run_goes_on(net, tmp_path, monkeypatch):
    import mep.compress.select as module

    real, left = module._solve, [3]

    def dies(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_solve", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(net, images(), macs=0.6, methods=("spatial_svd",), checkpoint=tmp_path, **FAST)
    monkeypatch.setattr(module, "_solve", real)
    a, b = (
        compress(net, images(), macs=0.6, methods=("spatial_svd",), checkpoint=c, **FAST).model
        for c in (tmp_path, None)
    )
    assert sqnr_db(logits(b, images(8))[0], logits(a, images(8))[0]) > 100


@pytest.mark.slow  # processes that load torch anew; the predictor's tests have some that are quicker
def test_the_same_network_for_any_number_of_processes(mobile):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer that stays whole
        one, two = (compress(mobile, images(), macs=0.6, n_jobs=n, tries=1, **FAST) for n in (1, 2))
    assert one.report.plan == two.report.plan and one.report.facts["tries"] == pytest.approx(
        two.report.facts["tries"], rel=0.1
    )
    assert torch.allclose(
        logits(one.model, images(8))[0], logits(two.model, images(8))[0], atol=1e-3
    )


def test_two_runs_do_not_share_a_checkpoint(net, tmp_path):
    with Store(tmp_path).lock(), pytest.raises(LockedError):
        compress(net, images(), checkpoint=tmp_path, **FAST)


# --- bad input
@pytest.mark.parametrize(
    "kw, text",
    [
        (dict(macs=0), "above 0 and below 1"),
        (dict(macs=1), "above 0 and below 1"),
        (dict(macs=1.5), "above 0 and below 1"),
        (dict(macs=True), "above 0 and below 1"),
        (dict(macs=0.5, latency=0.5), "give one of them"),
        (dict(methods=("spatial_sdv",)), "did you mean 'spatial_svd'"),
        (dict(select="best"), "choose one of"),
        (dict(skip=("nowhere",)), "does not have"),
        (dict(macs=0.001), "can't be reached"),
        (dict(latency=0.5, select="greedy"), "MACs only"),
    ],
)
def test_bad_settings_are_refused(net, kw, text):
    with pytest.raises(ValueError, match=text):
        compress(net, images(64), **FAST | kw)


def test_the_closest_is_taken_if_allowed(net):
    with pytest.warns(UserWarning, match="that is what you get"):
        report = compress(net, images(), macs=0.001, allow_closest=True, **FAST).report
    assert 0.001 < report.share < 0.5


def test_nan_is_named(net):
    bad = small_resnet(5, width=8)
    bad.stem[0].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="stem.0.weight holds NaN"):
        compress(bad, images(), **FAST)


def test_zero_weights_are_no_trouble(net):
    bad = settled(small_resnet(5, width=8))
    bad.blocks[1].body[0].weight.data.zero_()
    new = compress(bad, images(), macs=0.6, **FAST).model
    assert logits(new, images(4))[0].isfinite().all()


def test_too_few_images(net):
    with pytest.raises(ValueError, match="Give more images"):
        compress(nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 5)), images(8), **FAST)
    with pytest.warns(UserWarning, match="stays as it is"):
        compress(net, images(16), macs=0.7, methods=("spatial_svd",), **FAST)


def test_shared_layers_stay_whole():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.same, self.head = (
                nn.Conv2d(3, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Linear(8, 5),
            )

        def forward(self, x):
            return self.head(self.same(self.same(self.first(x).relu()).relu()).mean((2, 3)))

    torch.manual_seed(0)
    report = compress(Twice().eval(), images(), macs=0.97, methods=("spatial_svd",), **FAST).report
    assert "same" not in report.plan.layers


def test_untraceable_network_is_named():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(TraceError, match="test_select.py"):
        compress(Branch(), images(), **FAST)


# --- latency, and what comes after
@pytest.mark.filterwarnings("ignore:latency")
def test_latency_target_is_measured(net):
    report = compress(
        net, images(), latency=0.9, methods=("weight_svd_out",), allow_closest=True, **FAST
    ).report
    assert report.facts["latency"] > 0


@pytest.mark.filterwarnings("ignore")
def test_what_was_compressed_can_be_quantized_and_exported(half, mobile, tmp_path):
    from mep.quant.adaround import adaround
    from mep.quant.dfq import dfq
    from mep.quant.export import export_int8

    x = images(64)
    for name, net in dict(
        cut=half.model, thin=compress(mobile, images(), macs=0.6, **FAST).model
    ).items():
        want = logits(net, x)[0]
        for q in (
            adaround(net, x, w_bits=8, effort=0, samples=2**12, progress=False),
            dfq(net, x, progress=False),
        ):
            assert sqnr_db(want, logits(q, x)[0]) > 10
            check = export_int8(q, tmp_path / f"{name}.onnx", x[:8])
            assert check.sqnr_db > 35 and check.float_layers == 0


# ---- fine-tuning


class Asked(Exception):
    "What `fit` was called with"


@pytest.fixture
def asked(monkeypatch):
    def fit(model, data, **kw):
        raise Asked(kw)

    monkeypatch.setattr(importlib.import_module("mep.compress.select"), "fit", fit)


def recipe_of(call):
    with pytest.raises(Asked) as found:
        call()
    kw = found.value.args[0]
    return {k: kw[k] for k in RECIPE}


def test_one_recipe_for_all(asked, tmp_path):
    "In Python, in `mep compress` and in `mep run`"
    data = load("digits", n_train=600, n_valid=0, n_test=50)
    net = small_resnet(10, 1, width=4).eval()
    few = dict(macs=0.8, n_images=256, seed=0, progress=False, methods=("weight_svd_out",))
    longer = RECIPE | dict(epochs=2)
    assert recipe_of(lambda: compress(net, data, epochs=2, **few)) == longer
    assert recipe_of(lambda: shrink(net, tmp_path / "c.onnx", data, finetune=2, **few)) == longer
    config = dict(data="digits", n_train=600, n_test=50, epochs=1, compress=0.8, n_latency=2)
    config |= dict(out=str(tmp_path / "run"), until="compress", compress_by="weight_svd_out")
    assert recipe_of(lambda: run(config, progress=False)) == RECIPE
    assert recipe_of(lambda: run(config | dict(finetune=2), progress=False)) == longer


def test_what_was_tuned_can_be_trained_on():
    data = load("digits", n_train=64, n_valid=0, n_test=50)
    net = small_resnet(10, 1, width=4)
    net.head[2].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    new = tune(net, data, net, 1, progress=False)
    assert not new.training
    assert [p.requires_grad for p in new.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
