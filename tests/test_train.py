"""The training loop: inputs left alone, runs that repeat and resume, errors that say what to do."""

import copy
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mep import train as T
from mep.train import NanError, accuracy, fit, logits, progress_bar


def toy(n=192, classes=4, size=8, batch=32, seed=0, **kw):
    "Blobs in one of four corners: easy, quick, shuffled by a generator of its own."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    x = torch.randn(n, 3, size, size, generator=g)
    for i, c in enumerate(y.tolist()):
        x[i, :, (c // 2) * 4 : (c // 2) * 4 + 4, (c % 2) * 4 : (c % 2) * 4 + 4] += 1
    return DataLoader(
        TensorDataset(x, y),
        batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        **kw,
    )


def net(classes=4, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


quick = dict(epochs=2, progress=False, device="cpu", lr=0.05)


# ---- what fit promises


def test_learns_and_leaves_the_input_alone():
    model, loader = net(), toy()
    before = copy.deepcopy(model.state_dict())
    done = fit(model, (loader, loader), **quick | dict(epochs=5))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not done.model.training and done.history[-1]["acc"] == accuracy(done.model, loader) > 0.9
    assert [h["epoch"] for h in done.history] == [1, 2, 3, 4, 5] and set(done.history[0]) == {
        "epoch",
        "loss",
        "acc",
        "lr",
        "seconds",
    }


def test_same_seed_same_bits_other_seed_other_bits():
    a, b, c = (fit(net(dropout=0.3), toy(), **quick | dict(seed=s)).model for s in (0, 0, 1))
    assert same(a, b) and not same(a, c)


def test_global_generators_are_left_alone():
    import random

    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    want = torch.rand(3), np.random.rand(3), random.random()
    model, loader = net(dropout=0.3), toy()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    fit(model, loader, **quick)
    got = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(want[0], got[0]) and (want[1] == got[1]).all() and want[2] == got[2]


def test_teacher_is_left_alone_and_distils():
    loader = toy()
    teacher = fit(net(seed=1), loader, **quick | dict(epochs=5)).model.train()
    before = copy.deepcopy(teacher.state_dict())
    done = fit(
        net(), (loader, loader), teacher=teacher, temperature=2, alpha=1.0, **quick | dict(epochs=5)
    )
    assert (
        all(torch.equal(before[k], v) for k, v in teacher.state_dict().items()) and teacher.training
    )
    x = loader.dataset.tensors[0]
    assert T.agreement(logits(done.model, x)[0], logits(teacher, x)[0]) > 0.8


def test_feature_losses_bring_layers_together():
    loader, teacher = toy(), net(seed=1)

    def distance(m):
        x = next(iter(loader))[0]
        with (
            T.evaluating(m),
            T.evaluating(teacher),
            T.tap(m, ["2"]) as a,
            T.tap(teacher, ["2"]) as b,
        ):
            m(x)
            teacher(x)
        return T.feature_loss(a["2"], b["2"]).item()

    kw = quick | dict(epochs=6, teacher=teacher)
    assert distance(
        fit(net(), loader, features={"2": "2"}, feature_weight=10, **kw).model
    ) < 0.7 * distance(fit(net(), loader, **kw).model)


def test_frozen_parameters_and_parts_in_eval_mode_stay():
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    done = fit(model, toy(), **quick).model
    assert (
        torch.equal(done[0].weight, model[0].weight)
        and not done[0].weight.requires_grad
        and done[6].weight.requires_grad
    )
    assert torch.equal(done[1].running_mean, model[1].running_mean) and not torch.equal(
        done[6].weight, model[6].weight
    )


def test_a_model_in_eval_mode_is_trained_and_stays_in_eval_mode():
    model = net().eval()
    done = fit(model, toy(), **quick).model
    assert not model.training and not torch.equal(done[1].running_mean, model[1].running_mean)


def test_a_left_over_sample_is_skipped_by_batch_norm():
    x, y = torch.randn(33, 5), torch.randint(4, (33,))
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    fit(model, DataLoader(TensorDataset(x, y), 32), **quick)


@pytest.mark.parametrize(
    "kw",
    [
        dict(optimizer="adamw", lr=1e-3),
        dict(ema=0.9),
        dict(clip=0.1),
        dict(label_smoothing=0.1),
        dict(amp="bf16"),
        dict(channels_last=False),
        dict(optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-3)),
        dict(penalty=lambda m: 1e-3 * m[6].weight.abs().sum()),
        dict(epochs=1, warmup=0),
        dict(schedule=lambda *a: 0.5),
    ],
)
def test_every_option_runs_and_repeats(kw):
    a, b = (fit(net(), toy(), **quick | kw).model for _ in range(2))
    assert same(a, b)


def test_a_loss_of_ones_own_and_several_heads():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(192, 4), nn.Linear(192, 4)

        def forward(self, x):
            return self.a(x.flatten(1)), self.b(x.flatten(1))

    loader = toy()
    done = fit(
        Heads(),
        (loader, loader),
        loss=lambda out, y: sum(nn.functional.cross_entropy(o, y) for o in out),
        **quick | dict(epochs=4),
    )
    assert done.history[-1]["acc"] > 0.8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", [None, "bf16", "fp16", False])
def test_mixed_precision_on_cuda(amp):
    loader = toy()
    done = fit(
        net(), (loader, loader), amp=amp, ema=0.9, clip=1.0, **quick | dict(epochs=5, device="cuda")
    )
    assert done.history[-1]["acc"] > 0.9 and next(done.model.parameters()).device.type == "cpu"


# ---- kill and resume

RUN = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
import torch
torch.set_num_threads(1)
from test_train import resumable
from mep import train as T
die, real, steps = int(sys.argv[1]), T._train_step, [0]
def step(*args):
    steps[0] += 1
    if steps[0] == die: os.kill(os.getpid(), signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    return real(*args)
T._train_step = step
resumable(sys.argv[2], OPTIONS)
"""
FOLDERS = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(T.__file__))]


def resumable(path, epochs=4, **kw):
    return fit(net(dropout=0.3), toy(), checkpoint=path, **quick | dict(epochs=epochs) | kw)


@pytest.fixture
def one_thread():
    "Bit-identical sums need the same number of threads in both processes."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


# 6 steps an epoch: killed in the second epoch; and again, in the second epoch after resuming
@pytest.mark.parametrize(
    "kills, kw", [(2, dict(ema=0.9)), (1, dict(optimizer="adamw", lr=1e-3, clip=1.0))]
)
def test_killed_and_resumed_is_uninterrupted(tmp_path, one_thread, kills, kw):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    for i in range(kills):
        done = subprocess.run(
            [sys.executable, "-c", RUN.replace("OPTIONS", f"**{kw}"), "9", str(broken), *FOLDERS],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode != 0 and not done.stderr
        assert len(T.load_artifact(broken)[1]["history"]) == i + 1
    a, b = resumable(whole, **kw), resumable(broken, **kw)
    assert same(a.model, b.model) and [h["loss"] for h in a.history] == [
        h["loss"] for h in b.history
    ]
    x, y = T.load_artifact(whole)[0], T.load_artifact(broken)[0]
    assert x.keys() == y.keys() and all(
        torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_at_any_moment_leaves_a_readable_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"
    p = subprocess.Popen(
        [
            sys.executable,
            "-c",
            RUN.replace("OPTIONS", "epochs=100000, ema=0.9"),
            "0",
            str(path),
            *FOLDERS,
        ]
    )
    try:
        end = time.time() + 300
        while not path.exists() and time.time() < end:
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert len(T.load_artifact(path)[1]["history"]) >= 1


def test_ctrl_c_keeps_the_last_epoch(tmp_path, monkeypatch):
    path, real = tmp_path / "run.safetensors", T._train_epoch
    whole = fit(net(), toy(), **quick | dict(epochs=3))

    def stop(run, loader, epoch, bar):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(run, loader, epoch, bar)

    monkeypatch.setattr(T, "_train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), toy(), checkpoint=path, **quick | dict(epochs=3))
    monkeypatch.setattr(T, "_train_epoch", real)
    again = fit(net(), toy(), checkpoint=path, **quick | dict(epochs=3))
    assert same(whole.model, again.model) and len(again.history) == 3


def test_a_finished_run_is_read_back(tmp_path):
    kw = quick | dict(checkpoint=tmp_path / "run.safetensors")
    a, b = fit(net(), toy(), **kw), fit(net(), toy(), **kw)
    assert same(a.model, b.model) and a.history == b.history


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lr=0.02), ["lr is 0.05 there and 0.02 here"]),
        (dict(epochs=3), ["epochs is 2 there and 3 here"]),
        (dict(ema=0.5), ["ema is None there and 0.5 here"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, words):
    kw = quick | dict(checkpoint=tmp_path / "run.safetensors")
    fit(net(), toy(), **kw)
    with pytest.raises(ValueError) as e:
        fit(net(), toy(), **kw | change)
    for w in words + ["run.safetensors", "resume=False"]:
        assert w in str(e.value)
    fit(net(), toy(), **kw | change, resume=False)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    kw = quick | dict(checkpoint=tmp_path / "run.safetensors")
    fit(net(), toy(), **kw)
    with pytest.raises(ValueError, match="starting weights"):
        fit(net(seed=1), toy(), **kw)
    with pytest.raises(ValueError, match="model is 'Sequential' there and 'Linear' here"):
        fit(nn.Linear(3, 3), toy(), **kw)
    with pytest.raises(ValueError, match="teacher"):
        fit(net(), toy(), teacher=net(seed=2), **kw)


class Pictures(torch.utils.data.Dataset):
    "Noise that is drawn when asked for, as a picture file is read; `also` can draw at random, too"

    def __init__(self, seed=0, labels=4, also=lambda x: x):
        self.seed = seed
        self.targets = [i % labels for i in range(400)]
        self.also = also

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(1000 * self.seed + i)
        return self.also(torch.randn(3, 8, 8, generator=g)), self.targets[i]


def repainted(loader):
    loader.dataset.tensors[0][5] *= -1
    return loader


def relabelled(loader):
    y = loader.dataset.tensors[1]
    y[0] = (y[0] + 1) % 4
    return loader


def in_memory(change=lambda loader: loader):
    return change(toy())


def in_batches(change=lambda loader: loader):
    return list(change(toy()))


@pytest.mark.parametrize("make", [in_memory, in_batches])
@pytest.mark.parametrize("change", [repainted, relabelled])
def test_a_checkpoint_of_other_data_is_refused(tmp_path, make, change):
    kw = quick | dict(checkpoint=tmp_path / "run.safetensors")
    done = fit(net(), make(), **kw)
    with pytest.raises(ValueError, match="training data is '.*' there and '.*' here"):
        fit(net(), make(change), **kw)
    assert same(fit(net(), make(), **kw).model, done.model)
    fit(net(), make(change), **kw, resume=False)


def pictures(**kw):
    return DataLoader(Pictures(**kw), 100, shuffle=True, generator=torch.Generator())


@pytest.mark.parametrize("also", [lambda x: x, lambda x: x + torch.rand(())])
def test_pictures_that_are_drawn_when_asked_for_are_told_by_some(tmp_path, also):
    kw = quick | dict(checkpoint=tmp_path / "run.safetensors")
    done = fit(net(), pictures(also=also), **kw)
    assert same(fit(net(), pictures(also=also), **kw).model, done.model)
    for other in (pictures(also=also, seed=1), pictures(also=also, labels=3)):
        with pytest.raises(ValueError, match="training data"):
            fit(net(), other, **kw)


def test_data_that_are_never_twice_the_same_are_told_by_their_labels(tmp_path):
    noise = np.random.default_rng(0)
    kw = quick | dict(checkpoint=tmp_path / "run.safetensors")

    def shaken(x):
        return x + noise.random(dtype=np.float32)

    done = fit(net(), pictures(also=shaken), **kw)
    assert same(fit(net(), pictures(also=shaken), **kw).model, done.model)
    with pytest.raises(ValueError, match="training data"):
        fit(net(), pictures(also=shaken, labels=3), **kw)


def test_picture_files_are_told_by_name_and_size(tmp_path):
    def told(folder, text):
        file = tmp_path / folder / "cat.png"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return T._held([(str(file), 0)])

    assert told("here", "abc") == told("there", "abc") == [[["cat.png", 3], 0]]
    assert told("here", "abcd") != told("there", "abc")


def test_what_tells_data_apart_asks_for_little(tmp_path):
    asked = []
    loader = pictures(also=lambda x: asked.append(1) or x)
    T._data_hash(loader, 0)
    assert 0 < len(asked) <= 70 < len(loader.dataset)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "run.safetensors"
    fit(net(), toy(), checkpoint=path, **quick)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(Exception, match="run.safetensors"):
        fit(net(), toy(), checkpoint=path, **quick)


# ---- numbers that are not finite


def test_nan_guard_names_epoch_batch_and_module(tmp_path):
    class Bomb(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += self.training
            return x / 0 if self.calls >= 9 else x

    model = net()
    model.insert(3, Bomb())
    path = tmp_path / "run.safetensors"
    with pytest.raises(
        NanError, match=r"epoch 2, batch 3.*output of '3' \(Bomb\).*run.safetensors holds epoch 1"
    ):
        fit(model, toy(), checkpoint=path, **quick)
    assert len(T.load_artifact(path)[1]["history"]) == 1


def test_nan_guard_names_the_parameter_and_the_batch():
    with pytest.raises(NanError, match="epoch 1, batch 2.*parameter '0.weight'"):
        fit(net(), toy(), **quick, optimizer=lambda m: torch.optim.SGD(m.parameters(), math.inf))
    x = torch.randn(8, 3, 8, 8)
    x[3, 0, 0, 0] = math.nan
    with pytest.raises(NanError, match="epoch 1, batch 1.*the batch itself"):
        fit(net(), [(x, torch.arange(8) % 4)], **quick | dict(warmup=0))
    with pytest.raises(NanError, match="the loss itself"):
        fit(net(), toy(), loss=lambda out, y: out.sum() * math.inf, **quick)


def test_nan_in_the_last_step_is_not_written(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(NanError, match="epoch 1, batch 1"):
        fit(
            net(),
            [next(iter(toy()))],
            checkpoint=path,
            **quick | dict(epochs=1, warmup=0),
            optimizer=lambda m: torch.optim.SGD(m.parameters(), math.inf),
        )
    assert not path.exists()


def test_nan_weights_are_refused():
    model = net()
    model[6].bias.data[0] = math.nan
    with pytest.raises(ValueError, match="6.bias"):
        fit(model, toy(), **quick)
    assert accuracy(model, toy()) == 0


# ---- bad input


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(epochs=0), "epochs=0"),
        (dict(epochs=1.5), "epochs=1.5"),
        (dict(lr=0), "lr=0"),
        (dict(lr=-1), "lr=-1"),
        (dict(warmup=2), "warmup=2"),
        (dict(label_smoothing=1), "label_smoothing=1"),
        (dict(temperature=0), "temperature=0"),
        (dict(alpha=2), "alpha=2"),
        (dict(clip=0), "clip=0"),
        (dict(ema=1), "ema=1"),
        (dict(optimizer="adam"), "'adam'.*sgd, adamw"),
        (dict(amp="int8"), "'int8'.*bf16"),
        (dict(features={"0": "0"}), "needs a teacher that"),
        (dict(loss=lambda out, y: out.sum(), label_smoothing=0.1), "label_smoothing=0.1"),
    ],
)
def test_bad_settings(kw, words):
    with pytest.raises(ValueError, match=words):
        fit(net(), toy(), **quick | kw)


def test_bad_data():
    with pytest.raises(ValueError, match="4 outputs.*0 to 6.*n_classes=7"):
        fit(net(), toy(classes=7, size=16), **quick)
    with pytest.raises(ValueError, match="4 outputs.*0 to 6"):
        accuracy(net(), toy(classes=7, size=16))
    with pytest.raises(ValueError, match="from -1"):
        fit(net(), [(x, y - 1) for x, y in toy()], **quick)
    with pytest.raises(TypeError, match="float"):
        fit(net(), [(x, y.float()) for x, y in toy()], **quick)
    with pytest.raises(ValueError, match="empty"):
        fit(net(), [], **quick)
    with pytest.raises(ValueError, match="drop_last"):
        fit(net(), toy(n=8, drop_last=True), **quick)
    with pytest.raises(ValueError, match="empty"):
        accuracy(net(), [])
    with pytest.raises(TypeError, match="length"):
        fit(net(), (b for b in toy()), **quick)
    with pytest.raises(TypeError, match="pairs"):
        fit(net(), [x for x, _ in toy()], **quick)
    with pytest.raises(TypeError, match="labels"):
        accuracy(net(), torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match="nothing to train"):
        fit(nn.Flatten(), toy(), **quick)
    with pytest.raises(ValueError, match="same classes"):
        fit(net(), toy(), teacher=net(7), **quick)
    with pytest.raises(ValueError, match="'0' and '2'.*shape"):
        fit(
            net(),
            toy(),
            teacher=nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Identity()),
            features={"0": "2"},
            **quick,
        )
    with pytest.raises(ValueError, match="no module 'layer9'"):
        fit(net(), toy(), teacher=net(), features={"layer9": "2"}, **quick)


# ---- properties


@given(st.integers(1, 500), st.floats(0, 0.9))
def test_cosine_stays_in_its_interval(steps, share):
    warm = int(share * steps)
    f = [T.cosine(i, steps, warm) for i in range(steps)]
    assert (
        all(0 < v <= 1 for v in f)
        and f[:warm] == sorted(f[:warm])
        and f[warm:] == sorted(f[warm:], reverse=True)
        and f[warm] == 1
    )


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(2, 12), st.floats(0.5, 20), st.integers(0, 99))
def test_soft_targets_are_a_divergence(n, c, temperature, seed):
    a, b = torch.randn(2, n, c, generator=torch.Generator().manual_seed(seed))
    assert (
        T.soft_targets(a, b, temperature) > -1e-5
        and abs(T.soft_targets(a, a + 3, temperature)) < 1e-4
    )


@settings(deadline=None)
@given(st.floats(-40, 80), st.integers(0, 99))
def test_sqnr_recovers_the_noise(db, seed):
    r, e = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    e *= (r.square().sum() / e.square().sum()).sqrt() * 10 ** (-db / 20)
    assert abs(T.sqnr_db(r, r + e) - db) < 1e-6


def test_measures_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
    assert T.agreement(a, a.flip(1)) == 0 and T.agreement(a, a.numpy()) == 1
    assert T.sqnr_db(a, a) == math.inf and T.sqnr_db(a * 0, a) == -math.inf
    with pytest.raises(ValueError, match="shapes differ"):
        T.agreement(a, a[:2])
    with pytest.raises(ValueError, match="shapes differ"):
        T.sqnr_db(a, a[:2])
    assert accuracy(lambda x: x.numpy(), [(a, torch.tensor([0, 1, 1]))]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", T.REFERENCES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
@pytest.mark.parametrize("se", [False, True])
def test_references_trace_and_repeat(name, shape, se):
    kw = dict(se=True) if se and name == "small_mobilenet" else {}
    a, b = (T.reference(name, 7, shape, **kw) for _ in range(2))
    assert same(a, b) and not same(a, T.reference(name, 7, shape, seed=1, **kw))
    x = torch.randn(2, *shape)
    assert torch.equal(torch.fx.symbolic_trace(a.eval())(x), a(x)) and a(x).shape == (2, 7)


def test_unknown_reference():
    with pytest.raises(ValueError, match="'resnet'.*small_resnet, small_mobilenet"):
        T.reference("resnet", 10)
    with pytest.raises(ValueError, match="C, H, W"):
        T.reference("small_resnet", 10, (1, 3, 32, 32))


def test_recalibrate_bn_matches_the_data_and_leaves_the_input_alone():
    model, x = net(), torch.randn(64, 3, 8, 8) * 3 + 1
    before = copy.deepcopy(model.state_dict())
    new = T.recalibrate_bn(model, x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (
        torch.allclose(new[1].running_mean, model[0](x).mean((0, 2, 3)), atol=1e-5)
        and new[1].momentum == model[1].momentum
        and new.training
    )
    with pytest.raises(ValueError, match="at least one batch"):
        T.recalibrate_bn(model, [])


def test_evaluating_restores_every_mode():
    model = net()
    model[1].eval()
    with T.evaluating(model):
        assert not any(m.training for m in model.modules())
    assert model.training and model[0].training and not model[1].training


# ---- the bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(file, monkeypatch):
    "How often a bar was drawn in two minutes, by a clock that goes on by a second whenever it is asked."
    monkeypatch.setattr("tqdm.std.time", lambda clock=itertools.count(): float(next(clock)))
    for _ in progress_bar(range(120), file=file):
        pass
    return file.getvalue().count("\r")


def test_a_log_gets_few_lines_and_a_terminal_many(monkeypatch):
    assert 2 <= drawn(io.StringIO(), monkeypatch) <= 7  # the beginning, the end, and twice a minute
    assert drawn(Terminal(), monkeypatch) > 50


def test_a_file_that_says_nothing_about_itself_is_a_log(monkeypatch):
    class Plain:
        said = ""

        def write(self, text):
            self.said += text

        def flush(self):
            pass

        def getvalue(self):
            return self.said

    assert drawn(Plain(), monkeypatch) <= 7


def test_no_bar_where_none_is_wanted(capsys):
    assert list(progress_bar("abc", progress=False)) == ["a", "b", "c"]
    fit(net(), toy(), **quick)
    assert capsys.readouterr().err == ""
    fit(net(), toy(), **quick | dict(progress=True))
    assert "fit" in capsys.readouterr().err


@pytest.mark.parametrize("look", ["accuracy", "logits", "image_batches", "quantize"])
def test_looking_leaves_the_global_random_numbers_alone(look):
    from mep.moments import image_batches
    from mep.quant import quantize
    from mep.train import logits

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(20, 1, 8, 8), torch.zeros(20).long()),
        batch_size=5,
        shuffle=True,
    )
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    dict(
        accuracy=lambda: accuracy(model, loader),
        logits=lambda: logits(model, loader),
        image_batches=lambda: image_batches(loader),
        quantize=lambda: quantize(model, loader, progress=False),
    )[look]()
    assert torch.equal(torch.rand(3), want)
