"""Operators: what their records claim, tried on numbers; names and spellings; an operator of a
user's own, quantized and exported."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import mep.ops as ops
from mep.ops import CHANNELS, INTEGER, Operator, is_operator, operator_at, operators, register
from mep.quant import equalize, export_int8, quantize
from mep.quant.dfq import find_pairs


@pytest.fixture
def registry(monkeypatch):
    "What a test registers is forgotten afterwards"
    monkeypatch.setattr(ops, "_KNOWN", dict(ops._KNOWN))


def called(f, *args):
    "The traced function, and its last call"
    net = fx.symbolic_trace(f)
    return net, [n for n in net.graph.nodes if n.op.startswith("call")][-1]


@pytest.mark.parametrize(
    "f, name",
    [
        (lambda x: F.relu(x), "ReLU"),
        (lambda x: x.relu_(), "ReLU"),
        (lambda x: torch.clip(x, 0, 6), "clamp"),
        (lambda x: x + x, "add"),
        (lambda x: operator.iadd(x, x), "add"),
        (lambda x: torch.maximum(x, x), "other pair"),
        (lambda x: torch.cat([x, x], 1), "concatenate"),
        (lambda x: x.reshape(2, -1), "flatten"),
        (lambda x: x[:, 1:], "index"),
    ],
)
def test_every_way_to_spell_an_operator_finds_its_record(f, name):
    net, node = called(f)
    assert operator_at(net, node).name == name and is_operator(net, node, "none", name)


def test_placeholders_and_outputs_are_no_operators():
    net, _ = called(lambda x: x + 1)
    ends = [n for n in net.graph.nodes if n.op in ("placeholder", "output")]
    assert [operator_at(net, n) for n in ends] == [None, None]


def test_words_are_ours_and_a_spelling_has_one_record():
    seen = set()
    for op in operators().values():
        assert callable(op.integer) or op.integer in INTEGER
        assert op.channels in CHANNELS
        assert seen.isdisjoint(op.spellings)
        seen.update(op.spellings)


CLAIMS = [
    (name, one)
    for name, op in operators().items()
    for one in op.spellings
    if callable(one) and not isinstance(one, type) and (op.factor or op.channels == "apart")
]


@pytest.mark.parametrize("name, f", CLAIMS)
def test_functions_do_what_their_record_claims(name, f):
    one_dim = f.__name__.endswith("1d")
    x = torch.randn(2, 4, 6) if one_dim else torch.randn(2, 4, 6, 6)
    if "dropout" in f.__name__:
        args = (0.5, False)
    elif f.__name__ in ("clamp", "clip"):
        args = (-0.5, 1.0)
    elif f.__name__ == "interpolate":
        args = (None, 2)
    else:
        args = (2,) if "pool" in f.__name__ else ()
    op = operators()[name]
    y = f(x, *args)
    if op.factor:
        c = (torch.rand(4) + 0.5).view(4, *[1] * (x.ndim - 2))
        assert torch.allclose(f(c * x, *args), c * y, atol=1e-5)
    if op.channels == "apart":
        other = x.clone()
        other[:, 2] += 1
        differs = (f(other, *args) != y).flatten(2).any(-1).any(0)
        assert not differs[[0, 1, 3]].any()


def test_a_spelling_of_another_operator_and_unknown_words_are_refused(registry):
    with pytest.raises(ValueError, match="relu is a spelling of 'ReLU' already"):
        register(Operator("mine", (F.relu,)))
    with pytest.raises(ValueError, match="'passes' is none of layer"):
        register(Operator("mine", (torch.sinc,), "passes"))
    with pytest.raises(ValueError, match="'split' is none of apart"):
        register(Operator("mine", (torch.sinc,), channels="split"))
    assert operator_at(*called(lambda x: torch.sinc(x))) is None


def test_spellings_join_under_a_name_that_exists(registry):
    register(Operator("add", (torch.logaddexp,), "add"))
    assert torch.logaddexp in operators()["add"].spellings
    assert operator.add in operators()["add"].spellings


class Rolls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.b(torch.roll(self.a(x), 1, 3)).mean((2, 3))


def test_an_operator_of_ones_own_passes_integers_once_it_is_registered(registry, tmp_path):
    torch.manual_seed(0)
    net, x = Rolls().eval(), torch.randn(16, 3, 8, 8)
    with pytest.warns(UserWarning, match="roll .*no integer kernel"):
        quantize(net, x, progress=False)
    register(Operator("roll", (torch.roll,), "pass"))
    qm = quantize(net, x, progress=False)
    assert qm.report.floats == {}
    check = export_int8(qm, tmp_path / "rolls.onnx")
    assert check.sqnr_db == float("inf") and check.float_layers == 0


class Magnitude(nn.Sequential):
    def forward(self, x):
        return self[1](torch.abs(self[0](x)))


def test_a_factor_passes_an_operator_that_says_so(registry):
    torch.manual_seed(0)
    net = Magnitude(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)).eval()
    assert "abs" in find_pairs(net).refused["0"]
    register(Operator("magnitude", (torch.abs,), factor=True, channels="apart"))
    assert [p[:2] for p in find_pairs(net).pairs] == [("0", "1")]
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(equalize(net)(x), net(x), atol=1e-5)
