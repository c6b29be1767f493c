"""Moments: the quadratic is the error, patches are what layers see, whole networks, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.graph import lockstep, trace
from mep.moments import (
    Moments,
    image_batches,
    layer_quadratic,
    observe,
    output_size,
    outputs_at,
    patches,
    positions,
    rows,
)
from mep.train import check_weights, nonfinite, small_mobilenet

FAST = settings(max_examples=15, deadline=None)
OPS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2),
    nn.Conv2d(4, 8, 3, groups=4, dilation=2),
    nn.Conv2d(4, 6, 4, padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 5, padding=(1, 2), padding_mode="reflect"),
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv3d(4, 6, 2),
    nn.Linear(4, 6),
]


@FAST
@given(st.integers(0, 99), st.integers(1, 4))
def test_quadratic_is_the_mean_squared_error(seed, batches):
    random = torch.Generator().manual_seed(seed)
    x, y, w = (torch.randn(*s, generator=random) + 3 for s in ((2, 5, 40), (2, 3, 40), (2, 3, 5)))
    moments = Moments()
    for a, b in zip(x.chunk(batches, -1), y.chunk(batches, -1)):
        moments.add(a, b)
    e = w @ x - y
    assert torch.allclose(moments.quadratic(False).error(w), e.square().mean(-1), rtol=1e-3)
    f = moments.quadratic()
    assert torch.allclose(f.error(w), e.var(-1, unbiased=False), rtol=1e-3, atol=1e-3)
    assert torch.allclose(f.bias(w), -e.mean(-1).flatten(), atol=1e-4)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_patches_give_the_layers_output(op):
    x = torch.randn(3, 4, *[9] * (0 if isinstance(op, nn.Linear) else op.weight.ndim - 2))
    y, groups = op(x).detach(), getattr(op, "groups", 1)
    assert tuple(output_size(op, x)) == tuple(y.shape[2:] or (1,))
    at = torch.randint(y[0, 0].numel(), (3, 5))
    assert torch.allclose(
        rows(op.weight, op) @ patches(op, x, at) + op.bias.view(groups, -1, 1),
        outputs_at(y, at, groups),
        atol=1e-5,
    )


def test_tokens_are_positions_of_a_linear_layer():
    op, x = nn.Linear(4, 6), torch.randn(3, 7, 4)
    at = positions(op, x, 99, torch.Generator())
    assert at.shape == (3, 7)
    assert torch.allclose(
        rows(op.weight, op) @ patches(op, x, at) + op.bias.view(1, -1, 1),
        op(x).flatten(0, 1).T[None],
        atol=1e-5,
    )


def test_a_large_mean_does_not_cancel():
    x = torch.randn(1, 3, 4000) + 1e3
    moments = Moments()
    for part in x.split(500, -1):
        moments.add(part, part)
    assert torch.allclose(moments.quadratic().h[0], torch.cov(x[0], correction=0), atol=1e-3)


@FAST
@given(st.integers(0, 99), st.integers(1, 7))
def test_observe_knows_the_error_of_any_weights(seed, batch):
    torch.manual_seed(seed)
    net, x = small_mobilenet(4, width=0.25).eval(), torch.randn(12, 3, 16, 16)
    name, op = next(
        (n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1
    )
    f = observe(net, [(b, None) for b in x.split(batch)], [name], samples=10**9, progress=False)[
        name
    ]
    new, seen = rows(op.weight, op) + 0.1 * torch.randn_like(rows(op.weight, op)), []
    hook = op.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        net(x)
    hook.remove()
    change = nn.functional.conv2d(
        seen[0],
        (new - rows(op.weight, op)).reshape(op.weight.shape),
        None,
        op.stride,
        op.padding,
        op.dilation,
        op.groups,
    )
    assert torch.allclose(
        f.error(new).flatten(), change.square().mean((0, 2, 3)), rtol=1e-2, atol=1e-5
    )


def test_observe_leaves_the_network_as_it_was():
    net, x = small_mobilenet(4, width=0.25), torch.randn(4, 3, 16, 16)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    observe(net, x, progress=False)
    assert net.training and not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_observe_removes_its_hooks_if_the_network_fails():
    net = small_mobilenet(4, width=0.25)
    with pytest.raises(RuntimeError):
        observe(net, torch.randn(2, 5, 16, 16), progress=False)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_bad_input():
    net, x = small_mobilenet(4, width=0.25), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="'nowhere'"):
        observe(net, x, ["nowhere"], progress=False)
    with pytest.raises(ValueError, match="no convolution"):
        observe(nn.ReLU(), x, progress=False)
    with pytest.raises(ValueError, match="empty"):
        observe(net, x[:0], progress=False)
    with pytest.raises(ValueError, match="batch 0 holds NaN"):
        observe(net, x * float("nan"), progress=False)
    with pytest.raises(ValueError, match="int64"):
        image_batches(torch.zeros(2, 3, 4, 4, dtype=torch.long))
    first = next(n for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    net.get_submodule(first).weight.data[:] = float("inf")
    with pytest.raises(ValueError, match="input of layer"):
        observe(net, x, progress=False)


@FAST
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.integers(1, 30), st.integers(0, 9)
)
def test_near_has_one_best_answer(g, r, d, n, seed):
    random = torch.Generator().manual_seed(seed)
    x, y, w = (torch.randn(*s, generator=random) for s in ((g, d, n), (g, r, n), (g, r, d)))
    moments = Moments()
    moments.add(x, y)
    f = moments.quadratic(False)
    near = f.near(w)  # with fewer samples than weights, too
    best = near.to(torch.float64).solve().float()
    for other in (w, torch.zeros_like(w), best + 0.1 * w):
        assert (near.error(best) <= near.error(other) + 1e-3 * near.var + 1e-5).all()
    extra = near.error(best) - f.error(best)
    assert (extra >= -1e-4 * (1 + f.var)).all()  # the distance to w, times a positive number


def test_near_grows_until_there_is_an_inverse():
    f = Moments()
    f.add(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))
    f = f.quadratic()
    # no covariance: an eigenvalue of -.05 beside a mean variance of 1
    f = f._replace(h=torch.diag(torch.tensor([1.05, 2.0, -0.05]))[None])
    w = torch.ones(1, 2, 3)
    assert f.near(w, 1e-3).solve().isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError):
        f.solve()


def test_inputs_and_outputs_are_those_of_a_smaller_layer():
    x, y, w = torch.randn(2, 5, 40), torch.randn(2, 3, 40), torch.randn(2, 3, 5)
    whole = Moments()
    whole.add(x, y)
    part = Moments()
    part.add(x[:, [0, 3]], y[:, 1:])
    mask = torch.tensor([True, False, False, True, False])
    found = whole.quadratic().inputs(mask).outputs([1, 2])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, part.quadratic()))
    assert torch.allclose(
        found.error(w[:, 1:, mask]), part.quadratic().error(w[:, 1:, mask]), atol=1e-4
    )


class Tokens(nn.Module):
    "Two linear layers on tokens, the second beside a shortcut"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        x = self.a(x)
        return x + self.b(x)


def test_a_layer_makes_up_for_its_shortcut():
    torch.manual_seed(0)
    exact, changed = trace(Tokens()), trace(Tokens())
    changed.load_state_dict(exact.state_dict())
    changed.a.weight.data += 0.1
    x = torch.randn(8, 5, 4)
    for stop in lockstep(exact, changed, [x], ["b"]):
        plain = layer_quadratic(stop)
        asked = layer_quadratic(stop, lack=lambda t: t)
    with torch.no_grad():
        y = exact.b(exact.a(x)).flatten(0, 1)
        lack = (exact.a(x) - changed.a(x)).flatten(0, 1)
        seen = changed.a(x).flatten(0, 1)
    for f, wanted in ((plain, y), (asked, y + lack)):
        e = seen @ exact.b.weight.detach().T - wanted
        error = f.error(exact.b.weight.detach()[None])
        assert torch.allclose(error[0], e.var(0, unbiased=False), rtol=1e-2, atol=1e-5)


def test_a_layer_with_fewer_outputs():
    exact, changed = (nn.Sequential(nn.Conv2d(3, n, 3)) for n in (4, 2))
    stays = torch.tensor([True, False, True, False])
    x = torch.randn(2, 3, 6, 6)
    whole, part = (
        layer_quadratic(stop, changed=new, stays=mask)
        for stop in lockstep(trace(exact), trace(exact), [x], ["0"])
        for new, mask in ((None, None), (changed[0], stays))
    )
    assert all(torch.allclose(a, b) for a, b in zip(part, whole.outputs(stays)))


def test_weights_that_are_no_numbers_are_named():
    net = small_mobilenet(10)
    check_weights(net)
    name, p = list(net.named_parameters())[3]
    p.data.view(-1)[0] = float("inf")
    assert nonfinite(net.state_dict().items()) == [name]
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        check_weights(net)
