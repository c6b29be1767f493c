"""mep.plot: colours that stay apart, fronts that are right, names that don't overlap, files
that are reproducible."""

import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("agg")
import matplotlib.pyplot as plt

from mep import plot

EYES = ("normal", "protanopia", "deuteranopia", "tritanopia")
PIPELINE = ("fp32", "nas", "channel", "ptq", "dfq", "adaround", "bayesian_bits", "early_exit")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("wing", [*plot.WINGS, "pipeline"])
def test_colours_that_appear_together_differ(wing, eye):
    methods = PIPELINE if wing == "pipeline" else ["fp32", *plot.WINGS[wing][1]]
    for a, b in combinations(dict.fromkeys(methods), 2):
        assert plot.distance(plot.color(a), plot.color(b), eye) > 9, (a, b)


def test_colours_show_on_the_paper():
    for method, c in plot.COLORS.items():
        assert plot.distance(c, plot.PAPER) > 20, method


def test_methods_have_one_colour_and_one_marker():
    assert sum(len(m) for _, m in plot.WINGS.values()) == len(plot.COLORS) == len(plot.MARKERS)


def test_unknown_method_and_eye():
    with pytest.raises(ValueError, match="did you mean 'bayesian_bits'.*known: fp32"):
        plot.color("bayesianbits")
    with pytest.raises(ValueError, match="known"):
        plot.color(3)
    with pytest.raises(ValueError, match="protanopia"):
        plot.seen_as("#000000", "cat")


@given(st.integers(0, 0xFFFFFF))
def test_seen_as_keeps_greys_and_gives_colours(n):
    c, grey = f"#{n:06x}", f"#{n % 256:02x}" + f"{n % 256:02x}" * 2
    assert plot.seen_as(c, "normal") == c
    for eye in EYES:
        assert matplotlib.colors.is_color_like(plot.seen_as(c, eye))
        assert plot.distance(plot.seen_as(grey, eye), grey) < 1


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6, unique=True)
)
def test_names_do_not_overlap(ps):
    ax = plot.pareto([dict(name=f"net {i}", ms=a, accuracy=b) for i, (a, b) in enumerate(ps)])
    boxes = [t.get_window_extent() for t in ax.texts]
    assert len(boxes) == len(ps) and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    plt.close("all")


def test_pareto_marks_and_errors():
    ax = plot.pareto(
        [
            dict(name="a", ms=1, accuracy=0.5, method="svd", yerr=0.01),
            dict(name="b", ms=2, accuracy=0.4, published=True),
            dict(ms=3, accuracy=0.2),
        ],
        log=True,
    )
    assert ax.get_xscale() == "log" and len(ax.texts) == 2
    a, b = (c.lines[0] for c in ax.containers)
    assert (
        a.get_marker() == "s"
        and a.get_markerfacecolor() == plot.COLORS["svd"]
        and b.get_markerfacecolor() == plot.PAPER
    )
    with pytest.raises(ValueError, match="'x' has no 'ms'"):
        plot.pareto([dict(name="x", accuracy=1)])
    with pytest.raises(ValueError, match="ms: 1 of 1 numbers are NaN"):
        plot.pareto([dict(name="x", ms=float("nan"), accuracy=1)])
    with pytest.raises(ValueError, match="No colour"):
        plot.pareto([dict(name="x", ms=1, accuracy=1, method="?")])


def test_nothing_to_draw_is_no_crash():
    assert len(plot.pareto([]).texts) == 0
    assert len(plot.lines({}).lines) == 0


def test_bad_input_leaves_no_figure_behind():
    for bad in (
        lambda: plot.before_after([1], [1], method="?"),
        lambda: plot.before_after([1], []),
        lambda: plot.lines(dict(a=([1], []))),
        lambda: plot.grid_histogram([], [0, 1]),
        lambda: plot.pareto([dict(name="x", ms=1)]),
    ):
        with pytest.raises(ValueError):
            bad()
    assert plt.get_fignums() == []


def test_all_draw_into_given_axes_and_take_tensors():
    fig, axs = plt.subplots(1, 4)
    w = torch.randn(4, 9, requires_grad=True)
    grid = SimpleNamespace(scale=torch.tensor(0.1), zero_point=torch.tensor(0), qmin=-8, qmax=7)
    assert plot.before_after(w, w * 2, ax=axs[0]) is axs[0]
    assert plot.grid_histogram(w, grid, ax=axs[1]) is axs[1]
    assert plot.lines({"dfq": (torch.arange(3), w[0, :3].detach())}, ax=axs[2]) is axs[2]
    assert plot.pareto([dict(name="a", ms=1, accuracy=0.5)], ax=axs[3]) is axs[3]
    assert len(plt.get_fignums()) == 1


def test_style_is_undone():
    before = dict(plt.rcParams)
    plot.pareto([dict(name="a", ms=1, accuracy=0.5)])
    with plot.style():
        assert plt.rcParams["axes.facecolor"] == plot.PAPER
    assert dict(plt.rcParams) == before


def test_grid_histogram_counts_every_value():
    v = np.random.default_rng(0).normal(size=1000)
    ax = plot.grid_histogram(v, np.linspace(-1, 1, 8))
    assert (
        sum(
            p.get_height()
            for p in ax.patches
            if p.get_facecolor() == matplotlib.colors.to_rgba(plot.COLORS["naive"])
        )
        >= (abs(v) > 1).sum()
    )
    assert f"clipped: {(abs(v) > 1).mean():.2%}" in ax.get_legend_handles_labels()[1]


@given(st.lists(st.floats(-100, 100), max_size=8))
def test_apart(ys):
    out = plot._apart(ys, 5)
    assert all(abs(a - b) > 4.9 for a, b in combinations(out, 2))
    assert np.isclose(np.sum(out), np.sum(ys), atol=1e-6)


def test_bytes_are_the_same_in_another_process():
    code = (
        "import mep.plot as p, hashlib, sys; a = p.pareto([dict(name='A', ms=1, "
        "accuracy=.5)]); print(hashlib.sha256(p.svg(a).encode() + p.png(a)).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"MPLBACKEND": "agg", "PYTHONHASHSEED": h},
        ).stdout
        for h in "12"
    }
    assert len(runs) == 1


def test_import_chooses_no_backend():
    code = "import mep.plot, matplotlib; print(dict.__getitem__(matplotlib.rcParams, 'backend'))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={}
    ).stdout
    assert "agg" not in out.lower() and "object" in out.lower()
