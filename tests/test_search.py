"The search: exact fronts, composed networks, measured costs, and evolution that survives its death."

import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models import resnet18

from mep.deploy import Latency, optimized_ops, run
from mep.nas.search import (
    Additive,
    Composer,
    Deployment,
    Front,
    Measured,
    crossing,
    draw_front,
    draw_growth,
    hypervolume,
    latency_table,
    load_scenarios,
    macs_cost,
    pareto_front,
    save_scenarios,
    scaled_references,
    search,
    watch,
)
from mep.nas.space import Position, SearchSpace, choices, chop, default_space
from mep.store import DamagedError, LockedError, Store

module = importlib.import_module("mep.nas.search")  # as an attribute, it is the function

OPTIONS = [
    *choices("basic", depth=(2, 1), width=(1.0, 0.5)),
    *choices("mobile", expansion=2, out_act="relu"),
    *choices("separable"),
    *choices("skip", out_act="relu"),
]
SPACE = default_space(options=OPTIONS, width=8)
SMALL = SearchSpace(
    SPACE.stem,
    [Position(p.c_in, p.c_out, p.stride, p.options[:4]) for p in SPACE.blocks[:2]],
    Position(16, 4, 1, choices("classifier")),
)


class Made:
    "A predictor that is a sum in a logistic link; with `pair`, the first two blocks also interact"

    def __init__(self, space, seed=0, pair=0.0):
        rng = np.random.default_rng(seed)
        self.space, self.intercept, self.pair = space, -1.0, pair
        self._terms = [
            np.log1p(t / 1e4) * 0.3 + 0.2 * rng.normal(size=len(t)) for t in space.macs_table()
        ]
        self.terms = None if pair else self._terms

    def predict(self, archs):
        x = self.space.encode(archs)
        total = (
            self.intercept
            + sum(t[v] for t, v in zip(self._terms, x.T))
            + self.pair * (x[:, 0] == x[:, 1])
        )
        return 1 / (1 + np.exp(-total))


def every(space):
    return space.decode(list(product(*(range(len(p.options)) for p in space.blocks))))


def pairs(front):
    return [(p.cost, p.accuracy) for p in front]


# Fronts


def test_front_answers_and_refuses():
    a = SPACE.sample(4)
    f = pareto_front(a, [0.5, 0.7, 0.6, 0.8], [1, 2, 3, 4])
    assert [p.arch for p in f] == [a[0], a[1], a[3]]
    assert f.at(2).accuracy == 0.7 and f.at(99).accuracy == 0.8 and f.reaching(0.5).cost == 1
    with pytest.raises(ValueError, match="cheapest architecture takes 1 ms"):
        f.at(0.9)
    with pytest.raises(ValueError, match="best has 0.800"):
        f.reaching(0.81)
    with pytest.raises(ValueError, match="at least one"):
        pareto_front([], [], [])
    with pytest.raises(ValueError, match="2 accuracies"):
        pareto_front(a, [1, 2], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="must be numbers"):
        pareto_front(a, [1, 2, np.nan, 3], [1, 2, 3, 4])
    assert (
        len(f.spread(2)) == 2
        and f.spread(9) == f
        and f.spread(2)[0] == f[0]
        and f.spread(1)[0] == f[-1]
    )
    with pytest.raises(ValueError, match="n=0"):
        f.spread(0)
    assert len(f.recost(lambda archs: -np.arange(len(archs)))) == 1
    assert len(f.table()) == 4 and "3 architectures" in repr(f)


def test_front_on_disk(tmp_path):
    f = search(SPACE, Made(SPACE, pair=0.5), "macs", population=8, generations=3, progress=False)
    assert Front.load(f.save(tmp_path / "front.json")) == f and f.history
    assert pickle.loads(pickle.dumps(f)) == f
    for text in (
        "",
        "[]",
        '{"unit": "ms"}',
        (
            '{"unit": "ms", "name": "", "history": [], "points": [{"cost": 1, "accuracy": 1, "arch": '
            '{"frame": "x", "blocks": ["nothing"]}}]}'
        ),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json holds no front"):
            Front.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        Front.load(tmp_path / "missing.json")


def test_hypervolume_of_itself_is_one_and_of_less_is_less():
    f = search(SPACE, Made(SPACE))
    assert hypervolume(f, f) == 1
    assert 0 < hypervolume(f.spread(4), f) < 1
    assert hypervolume(f.spread(1), f) < hypervolume(f.spread(4), f)


# Scenarios

deployments = st.builds(
    Deployment,
    threads=st.integers(1, 64),
    batch=st.integers(1, 64),
    resolution=st.none() | st.integers(1, 999),
    level=st.sampled_from(["disable", "basic", "extended", "all"]),
    precision=st.sampled_from(["fp32", "int8"]),
)


@given(st.dictionaries(st.text(min_size=1, max_size=9), deployments, min_size=1, max_size=4))
def test_scenarios_come_back(tmp_path_factory, scenarios):
    path = tmp_path_factory.getbasetemp() / "scenarios.json"
    assert load_scenarios(save_scenarios(path, scenarios)) == scenarios


@given(deployments)
def test_a_deployments_key_names_a_file(d):
    Store("nowhere").path(d.key)
    assert str(d)


@pytest.mark.parametrize(
    "text, found",
    [
        ("[1]", "at least one"),
        ("{", "no JSON"),
        ('{"a": 1}', "'a' must be"),
        ('{"a": {"thread": 2}}', "did you mean 'threads'"),
        ('{"a": {"threads": true}}', "threads=True"),
        ('{"a": {"batch": 0}}', "batch=0"),
        ('{"a": {"level": "most"}}', "level='most'"),
        ('{"a": {"precision": 8}}', "precision=8"),
        ('{"a": {"resolution": 2.5}}', "resolution=2.5"),
    ],
)
def test_wrong_scenarios_are_named(tmp_path, text, found):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=found):
        load_scenarios(tmp_path / "s.json")


# Composed networks


@pytest.mark.parametrize("resolution", [None, 24])
def test_every_option_composes_to_what_torch_computes(tmp_path, resolution):
    space = default_space(width=16, input_shape=(3, 16, 16))
    composer, x, n = (
        Composer(space, resolution),
        torch.randn(3, 3, resolution or 16, resolution or 16),
        len(space.blocks[0].options),
    )
    for k in range(0, n, len(space)):  # each option at one of the places
        arch = space.arch(*[(k + i) % n for i in range(len(space))])
        with torch.no_grad():
            y = space.build(arch).eval()(x).numpy()
        got = run(composer.write(arch, tmp_path / "a.onnx"), x)
        assert np.abs(got - y).max() <= 1e-4 * np.abs(y).max() + 1e-6


def test_blocks_that_do_nothing_compose(tmp_path):
    space = default_space(options=[*choices("basic"), *choices("skip")], width=8)
    arch, x = space.arch(1, 1, 1, 1, 1), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(
            run(Composer(space).write(arch, tmp_path / "a.onnx"), x),
            space.build(arch).eval()(x).numpy(),
            atol=1e-5,
        )


def test_a_torchvision_network_composes(tmp_path):
    space = chop(resnet18(weights=None).eval(), (3, 64, 64)).space(choices("basic", width=0.5))
    x = torch.randn(2, 3, 64, 64)
    for arch in (space.reference, space.sample(1, 3)[0]):
        with torch.no_grad():
            y = space.build(arch).eval()(x).numpy()
        np.testing.assert_allclose(
            run(Composer(space).write(arch, tmp_path / "a.onnx"), x), y, atol=1e-4 * np.abs(y).max()
        )


def test_given_blocks_are_used(tmp_path):
    x, other = (
        torch.randn(2, 3, 32, 32),
        Composer(SPACE, block=lambda place, option: SPACE.block(place, option, seed=7)),
    )
    with torch.no_grad():
        y = SPACE.build(SPACE.reference, seed=7).eval()(x).numpy()
    np.testing.assert_allclose(
        run(other.write(SPACE.reference, tmp_path / "a.onnx"), x), y, atol=1e-5
    )


def test_int8_networks_run_in_int8_and_say_nothing(tmp_path, caplog, capfd):
    ops = optimized_ops(Composer(SPACE).write(SPACE.reference, tmp_path / "a.onnx", "int8"))
    assert ops["QLinearConv"] and not ops["Conv"]
    assert not caplog.records and not capfd.readouterr().err


def test_architectures_of_other_spaces_are_refused():
    with pytest.raises(ValueError, match="frame"):
        Composer(SPACE).compose(SMALL.reference)


# Costs


@pytest.fixture
def groups(monkeypatch):
    "Latencies that depend on the file's size alone; returns the groups that were timed"
    seen = []

    def fake(files, shape, n, warmup):
        seen.append(list(files))
        return {a: Latency((os.path.getsize(path) / 1e4,) * n, d) for a, (path, d) in files.items()}

    monkeypatch.setattr(module, "latencies", fake)
    return seen


def test_each_network_is_timed_once_beside_the_reference(tmp_path, groups):
    archs, measured = SPACE.sample(10), Measured(SPACE, Deployment(), tmp_path, group=4)
    ms = measured([*archs, archs[0]])
    assert ms[0] == ms[-1] and sum(a != SPACE.reference for g in groups for a in g) == len(
        set(archs) - {SPACE.reference}
    )
    assert all(g[0] == SPACE.reference and len(g) <= 5 for g in groups)
    n = len(groups)
    assert (Measured(SPACE, Deployment(), tmp_path)(archs) == ms[:-1]).all() and len(
        groups
    ) == n  # from the store
    Measured(SPACE, Deployment(threads=2), tmp_path)(archs[:1])
    assert len(groups) == n + 1  # another scenario


def test_a_search_in_memory_needs_no_store(groups):
    assert Measured(SPACE)([SPACE.reference])[0] > 0


def test_damaged_measurements_are_named_not_used(tmp_path, groups):
    Measured(SPACE, store=tmp_path)(SPACE.sample(2))
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError):
        Measured(SPACE, store=tmp_path)(SPACE.sample(2))


def test_two_never_measure_at_once(tmp_path, groups):
    with Store(tmp_path).lock():
        with pytest.raises(LockedError):
            Measured(SPACE, store=tmp_path)(SPACE.sample(2))


def test_really_measured(tmp_path):
    light, heavy = SPACE.arch(6, 6, 6, 6, 6), SPACE.reference
    for d in (Deployment(), Deployment(precision="int8", resolution=16)):
        ms = Measured(SPACE, d, rounds=5)([light, heavy])
        assert (ms > 0).all()


def test_macs_are_additive():
    archs = SPACE.sample(20)
    assert macs_cost(SPACE)(archs).tolist() == [SPACE.macs(a) for a in archs]
    assert macs_cost(SPACE).least == search(SPACE, Made(SPACE), "macs")[0].cost
    with pytest.raises(ValueError, match="frame"):
        macs_cost(SPACE)([SMALL.reference])


def test_a_table_of_additive_times_is_exact():
    class Exact:
        space, unit = SPACE, "ms"
        asked = 0

        def __call__(self, archs):
            self.asked += len(archs)
            return 0.1 + macs_cost(SPACE)(archs) / 1e6

    measured, archs = Exact(), SPACE.sample(30, seed=3)
    table = latency_table(measured)
    np.testing.assert_allclose(table(archs), measured(archs), rtol=1e-6)
    assert measured.asked < 100 and table.unit == "ms" and table.least > 0


def test_noise_makes_no_latency_negative():
    rng = np.random.default_rng(0)

    class Noisy:
        space, unit = SPACE, "ms"

        def __call__(self, archs):
            return rng.lognormal(0, 1, len(archs))

    assert all(latency_table(Noisy(), seed=s).least > 0 for s in range(5))


# Searching


def test_merge_is_the_listed_front():
    for cost in (
        macs_cost(SMALL),
        Additive(
            SMALL, tuple(np.random.default_rng(1).gamma(2, 1, 4) for _ in range(2)), 0.5, "ms"
        ),
    ):
        f, archs = search(SMALL, Made(SMALL), cost), every(SMALL)
        wanted = pareto_front(archs, Made(SMALL).predict(archs), cost(archs))
        np.testing.assert_allclose(pairs(f), pairs(wanted))


def test_a_saturated_link_leaves_a_front():
    made = Made(SPACE)
    made.predict = lambda archs: np.minimum(Made(SPACE).predict(archs), 0.3)
    f = search(SPACE, made)
    assert (np.diff([p.accuracy for p in f]) > 0).all()


def test_nsga2_comes_close_and_repeats():
    made, exact = Made(SPACE), search(SPACE, Made(SPACE))
    a, b = (
        search(SPACE, made, how="nsga2", population=24, generations=25, progress=False)
        for _ in range(2)
    )
    assert a == b and 0.95 < hypervolume(a, exact) <= 1 + 1e-12
    assert a != search(
        SPACE, made, how="nsga2", population=24, generations=25, seed=1, progress=False
    )
    assert len(a.history) == 25 and [n for n, _ in a.history] == sorted(n for n, _ in a.history)


def test_what_is_no_sum_is_evolved_and_the_front_is_of_all_evaluated():
    made = Made(SMALL, pair=0.7)
    f = search(SMALL, made, population=8, generations=30, progress=False)
    archs = every(SMALL)
    assert pairs(f) == pairs(pareto_front(archs, made.predict(archs), macs_cost(SMALL)(archs)))
    with pytest.raises(ValueError, match="the predictor .* is no sum"):
        search(SMALL, made, how="merge")
    with pytest.raises(ValueError, match="the cost .* is no sum"):
        search(SMALL, Made(SMALL), macs_cost(SMALL).__call__, how="merge")


def test_limits():
    made, table = (
        Made(SPACE),
        Additive(SPACE, tuple(np.sqrt(t) / 1e3 for t in SPACE.macs_table()), 0.1, "ms"),
    )
    free = search(SPACE, made, table)
    middle = free[len(free) // 2].cost
    f = search(SPACE, made, table, max_ms=middle)
    assert pairs(f) == [p for p in pairs(free) if p[0] <= middle]
    g = search(
        SPACE,
        made,
        table,
        max_ms=middle,
        how="nsga2",
        population=20,
        generations=10,
        progress=False,
    )
    assert max(p.cost for p in g) <= middle
    h = search(
        SPACE,
        made,
        table,
        max_macs=SPACE.macs(SPACE.reference) / 4,
        population=20,
        generations=10,
        progress=False,
    )  # a limit on something else: evolved
    assert max(SPACE.macs(p.arch) for p in h) <= SPACE.macs(SPACE.reference) / 4


def test_limits_that_nothing_meets_name_the_least():
    made, least = Made(SPACE), macs_cost(SPACE).least
    with pytest.raises(ValueError, match=f"max_macs=1000 can't be met.*{least / 1e3:.1f} k"):
        search(SPACE, made, max_macs=1000)
    slow = lambda archs: 5 + macs_cost(SPACE)(archs) / 1e9
    with pytest.raises(ValueError, match="none of .* keeps max_ms=5 .the least found is 5"):
        search(SPACE, made, slow, max_ms=5, population=8, generations=3, progress=False)
    with pytest.raises(ValueError, match="counts MACs"):
        search(SPACE, made, max_ms=3)
    with pytest.raises(ValueError, match="max_macs=0"):
        search(SPACE, made, max_macs=0)


def test_what_does_not_belong_is_refused():
    with pytest.raises(ValueError, match="predictor belongs to a space with frame"):
        search(SMALL, Made(SPACE))
    with pytest.raises(ValueError, match="cost belongs to a space with frame"):
        search(SMALL, Made(SMALL), macs_cost(SPACE))
    with pytest.raises(TypeError, match="no method predict"):
        search(SMALL, object())
    with pytest.raises(TypeError, match="cost='joules'"):
        search(SMALL, Made(SMALL), "joules")
    with pytest.raises(ValueError, match="how='best'"):
        search(SMALL, Made(SMALL), how="best")
    with pytest.raises(ValueError, match="population=1"):
        search(SMALL, Made(SMALL), how="nsga2", population=1)
    short, nan = Made(SMALL), Made(SMALL)
    short.terms, nan.terms = short.terms[:1], [np.full(4, np.nan)] * 2
    with pytest.raises(ValueError, match="has terms for"):
        search(SMALL, short)
    with pytest.raises(ValueError, match="NaN"):
        search(SMALL, nan)


def test_numbers_that_are_none_are_refused():
    bad = Made(SMALL, pair=1.0)
    bad.predict = lambda archs: np.full(len(archs), np.nan)
    with pytest.raises(ValueError, match="the predictor says nan for 'basic"):
        search(SMALL, bad, population=4, generations=1, progress=False)
    bad.predict = lambda archs: np.zeros(1)
    with pytest.raises(ValueError, match="predictor returned 1 numbers for"):
        search(SMALL, bad, population=4, generations=1, progress=False)
    with pytest.raises(ValueError, match="the cost says inf"):
        search(
            SMALL,
            Made(SMALL),
            lambda archs: np.full(len(archs), np.inf),
            population=4,
            generations=1,
            progress=False,
        )


def test_a_predictor_of_a_larger_space_serves():
    larger, narrow = SPACE, SPACE.where(lambda o: o.cell == "basic")
    f = search(narrow, Made(larger))
    wanted = pareto_front(
        every(narrow), Made(larger).predict(every(narrow)), macs_cost(narrow)(every(narrow))
    )
    np.testing.assert_allclose(pairs(f), pairs(wanted))
    with pytest.raises(ValueError, match="without the option 'mobile"):
        search(larger, Made(narrow))


def test_spaces_at_the_edge_of_what_can_be_searched():
    two = SearchSpace(
        SPACE.stem,
        [Position(8, 8, 1, OPTIONS[:1]), Position(8, 8, 1, OPTIONS[:2])],
        Position(8, 4, 1, choices("classifier")),
    )
    exact = search(two, Made(two))
    f = search(two, Made(two), how="nsga2", population=10, generations=10, progress=False)
    assert pairs(f) == pairs(exact) and f.history[-1][0] == 2


def test_start_is_evaluated():
    start = SPACE.sample(5, seed=99)
    seen = []
    search(
        SPACE,
        Made(SPACE),
        lambda archs: (seen.extend(archs), macs_cost(SPACE)(archs))[1],
        start=start,
        population=4,
        generations=1,
        progress=False,
    )
    assert set(start) <= set(seen) and SPACE.reference in seen


# Killed and resumed


class Dies:
    "A cost that fails at one of its calls, and counts what it was asked"

    unit, key = "ms", "dies"

    def __init__(self, at=0):
        self.at, self.calls, self.asked = at, 0, []

    def __call__(self, archs):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.asked += archs
        return macs_cost(SPACE)(archs) / 1e6


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_stopped_anywhere_it_ends_the_same(tmp_path, at):
    run_ = dict(population=10, generations=8, progress=False)
    whole, dies = Dies(), Dies(at)
    straight = search(SPACE, Made(SPACE, pair=0.3), whole, **run_)
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, Made(SPACE, pair=0.3), dies, store=tmp_path, **run_)
    assert search(SPACE, Made(SPACE, pair=0.3), dies, store=tmp_path, **run_) == straight
    assert dies.asked == whole.asked  # nothing twice
    assert (
        search(SPACE, Made(SPACE, pair=0.3), Dies(1), store=tmp_path, **run_) == straight
    )  # nothing left to ask
    shorter = search(SPACE, Made(SPACE, pair=0.3), Dies(), **run_ | dict(generations=4))
    assert (
        search(SPACE, Made(SPACE, pair=0.3), Dies(1), store=tmp_path, **run_ | dict(generations=4))
        == shorter
    )


def test_other_settings_are_refused_by_name(tmp_path):
    run_ = dict(population=10, generations=2, progress=False, store=tmp_path)
    search(SPACE, Made(SPACE, pair=0.3), Dies(), **run_)
    for other, name in (
        (dict(population=12), "population was 10, now it is 12"),
        (dict(seed=1), "seed was 0"),
        (dict(max_macs=1e9), "limits was {}"),
        (dict(start=SPACE.sample(2)), "start was"),
    ):
        with pytest.raises(ValueError, match=name):
            search(SPACE, Made(SPACE, pair=0.3), Dies(), **run_ | other)
    with pytest.raises(ValueError, match="predictor was"):
        search(SPACE, Made(SPACE, seed=1, pair=0.3), Dies(), **run_)
    with pytest.raises(ValueError, match="cost was dies, now it is sum of macs"):
        search(SPACE, Made(SPACE, pair=0.3), "macs", **run_)
    narrow = SPACE.where(lambda o: o.cell == "basic")
    with pytest.raises(ValueError, match="space was"):
        search(narrow, Made(SPACE, pair=0.3), Dies(), **run_)


def test_a_damaged_generation_is_named(tmp_path):
    run_ = dict(population=10, generations=3, progress=False, store=tmp_path)
    search(SPACE, Made(SPACE, pair=0.3), Dies(), **run_)
    path = next((tmp_path / "search").glob("generation*"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedError, match="generation"):
        search(SPACE, Made(SPACE, pair=0.3), Dies(), **run_)


def test_sigkill(tmp_path):
    "A real process, killed while it searches"
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_search import SPACE, Made, Dies, search
        class Slow(Dies):
            def __call__(self, archs): time.sleep(.05); print(len(archs), flush=True); return super().__call__(archs)
        options = dict(population=10, generations=40, progress=False, store={str(tmp_path)!r})
        search(SPACE, Made(SPACE, pair=.3), Slow(), **options)""")
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(6):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = sum(
        len(Store(tmp_path).get(k).tensors["x"])
        for k in Store(tmp_path).keys()
        if "generation" in k
    )
    assert 0 < kept
    again, whole = Dies(), Dies()
    run_ = dict(population=10, generations=12, progress=False)
    assert search(SPACE, Made(SPACE, pair=0.3), again, store=tmp_path, **run_) == search(
        SPACE, Made(SPACE, pair=0.3), whole, **run_
    )
    assert len(again.asked) <= len(whole.asked) - min(kept, len(whole.asked)) or len(
        again.asked
    ) < len(whole.asked)


# Pictures and pairs


def test_pictures(tmp_path):
    f = search(
        SPACE,
        Made(SPACE, pair=0.3),
        "macs",
        population=10,
        generations=5,
        callback=watch(tmp_path / "front.png"),
        progress=False,
    )
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert draw_growth(f, search(SPACE, Made(SPACE))).get_ylabel() == "predicted accuracy"
    assert draw_front(f, [(1e6, 0.3)], [(2e6, 0.2)], "a").get_title("left") == "a"


def test_callback_sees_each_generation():
    sizes = []
    search(
        SPACE,
        Made(SPACE),
        how="nsga2",
        population=10,
        generations=5,
        callback=lambda f: sizes.append(f.history[-1][0]),
        progress=False,
    )
    assert len(sizes) == 5 and sizes == sorted(sizes)


def test_scaled_references_are_scaled():
    archs = scaled_references(SPACE)
    assert archs[0] == SPACE.reference and len(archs) == 4
    assert all(len({o.key for o in a.options}) == 1 and a.options[0].cell == "basic" for a in archs)


def test_crossing_finds_the_pair():
    rng = np.random.default_rng(0)
    a, b = (
        Additive(SMALL, tuple(rng.gamma(1, 1, 4) for _ in range(2)), 0.1, "ms") for _ in range(2)
    )
    fa, fb = (search(SMALL, Made(SMALL), c) for c in (a, b))
    x, y = crossing(fa, fb, a, b)
    px, py = Made(SMALL).predict([x, y])
    assert py >= px and b([y])[0] <= b([x])[0]
    low = pareto_front([SMALL.reference], [0.0], [1.0])
    with pytest.raises(ValueError, match="no pair"):
        crossing(fa, low, a, b)
    least = fa[len(fa) // 2].accuracy
    assert Made(SMALL).predict([crossing(fa, fb, a, b, least)[0]])[0] >= least


def test_costs_and_deployments_are_plain():
    for thing in (macs_cost(SMALL), Deployment(threads=3)):
        assert type(pickle.loads(pickle.dumps(thing))) is type(thing)
    assert json.dumps(
        search(SMALL, Made(SMALL), how="nsga2", population=4, generations=2, progress=False).history
    )


def test_a_front_can_be_judged_again_by_a_dearer_predictor():
    archs = [
        SPACE.arch(*v)
        for v in ([0] * len(SPACE), [1] + [0] * (len(SPACE) - 1), [1, 1] + [0] * (len(SPACE) - 2))
    ]
    front = pareto_front(archs, [0.5, 0.6, 0.7], [1.0, 2.0, 3.0])

    class Other:
        def predict(self, archs):
            return np.array([0.5, 0.4, 0.8])

    judged = front.rejudge(Other(), "again")
    assert (
        [p.arch for p in judged] == [archs[0], archs[2]]
        and [p.accuracy for p in judged] == [0.5, 0.8]
        and [p.cost for p in judged] == [1.0, 3.0]
        and judged.name == "again"
    )
