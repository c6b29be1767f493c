"""The block library: the loss, caching, resuming, killed workers, clusters, foreign teachers and spaces."""

import os
import signal
import subprocess
import sys
import textwrap

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mep.nas.bkd as bkd
from mep.nas.bkd import BlockLibrary, channel_variance, draw_library, nsr, teach_block, teacher_maps
from mep.nas.space import ORIGINAL, choices, chop, default_space
from mep.store import DamagedError, MissingError, StoreError
from mep.train import NanError, small_resnet

OPTIONS = [
    *choices("basic", width=(1.0, 0.25)),
    *choices("separable"),
    *choices("skip", out_act="relu"),
]
SPACE = default_space(4, (3, 16, 16), width=8, options=OPTIONS)
IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = IMAGES[:64], IMAGES[64:]
TEACHER = SPACE.build(SPACE.reference).eval()
HOW = dict(batch_size=16, progress=False, device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return BlockLibrary(tmp_path_factory.mktemp("lib") / "library", SPACE, TEACHER).train(
        DATA, **HOW
    )


# The loss


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.floats(0.1, 100), st.integers(0, 1000))
def test_nsr_is_the_error_in_units_of_each_channels_signal(c, scale, seed):
    y, noise = maps(8, c, 3, 3, seed=seed), maps(8, c, 3, 3, seed=seed + 1)
    wanted = torch.stack(
        [noise[:, i].square().mean() / y[:, i].var(correction=0) for i in range(c)]
    ).mean()
    v = channel_variance(y, floor=0)
    assert torch.isclose(nsr(y + noise, y, v), wanted, rtol=1e-3)
    assert torch.isclose(
        nsr(scale * (y + noise), scale * y, channel_variance(scale * y, floor=0)), wanted, rtol=1e-3
    )


def test_a_silent_channel_counts_with_a_floor():
    y = maps(8, 4, 3, 3)
    y[:, 2] = 0
    assert nsr(y, y) == 0 and torch.isfinite(nsr(y + 0.1, y))
    with pytest.raises(ValueError, match="constant"):
        channel_variance(torch.ones(4, 2, 3, 3))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(8, 4, 3, 3\).*\(8, 4, 2, 2\)"):
        nsr(maps(8, 4, 3, 3), maps(8, 4, 2, 2))


# One block


def test_a_block_learns_what_it_can_and_the_order_is_a_matter_of_the_seed():
    x = maps(64, 8, 8, 8)
    target = nn.Conv2d(8, 8, 1)
    with torch.no_grad():
        y = target(x)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        block = nn.Conv2d(8, 8, 1)
        losses = teach_block(block, x, y, channel_variance(y), epochs=40, batch_size=16, seed=seed)
        assert losses[-1] < 0.05 * losses[0]
        runs.append(block.weight.detach())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_block_without_weights_is_left_alone():
    assert teach_block(nn.ReLU(), maps(4, 2, 3, 3), maps(4, 2, 3, 3), torch.ones(2)) == []


def test_a_loss_that_is_not_finite_stops_and_names_the_block(tmp_path):
    lib = BlockLibrary(tmp_path / "l", SPACE, TEACHER)
    with pytest.raises(NanError, match="block .*/4/.*try a lower lr"):
        bkd._teach_and_store(
            tmp_path / "l",
            SPACE.block_key(4, 0),
            SPACE.block(4, 0),
            _four(tmp_path, bad=True),
            torch.ones(32),
            dict(epochs=1, lr=0.01, batch_size=4, seed=0),
            "cpu",
        )
    assert len(lib.missing()) == 20


def _four(folder, bad=False):
    x = np.random.default_rng(0).normal(size=(8, 32, 2, 2)).astype(np.float16)
    if bad:
        x[:] = np.nan
    paths = [folder / f"{i}.npy" for i in range(4)]
    for p in paths:
        np.save(p, x)
    return paths


# The teacher's maps


def test_maps_are_the_teachers_to_half_precision(tmp_path):
    paths = teacher_maps(TEACHER, IMAGES, [0, 2, 5], tmp_path, batch_size=7)
    with torch.no_grad():
        x = TEACHER.stem(IMAGES)
        wanted = {0: x}
        for i, b in enumerate(TEACHER.blocks, 1):
            x = wanted[i] = b(x)
    for e, p in paths.items():
        assert torch.allclose(torch.from_numpy(np.load(p)).float(), wanted[e], rtol=2e-3, atol=2e-3)


def test_maps_beyond_half_precision_are_refused(tmp_path):
    loud = SPACE.build(SPACE.reference).eval()
    loud.stem[0][1].weight.data.fill_(1e9)
    with pytest.raises(ValueError, match="after the stem exceed half precision"):
        teacher_maps(loud, IMAGES, [0], tmp_path)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(bkd.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=1000))())
    with pytest.raises(StoreError, match="GB free.*need"):
        BlockLibrary(tmp_path / "l", SPACE, TEACHER).train(DATA, **HOW)
    assert not (tmp_path / "l" / "maps").exists()


def test_a_small_cache_gives_the_same_blocks(made, tmp_path):
    one_place = max(
        a + b for a, b in zip(bkd._edge_bytes(SPACE, 96), bkd._edge_bytes(SPACE, 96)[1:])
    )
    small = BlockLibrary(tmp_path / "l", SPACE, TEACHER).train(DATA, cache_bytes=one_place, **HOW)
    assert [list(t) for t in small.nsr_table()] == [list(t) for t in made.nsr_table()]
    with pytest.raises(
        ValueError, match="cache_bytes=1,000 is too small: the maps of block 0 for 96 images"
    ):
        BlockLibrary(tmp_path / "m", SPACE, TEACHER).train(DATA, cache_bytes=1000, **HOW)


# The library


def test_everything_is_there_and_nothing_else_is_left(made):
    assert made.missing() == made.verify() == [] and not (made.store.root / "maps").exists()
    assert len(made.store.keys()) == 5 * 4 + 1
    table = made.nsr_table()
    assert all(len(t) == 4 and np.isfinite(t).all() for t in table)
    assert np.allclose(
        made.features([SPACE.arch(0, 1, 2, 3, 0)])[0],
        [table[i][k] for i, k in enumerate((0, 1, 2, 3, 0))],
    )


def test_a_network_is_made_of_the_stored_blocks(made):
    arch = SPACE.arch(1, 0, 2, 1, 3)
    net = made.build(arch)
    with torch.no_grad():
        x = TEACHER.stem(IMAGES)
        for i, o in enumerate(arch.options):
            x = made.block(i, o)(x)
        assert torch.equal(net(IMAGES), TEACHER.head(x))
    net.head[0][-1].weight.data.zero_()
    assert TEACHER.head[0][-1].weight.abs().sum() > 0  # a copy


def test_what_is_stored_is_never_trained_again(made, monkeypatch):
    monkeypatch.setattr(bkd, "_teach_and_store", lambda *a: pytest.fail("trained again"))
    BlockLibrary(made.store.root, SPACE, TEACHER).train(DATA, **HOW)


def test_new_cells_join_and_old_blocks_stay(made, tmp_path):
    import shutil

    shutil.copytree(made.store.root, tmp_path / "l")
    more = BlockLibrary(
        tmp_path / "l", SPACE.extend(choices("shift", kernel=1, out_act="relu")), TEACHER
    )
    assert len(more.missing()) == 5
    before = {k: (tmp_path / "l" / f"{k}.safetensors").read_bytes() for k in more.store.keys()}
    more.train(DATA, **HOW)
    assert not more.missing() and all(
        (tmp_path / "l" / f"{k}.safetensors").read_bytes() == v for k, v in before.items()
    )


@pytest.mark.slow  # the killed worker's test has two processes and compares the numbers, too
def test_the_same_numbers_for_any_number_of_processes(made, tmp_path):
    two = BlockLibrary(tmp_path / "l", SPACE, TEACHER).train(DATA, n_jobs=2, **HOW)
    assert [list(t) for t in two.nsr_table()] == [list(t) for t in made.nsr_table()]


def test_originals_need_no_training_and_have_no_error(tmp_path):
    net = small_resnet(4, width=8).eval()
    parts = chop(net, (3, 16, 16))
    lib = BlockLibrary(
        tmp_path / "l", parts.space(choices("basic", width=0.5)), parts.network()
    ).train(DATA, **HOW)
    assert lib.nsr(0, ORIGINAL) == 0 and lib.nsr(0, 1) > 0
    with torch.no_grad():
        assert torch.allclose(lib.build(lib.space.reference)(IMAGES), net(IMAGES), atol=1e-5)
    draw_library(lib)


def test_a_block_that_misses_is_named(tmp_path):
    lib = BlockLibrary(tmp_path / "l", SPACE, TEACHER)
    with pytest.raises(MissingError, match=r"block .*/2/separable.* where 20 blocks are missing"):
        lib.block(2, 2)
    with pytest.raises(MissingError, match="20 blocks are missing"):
        lib.nsr_table()


def test_a_damaged_block_is_named_and_not_loaded(tmp_path):
    lib = BlockLibrary(tmp_path / "l", SPACE, TEACHER).train(DATA, **HOW)
    path = lib.store.path(SPACE.block_key(3, 1))
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    assert len(lib.verify()) == 1 and path.name in lib.verify()[0]
    with pytest.raises(DamagedError, match="damaged"):
        BlockLibrary(tmp_path / "l", SPACE, TEACHER).block(3, 1)


# What doesn't belong together


def test_another_teacher_or_space_is_refused_with_both_named(made):
    other = SPACE.build(SPACE.reference, seed=1)
    mine, theirs = bkd.module_hash(TEACHER), bkd.module_hash(other)
    with pytest.raises(ValueError, match=f"teacher with hash {mine}, the one given has {theirs}"):
        BlockLibrary(made.store.root, SPACE, other)
    space = default_space(5, (3, 16, 16), width=8, options=OPTIONS)
    with pytest.raises(ValueError, match=f"frame {SPACE.frame}, the one given has {space.frame}"):
        BlockLibrary(made.store.root, space, space.build(space.reference))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lr=0.1), "lr=0.01 there, 0.1 now"),
        (dict(epochs=2), "epochs=1 there, 2 now"),
        (dict(n_images=32), "images"),
    ],
)
def test_blocks_of_another_recipe_are_not_mixed(made, change, words):
    with pytest.raises(ValueError, match=words):
        made.train(DATA, **{**HOW, **change})


def test_other_images_are_refused(made):
    with pytest.raises(ValueError, match="data="):
        made.train((DATA[0] + 1, DATA[1]), **HOW)


@pytest.mark.parametrize(
    "teacher, words",
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), "not stem, blocks and head"),
        (
            default_space(4, (3, 16, 16), width=16, options=OPTIONS).build(
                default_space(4, (3, 16, 16), width=16, options=OPTIONS).reference
            ),
            "after the stem, the teacher's maps are",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, teacher, words):
    with pytest.raises(ValueError, match=words):
        BlockLibrary(tmp_path / "l", SPACE, teacher)


def test_too_many_images_asked_for(tmp_path):
    with pytest.raises(ValueError, match="n_images=100: there are 64"):
        BlockLibrary(tmp_path / "l", SPACE, TEACHER).train(DATA, n_images=100, **HOW)


# Interrupted

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import mep.nas.bkd as bkd
from test_bkd import *
if __name__ == "__main__":
    done, real = [], bkd._teach_and_store
    def fatal(*a):
        done.append(real(*a))
        if len(done) == 7: os.kill(os.getpid(), signal.SIGKILL)
        return done[-1]
    bkd._teach_and_store = fatal
    BlockLibrary({root!r}, SPACE, TEACHER).train(DATA, **HOW)
"""


def test_a_killed_run_goes_on_where_it_was(made, tmp_path):
    root = tmp_path / "l"
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT).format(tests=os.path.dirname(__file__), root=str(root)),
        ],
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()[-2000:]
    lib = BlockLibrary(root, SPACE, TEACHER)
    assert len(lib.missing()) == 13
    lib.train(DATA, **HOW)
    assert [list(t) for t in lib.nsr_table()] == [list(t) for t in made.nsr_table()] and not (
        root / "maps"
    ).exists()


def test_a_killed_worker_is_reported_and_nothing_else_is_lost(made, tmp_path, monkeypatch):
    lib, flag = BlockLibrary(tmp_path / "l", SPACE, TEACHER), str(tmp_path / "flag")
    monkeypatch.setattr(bkd, "_teach_and_store", _Deadly(flag))
    with pytest.raises(RuntimeError, match="a worker process was killed.*all others are stored"):
        lib.train(DATA, n_jobs=2, **HOW)
    lib.train(DATA, n_jobs=2, **HOW)
    assert [list(t) for t in lib.nsr_table()] == [list(t) for t in made.nsr_table()]


class _Deadly:
    "The first narrow block kills the process that trains it, once"

    __name__ = "_teach_and_store"

    def __init__(self, flag):
        self.flag, self.real = flag, bkd._teach_and_store

    def __call__(self, root, key, *rest):
        if "width=0.25" in key and not os.path.exists(self.flag):
            open(self.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.real(root, key, *rest)


@pytest.mark.slow
def test_two_dask_workers_of_which_one_is_killed(made, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    lib = BlockLibrary(tmp_path / "l", SPACE, TEACHER)
    monkeypatch.setattr(bkd, "_teach_and_store", _Deadly(str(tmp_path / "flag")))
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=50,
        ) as cluster,
        distributed.Client(cluster),
    ):
        with joblib.parallel_config(backend="dask"):
            lib.train(DATA, n_jobs=-1, **HOW)
    assert os.path.exists(tmp_path / "flag") and not lib.missing()
    assert [list(t) for t in lib.nsr_table()] == [list(t) for t in made.nsr_table()]
