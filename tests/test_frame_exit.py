"""FrameExit: frame order, early leaving equal to all exits, gates and their labels, bad clips,
ONNX cascade."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mep.conditional.frame_exit import (
    Cascade,
    FrameExit,
    Seen,
    clip_times,
    exit_labels,
    exits_loss,
    export_cascade,
    frame_order,
    replay,
    sweep,
    sweep_confidence,
    train_exits,
    train_gates,
    watch,
)


def forall(*strategies):
    return lambda test: settings(deadline=None, max_examples=25)(given(*strategies)(test))


def backbone(features=6):
    return nn.Sequential(
        nn.Conv2d(3, features, 3, 2),
        nn.BatchNorm2d(features),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@torch.no_grad()
def net(n_frames=4, seed=0, sees="features"):
    "A network at whose gates about half of the clips leave"
    torch.manual_seed(seed)
    model = FrameExit(backbone(), 5, n_frames, (3, 8, 8), (8, 4), sees, seed=seed).eval()
    for c in model.classifiers:
        c.weight *= 10  # answers that differ
    z = model.features(clips(50, n_frames, 1))
    logits = model.gates(model.evidence(z, torch.stack(model.classify(z), 1)))
    for decide, column in zip(model.gates.decide, logits.T):
        decide.weight /= column.std() + 1e-6
        decide.bias.copy_((decide.bias - column.mean()) / (column.std() + 1e-6))
    return model


def clips(n=9, n_frames=4, seed=0):
    return torch.randn(n, n_frames, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def loader(n=48, n_frames=4, size=16):
    "Clips whose class shows in one frame only"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, n_frames, 3, 8, 8, generator=g) * 0.3, torch.arange(n) % 3
    for i in range(n):
        x[i, torch.randint(n_frames, (), generator=g), y[i]] += 2
    return DataLoader(TensorDataset(x, y), size)


# The order


@forall(st.integers(1, 200))
def test_order_is_a_permutation_and_coarse_to_fine(n):
    order = frame_order(n)
    assert sorted(order) == list(range(n)) and order[0] == n // 2
    if n > 3:
        gaps = [max(np.diff(sorted(order[:k]))) for k in range(3, n + 1)]
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] == 1


def test_the_papers_order():
    assert frame_order(10) == [5, 0, 9, 2, 7, 4, 6, 3, 8, 1]
    for n in (0, -1):
        with pytest.raises(ValueError, match="at least one frame"):
            frame_order(n)


# Leaving early


@forall(
    st.integers(1, 6),
    st.floats(0, 1),
    st.sampled_from(["gate", "confidence"]),
    st.sampled_from(["features", "answer"]),
    st.integers(0, 2**16),
)
def test_predict_is_the_exit_where_the_clip_leaves(n_frames, threshold, by, sees, seed):
    model, x = net(n_frames, seed, sees), clips(9, n_frames, seed)
    out = model.predict(x, threshold, by)
    with torch.no_grad():
        exits = torch.stack(model(x))
    assert torch.allclose(out.logits, exits[out.frames - 1, torch.arange(9)], atol=1e-5)
    again = replay(model, watch(model, [(x, torch.zeros(9, dtype=torch.long))]), threshold, by)
    assert (
        (again.frames == out.frames).float().mean() > 0.85
        and 1 <= out.frames.min() <= out.frames.max() <= n_frames
    )  # a score on the threshold may round either way


def test_clips_do_not_depend_on_the_batch():
    model, x = net(), clips()
    whole, one = model.predict(x), [model.predict(c[None]) for c in x]
    assert whole.frames.tolist() == [o.frames.item() for o in one] and torch.allclose(
        whole.logits, torch.cat([o.logits for o in one]), atol=1e-5
    )
    assert len(set(whole.frames.tolist())) > 1


def test_frames_of_clips_that_left_are_not_computed():
    model, x = net(), clips()
    seen, hook = [], None
    hook = model.backbone.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    frames = model.predict(x).frames
    hook.remove()
    assert seen == [int((frames > t).sum()) for t in range(int(frames.max()))]


def test_all_leave_at_once_or_none():
    model, x = net(), clips()
    for by in ("gate", "confidence"):
        assert (
            model.predict(x, 0.0, by).frames.tolist() == [1] * 9
            and model.predict(x, 1.0, by).frames.tolist() == [4] * 9
        )
    model.gates.decide[0].bias.data.fill_(1e4)  # a gate that is sure to float precision
    assert (
        model.predict(x, 1.0).frames.tolist() == [4] * 9
        and model.predict(x, 0.999).frames.tolist() == [1] * 9
    )


def test_one_frame_and_an_empty_batch():
    model = net(1)
    assert model.predict(clips(3, 1)).frames.tolist() == [1] * 3
    seen = watch(model, [(clips(3, 1), torch.zeros(3, dtype=torch.long))])
    assert replay(train_gates(model, seen, 0.1), seen).frames.tolist() == [1] * 3
    out = net().predict(clips(0))
    assert out.logits.shape == (0, 5) and out.frames.shape == (0,)


def test_features_may_be_negative():
    torch.manual_seed(0)
    model = FrameExit(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 5, 3, (3, 8, 8)).eval()
    x = clips(5, 3)
    with torch.no_grad():
        assert torch.allclose(model.predict(x, 1.0).logits, model(x)[-1], atol=1e-5)
    assert (model.features(x) < 0).any()


def test_input_is_unchanged_and_modes_stay():
    base = backbone().eval()
    before = copy.deepcopy(base.state_dict())
    model = FrameExit(base, 5, 4, (3, 8, 8)).train()
    model.predict(clips())
    assert (
        model.training
        and model.gates.training
        and all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    )


def test_same_seed_same_weights_and_a_head_to_start_from():
    a, b = (FrameExit(nn.Flatten(), 5, 3, (3, 8, 8), seed=3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    head = nn.Linear(192, 5)
    assert all(
        torch.equal(c.weight, head.weight)
        for c in FrameExit(nn.Flatten(), 5, 3, (3, 8, 8), head=head).classifiers
    )


# Bad input


def with_nan(frame, clip):
    x = clips()
    x[clip, frame, 0, 0, 0] = torch.nan
    return x


@pytest.mark.parametrize(
    "x, text",
    [
        (clips(n_frames=3), "3 frames, the network was made for 4"),
        (clips(n_frames=5), "n_frames=5"),
        (clips()[0], "one clip is x[None]"),
        (clips()[0, 0], "clips must be"),
        ([*clips().unbind(1)[:3], torch.zeros(9, 3, 6, 6)], "frame 3 is [9, 3, 6, 6]"),
        ([*clips().unbind(1)[:3], torch.zeros(8, 3, 8, 8)], "frame 3 is [8, 3, 8, 8]"),
        (torch.zeros(2, 4, 1, 8, 8), "frame 0 is [2, 1, 8, 8]"),
        (with_nan(2, 0), "frame 2 of clip 0 holds NaN"),
        (with_nan(3, 7), "frame 3 of clip 7 holds NaN"),
    ],
)
def test_bad_clips(x, text):
    with pytest.raises(ValueError) as e:
        net().predict(x, 1.0)
    assert text in str(e.value)


def test_nan_is_named_among_the_clips_that_are_left():
    model = net()
    frames = model.predict(clips()).frames
    late = int((frames > 1).nonzero()[-1])
    with pytest.raises(ValueError, match=f"frame {model.order[1]} of clip {late}"):
        model.predict(with_nan(model.order[1], late))
    gone = int((frames == 1).nonzero()[0])
    assert torch.equal(
        model.predict(with_nan(model.order[1], gone)).frames, frames
    )  # never looked at


def test_a_list_of_frames_is_a_clip():
    assert torch.equal(net().predict(list(clips().unbind(1))).logits, net().predict(clips()).logits)


@pytest.mark.parametrize(
    "kw, text",
    [
        (dict(threshold=-0.1), "in [0, 1]"),
        (dict(threshold=1.1), "in [0, 1]"),
        (dict(threshold=float("nan")), "in [0, 1]"),
        (dict(by="entropy"), "'confidence'"),
    ],
)
def test_bad_rules(kw, text):
    seen = watch(net(), [(clips(), torch.zeros(9, dtype=torch.long))])
    for f in (lambda: net().predict(clips(), **kw), lambda: replay(net(), seen, **kw)):
        with pytest.raises(ValueError) as e:
            f()
        assert text in str(e.value)


def test_bad_networks():
    with pytest.raises(ValueError, match="AdaptiveAvgPool2d"):
        FrameExit(nn.Conv2d(3, 4, 3), 5, 4, (3, 8, 8))
    with pytest.raises(ValueError, match="at least one frame"):
        FrameExit(nn.Flatten(), 5, 0, (3, 8, 8))
    with pytest.raises(ValueError, match="no clips"):
        watch(net(), [])
    with pytest.raises(ValueError, match="below 0"):
        exit_labels(torch.ones(2, 3), -1.0)
    with pytest.raises(ValueError, match="below 0"):
        exit_labels(torch.ones(2, 3), float("nan"))
    with pytest.raises(ValueError, match="finite"):
        exit_labels(torch.ones(2, 3), 0.1, float("inf"))
    with pytest.raises(ValueError, match="'features' or 'answer'"):
        FrameExit(nn.Flatten(), 5, 4, (3, 8, 8), sees="pixels")


# Training


@forall(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**16))
def test_labels_grow_with_the_price_and_the_frames(a, b, growth, seed):
    losses, (a, b) = (
        torch.rand(20, 6, generator=torch.Generator().manual_seed(seed)) * 5,
        sorted((a, b)),
    )
    few, many = exit_labels(losses, a, growth), exit_labels(losses, b, growth)
    assert (few <= many).all() and (exit_labels(losses, a, 0) <= few).all()
    flat = exit_labels(losses[:, :1].expand(-1, 6), a, growth)
    assert (flat[:, 1:] >= flat[:, :-1]).all()


def test_training_touches_what_it_should():
    model, data = net(), loader()
    trained = train_exits(model, (data, None), 2, lr=0.05, progress=False, device="cpu").model
    same = lambda part: all(
        torch.equal(a, b)
        for a, b in zip(
            getattr(model, part).state_dict().values(), getattr(trained, part).state_dict().values()
        )
    )
    assert (
        same("gates")
        and not same("backbone")
        and not same("classifiers")
        and all(p.requires_grad for p in trained.parameters())
    )
    gated = train_gates(trained, watch(trained, data), 0.1, epochs=2)
    for part in ("backbone", "classifiers"):
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                getattr(gated, part).state_dict().values(),
                getattr(trained, part).state_dict().values(),
            )
        )
    assert not torch.equal(gated.gates.decide[0].weight, trained.gates.decide[0].weight)


def test_gates_may_look_at_the_answer_instead():
    model, data = net(), loader()
    seen = watch(model, data)
    gated = train_gates(model, seen, 0.5, growth=0, sees="answer", epochs=2)
    assert (model.sees, gated.sees) == ("features", "answer") and gated.gates.look[0][
        0
    ].in_features == 5
    assert torch.equal(
        gated.evidence(seen.z, seen.logits),
        seen.logits.softmax(-1).sort(-1, descending=True).values,
    )
    assert train_gates(gated, seen, 0.5, epochs=1).sees == "answer"  # None keeps it
    with pytest.raises(ValueError, match="'features' or 'answer'"):
        train_gates(model, seen, sees="pixels")


def test_a_backbone_in_eval_mode_is_trained():
    model = FrameExit(backbone().eval(), 3, 4, (3, 8, 8))
    trained = train_exits(model, (loader(), None), 1, progress=False, device="cpu").model
    assert not torch.equal(trained.backbone[1].running_mean, model.backbone[1].running_mean)


def test_learns_and_a_higher_price_means_fewer_frames():
    model = train_exits(
        FrameExit(backbone(), 3, 4, (3, 8, 8)),
        (loader(240), None),
        20,
        progress=False,
        device="cpu",
    ).model
    seen = watch(model, loader(240))
    points = sweep(model, seen, seen, (1e-3, 0.05, 10.0), epochs=30)
    assert points[0].frames >= points[1].frames >= points[2].frames and points[-1].frames < 1.5
    assert points[1].accuracy > 0.8 and points[1].frames < 3.5
    plain = sweep_confidence(model, seen, (0.0, 0.9, 1.0))
    assert plain[0].frames == 1 and plain[2].frames == 4


def test_losses_are_cross_entropy():
    seen = watch(net(), [(clips(), torch.arange(9) % 5)])
    assert torch.allclose(
        seen.losses.mean(), exits_loss(seen.logits.unbind(1), seen.y), atol=1e-5
    ) and isinstance(seen, Seen)


# Files


@pytest.mark.parametrize(
    "n_frames, sees", [(1, "features"), (1, "answer"), (4, "features"), (4, "answer")]
)
def test_cascade_agrees_with_torch(tmp_path, n_frames, sees):
    model, x = net(n_frames, sees=sees), clips(n_frames=n_frames)
    cascade = Cascade(export_cascade(model, tmp_path))
    for rule in (dict(), dict(threshold=0.25, by="confidence")):
        want = model.predict(x, **rule)
        for i, clip in enumerate(x.numpy()):
            logits, frames = cascade.predict(clip, **rule)
            assert frames == want.frames[i] and np.allclose(logits, want.logits[i], atol=1e-4)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        cascade.predict(x[0].numpy(), 2.0)
    for i, clip in enumerate(x.numpy()):
        assert np.allclose(cascade.all_frames(clip), model(x)[-1][i].detach(), atol=1e-4)


def test_clip_times(tmp_path):
    model, x = net(), clips()
    t = clip_times(Cascade(export_cascade(model, tmp_path)), x.numpy())
    assert (
        t.frames.tolist() == model.predict(x).frames.tolist()
        and (t.exit_ms > 0).all()
        and (t.all_ms > 0).all()
        and t.speedup > 0
    )


def test_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = train_exits(net().cuda(), (loader(), None), 1, progress=False).model
    assert model.predict(clips().cuda()).logits.is_cuda and len(watch(model, loader()).y) == 48
