"""Moments: the quadratic is the error, patches are what layers see, whole networks, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.moments import (
    Moments,
    image_batches,
    observe,
    output_size,
    outputs_at,
    patches,
    positions,
    rows,
)
from mep.train import small_mobilenet

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
