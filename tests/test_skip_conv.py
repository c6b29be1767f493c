"""Skip-convolutions: open gates are the original network, the reference never lies, nothing
drifts; gates, tuning, bad input, save and load."""

import copy
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mep.conditional.dynamic_conv import locator, ready
from mep.conditional.skip_conv import (
    GumbelGate,
    NormGate,
    SkipConv2d,
    frame_by_frame,
    moving_objects,
    reached,
    scene_cut,
    skip_convert,
    train_gates,
    tune,
    work,
)
from mep.train import small_mobilenet, small_resnet


def forall(*strategies):
    return lambda test: settings(deadline=None, max_examples=40)(given(*strategies)(test))


@st.composite
def layers(draw):
    "A convolution of any kind, and a clip in which a little square changes in each frame"
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = nn.Conv2d(
        4,
        4 * draw(st.integers(1, 2)),
        kernel,
        draw(st.integers(1, 3)),
        draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 4])),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(9, 14)), draw(st.integers(9, 14))
    clip = torch.randn(n, 1, 4, h, w).repeat(1, 5, 1, 1, 1)
    for t in range(1, 5):
        top, left = torch.randint(h - 2, ()), torch.randint(w - 2, ())
        clip[torch.arange(n) % 2 == t % 2, t:, :, top : top + 2, left : left + 2] += torch.randn(
            4, 2, 2
        )
    return conv, clip


def close(a, b, eps=1e-4):
    assert a.shape == b.shape
    assert torch.allclose(a, b, atol=eps), f"{(a - b).abs().max():.2g} apart"


@torch.no_grad()
def play(net, clip):
    return torch.stack([net(f) for f in clip.unbind(1)], 1)


def film(n=2, frames=5, size=32):
    "Noise that stands still, and a square that moves"
    clip = torch.randn(n, 1, 3, size, size, generator=torch.Generator().manual_seed(0)).repeat(
        1, frames, 1, 1, 1
    )
    for t in range(frames):
        clip[:, t, :, 8:14, 3 * t : 3 * t + 6] += 2
    return clip


# One layer


@forall(layers(), st.sampled_from([0, 1, 2, 4, None]), st.sampled_from([1, 2, 4]))
def test_threshold_zero_is_the_layer_frame_by_frame(layer, tile, block):
    conv, clip = layer
    skip, before = (
        SkipConv2d(conv, NormGate(0.0, block), tile=tile, refresh=1.0).eval(),
        clip.clone(),
    )
    close(play(skip, clip), play(conv, clip))
    assert torch.equal(clip, before)


@forall(layers(), st.floats(0.01, 2.0), st.sampled_from([1, 2]))
def test_the_output_is_always_the_layer_of_the_reference(layer, eps, block):
    conv, clip = layer
    skip = SkipConv2d(conv, NormGate(eps, block, window=1), refresh=1.0).eval()
    for frame in clip.unbind(1):
        with torch.no_grad():
            out, reference = skip(frame), skip.memory.reference
            close(out, conv(reference))
        assert (frame - reference).abs().mean(1).max() <= eps + 1e-5


@forall(layers(), st.floats(0.1, 1.0))
def test_training_and_evaluation_agree(layer, eps):
    conv, clip = layer
    a, b = SkipConv2d(conv, NormGate(eps)).eval(), SkipConv2d(conv, NormGate(eps)).train()
    close(play(a, clip), play(b, clip))
    close(torch.stack(a.shares), torch.stack(b.shares))


@forall(layers())
def test_reached_is_what_a_change_changes(layer):
    conv, clip = layer
    with torch.no_grad():
        nn.init.uniform_(conv.weight, 0.5, 1.0)
    x, moved = clip[:, 0], torch.zeros(len(clip), 1, *clip.shape[3:])
    moved[:, :, 4, 5] = 1
    with torch.no_grad():
        changed = ((conv(x + 10 * moved) - conv(x)).abs() > 1e-3).any(1, keepdim=True)
    assert torch.equal(reached(moved, conv) > 0, changed)


def test_what_comes_out_may_be_written_into():
    skip, x = (
        SkipConv2d(nn.Conv2d(2, 2, 3, padding=1), NormGate(0.0)).eval(),
        torch.randn(1, 2, 8, 8),
    )
    with torch.no_grad():
        for t in range(4):
            x[:, :, t, t] += 1
            out = skip(x)
            close(out, skip.conv(x))
            out.zero_()
            x.mul_(1.0)
        close(skip(x), skip.conv(x))


def test_slow_change_is_followed():
    skip = SkipConv2d(nn.Conv2d(1, 1, 3, padding=1), NormGate(0.1)).eval()
    for t in range(100):
        x = torch.full((1, 1, 9, 9), 0.03 * t)
        with torch.no_grad():
            skip(x)
        assert (skip.memory.reference - x).abs().max() <= 0.2  # a corner's window is half outside


def test_no_drift_in_a_thousand_frames():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1)
    for eps in (0.0, 0.3):
        skip, x = SkipConv2d(conv, NormGate(eps), refresh=1.0).eval(), torch.randn(1, 4, 12, 12)
        with torch.no_grad():
            for t in range(1000):
                x[:, :, t % 10 : t % 10 + 3, t % 7 : t % 7 + 3] = torch.randn(4, 3, 3)
                out = skip(x)
            close(out, conv(skip.memory.reference), 1e-5)
            if eps == 0:
                close(out, conv(x), 1e-5)


def test_refresh_is_per_picture():
    skip = SkipConv2d(nn.Conv2d(1, 1, 1), NormGate(1.0), refresh=0.5).eval()
    a = torch.zeros(2, 1, 8, 8)
    b = a.clone()
    b[0] += 0.5
    b[1, :, :6] += 5
    b[1, :, 6:] += 0.5
    with torch.no_grad():
        skip(a)
        out = skip(b)
    close(out[1], skip.conv(b[1:])[0])  # a cut: even what moved a little is new
    close(out[0], skip.conv(a[:1])[0])  # below the threshold: nothing
    assert skip.shares[-1] == 0.5


def test_scene_cut_is_neither_noise_nor_an_object_nor_a_flash_of_nothing():
    x, _ = moving_objects(3, 2, noise=0.05)
    assert not scene_cut(x[:, 1], x[:, 0]).any() and scene_cut(2 - x[:, 1], x[:, 0]).all()
    flat = torch.zeros(1, 3, 16, 16)
    assert not scene_cut(flat, flat).any() and scene_cut(flat, flat + 1).all()
    assert scene_cut(flat[:0], flat[:0]).shape == (0, 1, 1, 1)


# Gates


def test_gates():
    r = torch.zeros(1, 4, 9, 10)
    r[0, :, 3, 9] = 1
    assert NormGate(0.1)(r).sum() == 6 and NormGate(0.1, 4)(r).shape == (1, 1, 9, 10)
    for block in (1, 2, 4):
        assert torch.equal(GumbelGate(4, 0.05, block).eval()(r), NormGate(0.05, block)(r))
    assert not NormGate(0.0)(torch.zeros(1, 4, 5, 5)).any()


@pytest.mark.parametrize("eps", [-1.0, math.nan])
def test_thresholds_that_are_none(eps):
    with pytest.raises(ValueError, match="0 or more"):
        NormGate(eps)
    with pytest.raises(ValueError, match="above 0"):
        GumbelGate(3, eps)
    with pytest.raises(ValueError, match="0 or more"):
        skip_convert(locator(8, 1), eps)


# Networks


@pytest.mark.parametrize(
    "net",
    [
        small_resnet(4, width=8),
        small_mobilenet(4, width=0.5),
        locator(8, 2),
        torchvision.models.resnet18(weights=None, num_classes=4),
        torchvision.models.mobilenet_v3_small(weights=None, num_classes=4),
    ],
    ids=lambda n: type(n).__name__,
)
@pytest.mark.parametrize("block", [1, 4])
def test_threshold_zero_is_the_network_frame_by_frame(net, block):
    net.eval()
    before, clip = copy.deepcopy(net.state_dict()), film(size=64)
    video, want = skip_convert(net, 0.0, block=block).eval(), play(net, clip)
    with torch.no_grad():
        close(video(clip) / want.abs().max(), want / want.abs().max())
    close(play(video.reset(), clip), want * 1.0, 1e-4 * max(1, want.abs().max().item()))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    close(
        frame_by_frame(skip_convert(net, 0.5), clip), want, 1e-4 * max(1, want.abs().max().item())
    )


def test_folded_networks_may_add_in_place():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            y = self.a(x)
            y += x
            return torch.relu_(self.b(torch.relu_(y)))

    net, clip = Adds().eval(), film()
    close(play(skip_convert(net, 0.0), clip.clone()), play(net, clip.clone()))


def test_a_clip_and_its_frames_are_the_same_and_do_not_mix():
    net, clip = skip_convert(locator(8, 2).eval(), 0.2), film()
    with torch.no_grad():
        whole = net(clip)
    close(play(net.reset(), clip), whole)
    with torch.no_grad():
        net(torch.randn_like(clip))
        close(net(clip), whole)  # clips begin by themselves
        for i in range(2):
            close(net(clip[i : i + 1]), whole[i : i + 1])  # nor do the clips of a batch


def test_less_work_with_higher_thresholds():
    net, clip = locator(8, 2).eval(), film()
    done = []
    for eps in (0.0, 0.05, 0.3, 100.0):
        video = skip_convert(net, eps)
        with torch.no_grad():
            video(clip)
        done.append(work(video).item())
    assert done == sorted(done, reverse=True) and done[-1] == pytest.approx(1 / 5)


def test_learned_gates_count():
    video = skip_convert(locator(8, 1).eval(), 1e6, gate="gumbel")
    with torch.no_grad():
        video(film())
    assert work(video) > 1 / 5


def test_scene_cut_equals_a_new_clip():
    net, (a, b) = skip_convert(locator(8, 2).eval(), 0.1), moving_objects(2, 4)[0].split(1)
    with torch.no_grad():
        joined = net(torch.cat([a, 3 - 2 * b], 1))
        both = net(torch.cat([torch.cat([a, 3 - 2 * b], 1), torch.cat([a, a], 1)]))
    close(joined[:, 4], frame_by_frame(net, 3 - 2 * b)[:, 0])
    close(both[:1], joined)  # the other clip of the batch goes on as if nothing had happened
    assert all(m.shares[4] < 1 for m in net.layers().values())


def test_bad_frames_are_named_and_do_no_harm():
    net, clip = skip_convert(locator(8, 1).eval(), 0.0), film()
    with torch.no_grad():
        net.reset()(clip[:, 0])
        with pytest.raises(ValueError, match="frame 1 of the clip holds NaN"):
            net(clip[:, 1] * math.nan)
        with pytest.raises(
            ValueError,
            match=r"0: the clip so far has shape \[2, 3, 32, 32\], this frame \[2, 3, 32, 28\].*reset",
        ):
            net(clip[:, 1, ..., :28])
        with pytest.raises(ValueError, match="shape"):
            net(clip[:1, 1])
        with pytest.raises(ValueError, match="dtype"):
            net(clip[:, 1].double())
        close(net(clip[:, 1]), frame_by_frame(net, clip)[:, 1])


def test_weights_that_change_in_a_clip_are_refused():
    net, clip = skip_convert(locator(8, 1).eval(), 0.0), film()
    with torch.no_grad():
        net.reset()(clip[:, 0])
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    with torch.no_grad(), pytest.raises(ValueError, match="weights changed"):
        net(clip[:, 1])
    with torch.no_grad():
        net.reset()(clip[:, 1])


def test_networks_that_cannot_be_converted():
    up = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 2))
    with pytest.raises(ValueError, match="1 is ConvTranspose2d.*skip"):
        skip_convert(up)
    with torch.no_grad():
        close(play(skip_convert(up, 0.0, skip=["1"]).eval(), film()), play(up, film()))
    with pytest.raises(ValueError, match="does not have, did you mean 'conv1'"):
        skip_convert(torchvision.models.resnet18(), skip=["convl"])
    with pytest.raises(ValueError, match="eps names 'convl'"):
        skip_convert(torchvision.models.resnet18(), dict(convl=0.1))
    with pytest.raises(ValueError, match="no entry for '1'"):
        skip_convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), {"0": 0.1})
    with pytest.raises(ValueError, match="no nn.Conv2d"):
        skip_convert(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="'norm' or 'gumbel'"):
        skip_convert(locator(8, 1), gate="max")
    with pytest.raises(ValueError, match="block must be"):
        skip_convert(locator(8, 1), block=0)
    with pytest.raises(ValueError, match="refresh is a share"):
        skip_convert(locator(8, 1), refresh=0.0)
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        SkipConv2d(nn.ConvTranspose2d(3, 3, 2), NormGate())
    shared = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match="one module under the names"):
        skip_convert(nn.Sequential(shared, nn.ReLU(), shared))


def test_a_layer_that_runs_twice_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    with pytest.raises(ValueError, match="conv runs twice in a frame"):
        play(skip_convert(Twice()), film())


def test_empty_batch_and_clip_of_one_frame():
    net = skip_convert(locator(8, 1).eval(), 0.1)
    with torch.no_grad():
        assert net(torch.zeros(0, 3, 3, 32, 32)).shape == (0, 3, 3, 8, 8)
        assert net(film(frames=1)).shape == (2, 1, 3, 8, 8) and work(net) == 1
    with pytest.raises(ValueError, match="no frame"):
        work(net.reset())


def test_save_and_load_and_copies_begin_anew(tmp_path):
    net, clip = skip_convert(locator(8, 1).eval(), 0.1, gate="gumbel"), film()
    with torch.no_grad():
        want = net(clip)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = skip_convert(locator(8, 1, seed=3).eval(), 0.5, gate="gumbel")
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    with torch.no_grad():
        close(other(clip), want)
    assert all(m.memory is None for m in copy.deepcopy(net).layers().values())


# Tuning and training


def test_tune_keeps_the_budget_and_beats_one_threshold():
    torch.manual_seed(0)
    net, clips = skip_convert(ready(locator(8, 2)), 0.1), moving_objects(1, 5)[0]
    exact, done = frame_by_frame(net, clips), []
    for rounds in (0, 1):
        tuned = tune(net, clips, 0.01, rounds=rounds)
        with torch.no_grad():
            z = tuned(clips)
        assert (z - exact).square().sum() / exact.square().sum() <= 0.01 * 1.001
        done.append(work(tuned).item())
    assert done[1] <= done[0] + 1e-3
    assert all(m.gate.eps == 0.1 for m in net.layers().values())


def test_tune_and_train_refuse():
    net, learned = skip_convert(locator(8, 1), 0.1), skip_convert(locator(8, 1), 0.1, gate="gumbel")
    with pytest.raises(ValueError, match="nothing to calibrate"):
        tune(net, torch.zeros(0, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="budget must be positive"):
        tune(net, film(), 0.0)
    with pytest.raises(TypeError, match="only norm gates"):
        tune(learned, film())
    with pytest.raises(TypeError, match="no GumbelGate"):
        train_gates(net, film())
    with pytest.raises(ValueError, match="cost -1"):
        train_gates(learned, film(), -1)


def test_training_changes_gates_only_and_saves_work():
    torch.manual_seed(0)
    clips = moving_objects(4, 4, seed=1)[0]
    net = skip_convert(ready(locator(8, 1)), 0.1, gate="gumbel")
    trained = train_gates(net, clips, cost=10.0, epochs=6, lr=0.3)
    with torch.no_grad():
        net(clips)
        trained(clips)
    assert work(trained) < work(net)
    for (name, a), b in zip(net.state_dict().items(), trained.state_dict().values()):
        assert torch.equal(a, b) != ("gate" in name), name


def test_clips_are_reproducible():
    (x, y), (a, b) = moving_objects(2, 3, seed=4), moving_objects(2, 3, seed=4)
    assert (
        torch.equal(x, a)
        and torch.equal(y, b)
        and x.shape == (2, 3, 3, 96, 96)
        and y.shape == (2, 3, 24, 24)
    )
    assert not torch.equal(y[:, 0], y[:, 2])
