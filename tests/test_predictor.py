"""The accuracy predictor: Kendall's tau and its intervals, fitting, terms, files, whole
networks as features, bad input."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import kendalltau

import mep.nas.predictor as predictor
from mep.data import from_arrays
from mep.nas.bkd import BlockLibrary
from mep.nas.predictor import FLOOR, AccuracyPredictor, Assembled, kendall, kendall_gain
from mep.nas.space import SearchSpace, choices, default_space
from mep.train import logits, recalibrate_bn, soft_targets

OPTIONS = [
    *choices("basic", width=(1.0, 0.5, 0.25)),
    *choices("separable"),
    *choices("skip", out_act="relu"),
]
SPACE = default_space(4, (3, 16, 16), width=8, options=OPTIONS)
ARCHS = SPACE.sample(60, seed=0)


class Blocks(NamedTuple):
    "A library that has ratios only"

    space: SearchSpace
    table: list

    def nsr_table(self):
        return self.table


LIBRARY = Blocks(SPACE, list(np.random.default_rng(0).uniform(0.01, 1, (5, 5))))


def truth(kind=np.log, noise=0.0):
    "Accuracies that are a function of the sum over blocks"
    x = np.array([[t[k] for t, k in zip(LIBRARY.table, v)] for v in SPACE.encode(ARCHS)])
    return expit(
        0.5
        - kind(x + FLOOR) @ np.array([0.1, 0.3, 0.2, 0.1, 0.4])
        + noise * np.random.default_rng(1).normal(size=len(x))
    )


# Tau


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=30).filter(
        lambda v: len({b for _, b in v}) > 1 and len({a for a, _ in v}) > 1
    )
)
def test_tau_is_scipys_and_lies_in_its_interval_of_possible_values(pairs):
    p, a = map(list, zip(*pairs))
    s = kendall(p, a, draws=50)
    assert (
        np.isclose(s.tau, kendalltau(p, a).statistic)
        and -1 <= s.low <= s.high <= 1
        and s.n == len(a)
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_only_the_order_counts(seed):
    rng = np.random.default_rng(seed)
    p, a = rng.normal(size=(2, 15))
    assert kendall(p, a, draws=20) == kendall(np.exp(3 * p), a, draws=20)
    assert np.isclose(kendall(-p, a, draws=2).tau, -kendall(p, a, draws=2).tau)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0

    def sample(n):
        a = rng.normal(size=n)
        return a + rng.normal(size=n), a

    true = kendalltau(*sample(20_000)).statistic
    for _ in range(60):
        s = kendall(*sample(40), draws=200)
        hits += s.low <= true <= s.high
    assert 50 <= hits <= 60


def test_a_gain_is_paired():
    rng = np.random.default_rng(0)
    a = rng.normal(size=60)
    good, bad = a + 0.3 * rng.normal(size=60), a + 2 * rng.normal(size=60)
    gain = kendall_gain(good, bad, a)
    assert gain.low > 0 and np.isclose(gain.tau, kendall(good, a).tau - kendall(bad, a).tau)
    same = kendall_gain(good, good, a)
    assert same.low == same.tau == same.high == 0


@pytest.mark.parametrize(
    "p, a, words",
    [
        ([1, 2], [1, 2], "at least 3"),
        ([1, 2, 3], [1, 2], "one number for each"),
        ([1, 2, 3], [1, 1, 1], "no order to find"),
        ([1, float("nan"), 3], [1, 2, 3], "finite"),
    ],
)
def test_what_has_no_ranking_is_refused(p, a, words):
    with pytest.raises(ValueError, match=words):
        kendall(p, a)


# Fitting


@pytest.mark.parametrize("kind, f", [("log", np.log), ("raw", lambda x: x - FLOOR)])
def test_a_sum_over_blocks_is_found(kind, f):
    y = truth(f)
    fitted = AccuracyPredictor(kind).fit(LIBRARY, ARCHS[:30], y[:30])
    assert fitted.score(ARCHS[30:], y[30:]).tau > 0.98
    assert np.abs(fitted.predict(ARCHS[30:]) - y[30:]).max() < 0.02


def test_terms_add_up_to_the_prediction():
    fitted = AccuracyPredictor().fit(LIBRARY, ARCHS, truth(noise=0.2))
    sums = [
        fitted.intercept + sum(t[k] for t, k in zip(fitted.terms, v)) for v in SPACE.encode(ARCHS)
    ]
    assert np.allclose(fitted.link(np.array(sums)), fitted.predict(ARCHS))
    assert AccuracyPredictor("second").fit(LIBRARY, ARCHS, truth()).terms is None


def test_a_ridge_survives_many_features_and_much_noise():
    y = truth(noise=0.5)
    taus = {
        k: AccuracyPredictor(k).fit(LIBRARY, ARCHS[:25], y[:25]).score(ARCHS[25:], y[25:]).tau
        for k in ("log", "second")
    }
    assert all(t > 0.2 for t in taus.values())


def test_an_original_without_error_does_no_harm():
    table = [t.copy() for t in LIBRARY.table]
    table[0][0] = 0
    assert np.isfinite(
        AccuracyPredictor().fit(Blocks(SPACE, table), ARCHS, truth()).predict(ARCHS)
    ).all()


@pytest.mark.parametrize(
    "archs, y, words",
    [
        (
            ARCHS[:6],
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
            "6 networks for 5 features of kind 'log': train at least 7",
        ),
        (ARCHS[:9], [0.5] * 9, "all 9 accuracies are 0.5"),
        (ARCHS[:9], [50, 60, 70, 80, 90, 91, 92, 93, 94], "divide percentages by 100"),
        (ARCHS[:9], [0.5, 0.6], "one number for each"),
        (ARCHS[:9], [float("nan")] * 9, "finite"),
    ],
)
def test_bad_targets_are_refused(archs, y, words):
    with pytest.raises(ValueError, match=words):
        AccuracyPredictor().fit(LIBRARY, archs, y)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="kind='lgo' must be one of log, raw"):
        AccuracyPredictor("lgo")
    with pytest.raises(ValueError, match="nothing to predict from"):
        AccuracyPredictor("none")
    with pytest.raises(RuntimeError, match="not fitted"):
        AccuracyPredictor().predict(ARCHS)
    other = default_space(5, (3, 16, 16), width=8, options=OPTIONS)
    fitted = AccuracyPredictor().fit(LIBRARY, ARCHS, truth())
    with pytest.raises(ValueError, match=f"frame {other.frame}.*{SPACE.frame}"):
        fitted.predict([other.reference])


# Files


def test_a_fit_comes_back_from_its_file_and_knows_its_library(tmp_path):
    fitted = AccuracyPredictor("raw").fit(LIBRARY, ARCHS, truth())
    path = fitted.save(tmp_path / "fit.json")
    assert np.array_equal(
        AccuracyPredictor.load(path, LIBRARY).predict(ARCHS), fitted.predict(ARCHS)
    )
    with pytest.raises(ValueError, match="fitted for blocks with hash"):
        AccuracyPredictor.load(path, Blocks(SPACE, [t + 0.1 for t in LIBRARY.table]))
    less = SPACE.where(lambda o: o.cell != "skip")
    with pytest.raises(ValueError, match="fitted for space with hash"):
        AccuracyPredictor.load(path, Blocks(less, [t[:4] for t in LIBRARY.table]))
    with pytest.raises(ValueError, match="extra features can't be saved"):
        AccuracyPredictor("log", lambda a: np.zeros((len(a), 1))).fit(LIBRARY, ARCHS, truth()).save(
            path
        )


# Whole networks


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    rng = np.random.default_rng(0)
    x, y = (
        torch.from_numpy(rng.integers(0, 256, (400, 3, 16, 16)).astype(np.uint8)),
        torch.from_numpy(rng.integers(0, 4, 400)),
    )
    data = from_arrays(
        x, y, x[:50], y[:50], list("abcd"), n_train=300, n_test=50, n_valid=50, batch_size=32
    )
    teacher = SPACE.build(SPACE.reference).eval()
    return BlockLibrary(tmp_path_factory.mktemp("lib") / "l", SPACE, teacher).train(
        data, n_images=64, batch_size=32, progress=False, device="cpu"
    ), data


def test_without_steps_the_feature_is_the_divergence_after_batch_norms(small):
    library, data = small
    feature = Assembled(library, data, steps=0)
    net = recalibrate_bn(library.build(ARCHS[0]), list(feature.learn[:8]))
    judge = data.valid.dataset[torch.arange(50)][0]
    wanted = soft_targets(logits(net, judge)[0], logits(library.teacher, judge)[0]).item()
    assert np.isclose(feature(ARCHS[:1])[0, 0], -np.log(wanted))


def test_what_was_computed_is_kept_and_the_same_in_every_process(small, tmp_path, monkeypatch):
    library, data = small
    how = dict(steps=3, batch_size=32, n_images=50)
    once = Assembled(library, data, store=tmp_path, **how)(ARCHS[:4])
    two = Assembled(library, data, n_jobs=2, **how)([*ARCHS[:4], ARCHS[0]])
    assert once.shape == (4, 2) and np.allclose(two[:4], once) and np.array_equal(two[4], two[0])
    monkeypatch.setattr(predictor, "_divergence", lambda *a: pytest.fail("computed again"))
    assert np.array_equal(Assembled(library, data, store=tmp_path, **how)(ARCHS[:4]), once)
    with pytest.raises(pytest.fail.Exception):
        Assembled(library, data, store=tmp_path, **{**how, "steps": 4})(ARCHS[:1])


def test_steps_bring_a_network_closer_to_its_teacher(small):
    library, data = small
    found = Assembled(library, data, steps=9, batch_size=32, n_images=50)(ARCHS[:3])
    assert (found[:, 1] > found[:, 0]).all() and np.allclose(
        found[:, :1],
        Assembled(library, data, steps=0, n_images=50, batch_size=32)(ARCHS[:3]),
        atol=0.2,
    )


def test_the_feature_enters_the_fit(small):
    library, data = small
    value = {a: [k / 60] for k, a in enumerate(ARCHS)}
    fitted = AccuracyPredictor("none", lambda archs: [value[a] for a in archs]).fit(
        library, ARCHS[::2], np.linspace(0.2, 0.8, 30)
    )
    assert fitted.terms is None and fitted.score(ARCHS[1::2], np.linspace(0.2, 0.8, 30)).tau == 1
