"""Fine-tuning from a library: what is refused, killed and resumed, many networks at once, a
user's network as the reference, the price of a search."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mep.data import calibration, load
from mep.nas.bkd import BlockLibrary
from mep.nas.finetune import (
    SearchCost,
    answers,
    assembled,
    distil,
    finetune,
    learn_accuracy,
    lighter_space,
    measured_front,
    trained_accuracies,
)
from mep.nas.search import Additive, Deployment
from mep.nas.space import choices, default_space
from mep.store import LockedError, MissingError, Store
from mep.train import fit, recalibrate_bn, small_mobilenet, small_resnet

OPTIONS = [*choices("basic"), *choices("basic", width=0.25), *choices("skip", out_act="relu")]


def digits():
    return load("digits", n_train=256, n_valid=100, augment=False)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def library(tmp_path_factory, data):
    space = default_space(10, (1, 8, 8), width=8, stem_stride=1, options=OPTIONS)
    teacher = fit(space.build(space.reference), data, 2, progress=False).model
    return BlockLibrary(tmp_path_factory.mktemp("library"), space, teacher).train(
        data, progress=False
    )


@pytest.fixture(scope="module")
def arch(library):
    return library.space.arch(1, 0, 2, 1, 0)


# ---- one network


def test_assembled_is_the_librarys_network_with_new_statistics(library, data, arch):
    net, plain = assembled(arch, library, data), library.build(arch)
    assert same(net, recalibrate_bn(plain, calibration(data, 256)))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert same(library.build(arch), plain)  # the library is as it was


def test_an_architecture_of_another_space(library, data):
    other = default_space(10, (1, 8, 8), width=16, stem_stride=1, options=OPTIONS)
    with pytest.raises(ValueError, match=f"{other.frame}.*{library.space.frame}"):
        finetune(other.reference, library, data)


def test_missing_blocks_are_all_named(library, data):
    wider = BlockLibrary(
        library.store.root, library.space.extend(choices("separable")), library.teacher
    )
    with pytest.raises(MissingError, match=r"no trained block 0 \(separable\), 4 \(separable\)"):
        finetune(wider.space.arch(3, 0, 0, 0, 3), wider, data)
    assert finetune(
        wider.space.arch(0, 1, 2, 0, 1), wider, data, 1, progress=False
    ).history  # what it has, it can use


def test_the_teacher_may_have_answered_before(library, data, arch):
    told = answers(library.teacher, data)
    a, b = (finetune(arch, library, data, 1, told=t, progress=False) for t in (told, None))
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_another_teacher(library, data, arch):
    class Always(nn.Module):
        "Says three, whatever it sees"

        def forward(self, x):
            return 20 * torch.eye(10)[torch.full((len(x),), 3)]

    net = finetune(arch, library, data, 3, teacher=Always(), alpha=1.0, progress=False).model
    assert (net(calibration(data, 64)).argmax(1) == 3).float().mean() > 0.9


def test_seeds_differ_and_repeat(library, data, arch):
    a, b, c = (finetune(arch, library, data, 1, seed=s, progress=False).model for s in (0, 0, 1))
    assert same(a, b) and not same(a, c)


def test_no_epochs_are_only_new_statistics(library, data, arch):
    fitted = finetune(arch, library, data, 0)
    assert fitted.history == [] and same(fitted.model, assembled(arch, library, data))


def test_what_distil_refuses(library, data, arch):
    net = assembled(arch, library, data)
    with pytest.raises(ValueError, match="whom to distil from"):
        distil(net, data)
    with pytest.raises(ValueError, match="answers to 3 images, but there are 256"):
        distil(net, data, told=torch.zeros(3, 10))
    with pytest.raises(ValueError, match="augmented"):
        answers(library.teacher, load("shapes", n_train=16, n_valid=8, n_test=8))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from mep import train
from mep.nas.bkd import BlockLibrary
from mep.nas.finetune import finetune
from mep.nas.space import Arch, choices, default_space
from test_finetune import OPTIONS, digits
space = default_space(10, (1, 8, 8), width=8, stem_stride=1, options=OPTIONS)
teacher = space.build(space.reference)
teacher.load_state_dict(torch.load({teacher!r}))
save, n = train._save_run, 0
def stop(*a):
    global n
    save(*a); n += 1
    if n == 2: os.kill(os.getpid(), signal.SIGKILL)
train._save_run = stop
library = BlockLibrary({root!r}, space, teacher)
finetune(Arch.from_json({arch!r}), library, digits(), 3, checkpoint={path!r}, progress=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_and_resumed(library, data, arch, tmp_path):
    torch.save(library.teacher.state_dict(), tmp_path / "teacher.pth")
    path = str(tmp_path / "part.safetensors")
    code = KILLED.format(
        tests=os.path.dirname(__file__),
        teacher=str(tmp_path / "teacher.pth"),
        arch=arch.to_json(),
        root=str(library.store.root),
        path=path,
    )
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert died.returncode == -9, died.stderr
    again, whole = (
        finetune(arch, library, data, 3, checkpoint=path, progress=False),
        finetune(arch, library, data, 3, progress=False),
    )
    assert same(again.model, whole.model) and [h["loss"] for h in again.history] == [
        h["loss"] for h in whole.history
    ]
    with pytest.raises(ValueError, match="starting weights"):
        finetune(library.space.reference, library, data, 3, checkpoint=path, progress=False)


# ---- many


def test_many_networks_each_once(library, data, monkeypatch):
    archs = library.space.sample(3, seed=1)
    first = trained_accuracies(archs[:2], library, data, 1, progress=False)
    assert ((first >= 0) & (first <= 1)).all()
    trained, one = [], finetune
    monkeypatch.setattr(
        sys.modules["mep.nas.finetune"],
        "finetune",
        lambda a, *args, **kw: trained.append(a) or one(a, *args, **kw),
    )
    again = trained_accuracies([archs[0], *archs], library, data, 1, progress=False)
    assert trained == [archs[2]] and again[1:3].tolist() == first.tolist() and again[0] == again[1]
    assert library.missing() == [] and library.verify() == []
    assert (
        trained_accuracies(archs[:1], library, data, 1, seed=1, progress=False).shape == (1,)
        and len(trained) == 2
    )  # another recipe


@pytest.mark.slow  # processes that load torch anew; the predictor's tests have some that are quicker
def test_processes_give_the_same_numbers(library, data):
    archs = library.space.sample(2, seed=2)
    here = trained_accuracies(archs, library, data, 1, seed=3, progress=False)
    for key in [k for k in library.store.keys() if k.startswith("networks/")]:
        library.store.delete(key)
    assert (
        trained_accuracies(archs, library, data, 1, seed=3, n_jobs=2, progress=False).tolist()
        == here.tolist()
    )


def test_many_networks_need_validation_and_a_free_library(library, data):
    archs = library.space.sample(1, seed=4)
    with pytest.raises(ValueError, match="no validation images"):
        trained_accuracies(archs, library, replace(data, valid=None))
    with Store(library.store.root).lock(), pytest.raises(LockedError):
        trained_accuracies(archs, library, data, 1, progress=False)


def test_a_predictor_of_its_own_networks(library, data):
    with pytest.raises(ValueError, match="6 networks for 5 blocks"):
        learn_accuracy(library, data, 6, epochs=1)
    predictor = learn_accuracy(library, data, 7, epochs=1, progress=False)
    archs = library.space.sample(20, seed=5)
    assert np.isfinite(predictor.predict(archs)).all() and np.ptp(predictor.predict(archs)) > 0


# ---- the search


class Depth:
    "A predictor that counts the blocks that do something"

    def __init__(self, space):
        self.space, self.terms, self.intercept = (
            space,
            [np.array([0.2, 0.1, 0.0])] * len(space),
            0.0,
        )

    def predict(self, archs):
        return Additive(self.space, self.terms)(archs)


def test_a_measured_front_within_a_share(library, tmp_path):
    space = library.space
    front, table, ms = measured_front(space, Depth(space), share=0.7, store=Store(tmp_path))
    assert front.unit == "ms" and all(table([p.arch])[0] <= 0.7 * ms for p in front)
    again, _, same_ms = measured_front(space, Depth(space), share=0.7, store=Store(tmp_path))
    assert same_ms == ms and again.points == front.points  # what was measured is kept
    with pytest.raises(ValueError, match="can't be met"):
        measured_front(space, Depth(space), Deployment(), 1e-6, Store(tmp_path))


@pytest.mark.parametrize(
    "make, blocks, signed", [(small_resnet, 3, False), (small_mobilenet, 6, True)]
)
def test_a_users_network_as_the_reference(make, blocks, signed):
    net, x = make(10), torch.randn(4, 3, 32, 32)
    net = recalibrate_bn(net, x)
    space, teacher = lighter_space(net, x)
    assert len(space) == blocks
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), net.eval()(x))
    for i, p in enumerate(space.blocks):
        assert all(space.cost(i, o).macs < space.cost(i).macs for o in p.options[1:])
        assert all(
            dict(o.options)["out_act"] == ("none" if signed else "relu") for o in p.options[1:]
        )


def test_a_network_that_cannot_be_lighter():
    thin = nn.Sequential(
        nn.Conv2d(3, 2, 3, 2, 1),
        nn.Conv2d(2, 2, 1, 2),
        nn.Conv2d(2, 2, 1, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 3),
    )
    with pytest.raises(ValueError, match="can't cut|one architecture"):
        lighter_space(thin, torch.randn(2, 3, 16, 16))


@given(
    st.floats(0, 100), st.floats(0, 100), st.floats(0, 10), st.integers(1, 50), st.integers(1, 50)
)
def test_sharing_makes_a_search_cheaper(once, scenario, network, n, k):
    c = SearchCost(once, scenario, network)
    assert c.per_scenario(n, math.inf) <= c.per_scenario(n, k + 1) <= c.per_scenario(n, k)
    assert math.isclose(k * c.per_scenario(n, k), once + k * (scenario + n * network), abs_tol=1e-9)
