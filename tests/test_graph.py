"""The graph: recording, shapes, swapping, two networks in lockstep."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.graph import TraceError, add_module, lockstep, note_shapes, swap, that_fit, trace
from mep.train import small_mobilenet, small_resnet


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice, self.head = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 1),
            nn.Linear(3, 5),
        )

    def forward(self, x):
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.head(self.twice(torch.relu(self.twice(x))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Residual()


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "googlenet", "densenet121", "shufflenet_v2_x0_5"]
)
def test_torchvision_is_recorded_as_it_computes(name):
    model = torchvision.models.get_model(
        name,
        weights=None,
        **(dict(init_weights=False, aux_logits=False) if name == "googlenet" else {}),
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(trace(model)(x), model(x), atol=1e-5)


def test_trace_copies_and_unshares(net):
    graph = trace(net.train())
    assert net.training and not graph.training
    assert graph.twice is not graph.twice_again and torch.equal(
        graph.twice.weight, graph.twice_again.weight
    )
    graph.a.weight.data.zero_()
    assert net.a.weight.abs().sum() > 0


def test_leaves_stay_one_call(net):
    outer = nn.Sequential(Residual(), nn.ReLU())
    assert [n.target for n in trace(outer, (Residual,)).graph.nodes if n.op == "call_module"] == [
        "0",
        "1",
    ]


def test_what_cannot_be_recorded_is_named():
    class Moody(nn.Module):
        def forward(self, x):
            return x if x.mean() > 0 else -x

    with pytest.raises(TraceError, match=r"test_graph.py, line \d+: `return x if"):
        trace(Moody())
    with pytest.raises(TypeError, match="torch.nn.Module, got function"):
        trace(lambda x: x)


def test_shapes_and_what_does_not_fit(net):
    graph = note_shapes(trace(net), torch.zeros(2, 3, 8, 8))
    assert {n.name: n.meta["shape"] for n in graph.graph.nodes}["head"] == (2, 5)
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\).*'a'"):
        note_shapes(graph, torch.zeros(2, 4, 8, 8))


def test_swap_changes_only_what_was_named(net):
    new = nn.Conv2d(3, 3, 1)
    other = swap(net, {"a": new})
    assert other.a is new and type(other) is Residual and net.a is not new
    assert other.b is not net.b and torch.equal(other.b.weight, net.b.weight)


def test_swap_bad_names(net):
    with pytest.raises(ValueError, match="did you mean 'twice'"):
        swap(net, {"twica": nn.ReLU()})
    with pytest.raises(ValueError, match="no module ''"):
        swap(net, {"": nn.ReLU()})
    shared = nn.Sequential(net.a, nn.ReLU(), net.a)
    for name in ("0", "2"):
        with pytest.raises(ValueError, match="one module under the names 0, 2"):
            swap(shared, {name: nn.ReLU()})


def test_names_are_numbered():
    graph = trace(nn.Sequential(nn.ReLU()))
    assert [add_module(graph, "x", nn.ReLU()) for _ in range(3)] == ["x", "x2", "x3"]


def run(net, changed, batches, names=None, at=lambda stop: None):
    with torch.no_grad():
        for stop in lockstep(net, changed, batches, names):
            at(stop)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.sampled_from([small_resnet, small_mobilenet]))
def test_an_unchanged_copy_sees_the_same(batch, make):
    model = make(4, width=8 if make is small_resnet else 0.25).eval()
    exact, changed = trace(model), trace(model)

    def at(stop):
        for a, b, lack in stop.inputs():
            assert torch.equal(a, b) and (lack is None or not lack.any())
        assert stop.n == 7

    run(exact, changed, torch.randn(7, 3, 16, 16).split(batch), at=at)


def test_what_is_put_in_place_runs_from_there_on(net):
    exact, changed, seen = trace(net), trace(net), {}

    def at(stop):
        seen[stop.name] = list(stop.inputs())[0]
        if stop.name == "a":
            changed.a = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Identity())

    x = torch.randn(4, 3, 8, 8)
    run(exact, changed, [x], at=at)
    assert list(seen) == ["a", "b", "twice", "twice_again", "head"]
    assert torch.equal(seen["a"][0], seen["a"][1])
    assert not torch.allclose(seen["b"][0], seen["b"][1])
    want = changed.b(torch.relu(changed.a(x)))
    with torch.no_grad():
        assert torch.allclose(seen["twice"][1], torch.relu(x + want), atol=5e-3)
    assert torch.allclose(seen["b"][2], torch.zeros_like(x), atol=1e-6), (
        "the shortcut is the image itself: nothing lacks"
    )
    assert seen["a"][2] is None and seen["head"][2] is None


def test_only_named_layers(net):
    names = []
    run(
        trace(net),
        trace(net),
        [torch.randn(2, 3, 8, 8)],
        ["head", "b"],
        lambda stop: names.append(stop.name),
    )
    assert names == ["b", "head"]


def test_memory(net):
    graph, batches = (
        note_shapes(trace(net), torch.zeros(1, 3, 8, 8)),
        list(torch.zeros(40, 3, 8, 8).split(8)),
    )
    assert that_fit(graph, batches, 1e9) is batches
    with pytest.warns(UserWarning, match="40 images need .* the first 2 are used"):
        kept = that_fit(graph, batches, 4 * 3 * 3 * 64 * 2)
    assert sum(map(len, kept)) == 2
