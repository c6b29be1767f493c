"mep.data: the generator's promises, the loaders' order, real data on disk, and what bad input is told."

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mep.data as D

FINGERPRINT = "cadd5dde3c9cc03071fc2548d1d9809fffeff80fb81b09c32067fda51f4a84fc"


def fingerprint():
    "SHA-256 over the pixels and answers of every generator, as in the chapter."
    sets = (
        D.shapes(100),
        D.shapes_detection(10, objects=5),
        D.shapes_segmentation(10),
        D.shapes_video(5),
    )
    return hashlib.sha256(b"".join(v.numpy().tobytes() for s in sets for v in s)).hexdigest()


@pytest.fixture(scope="module")
def small():
    return D.load(n_train=300, n_valid=50, n_test=70, batch_size=64)


# ---- the same pictures everywhere


def test_fingerprint():
    assert fingerprint() == FINGERPRINT


def test_fingerprint_without_vector_instructions():
    "NumPy takes other code paths with the dispatched instruction sets off; no pixel may notice."
    off = (
        "SSE41 SSE42 AVX F16C FMA3 AVX2 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL "
        "AVX512_ICL AVX512_SPR X86_V3 X86_V4"
    )
    code = (
        "import warnings; warnings.simplefilter('ignore'); from tests.test_data import "
        "fingerprint; print(fingerprint())"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = os.environ | dict(NPY_DISABLE_CPU_FEATURES=off, PYTHONPATH=root, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == FINGERPRINT


def test_splitmix64():
    assert [f"{v:016x}" for v in D._mix(np.arange(1, 4, dtype=np.uint64) * D._GOLDEN)] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f4",
        "06c45d188009454f",
    ]


def test_cosine_table_is_far_from_ties():
    exact = np.cos(np.arange(1024) * (2 * np.pi / 1024)) * 4096
    assert abs(abs(exact - np.rint(exact)) - 0.5).min() > 1e-3


def test_random_numbers():
    rng = D.Random(D._keys(3, np.arange(200)))
    u, k, z = rng.uniform(0, 1, 500), rng.integer(7, 500), rng.normal(501)
    assert (
        u.dtype == z.dtype == np.float32
        and 0 <= u.min()
        and u.max() < 1
        and abs(u.mean() - 0.5) < 0.005
    )
    assert np.abs(np.bincount(k.ravel(), minlength=7) / k.size - 1 / 7).max() < 0.005
    assert (
        z.shape == (200, 501)
        and abs(z.mean()) < 0.02
        and abs(z.std() - 1) < 0.01
        and abs(z).max() < 3.5
    )
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.25


def test_keys_do_not_collide():
    keys = np.concatenate(
        [D._keys(seed, np.arange(50_000)) for seed in range(4)]
        + [D._keys(0, np.arange(50_000) + D._FAR)]
    )
    assert len(np.unique(keys)) == len(keys)


@settings(max_examples=15, deadline=None)
@given(
    start=st.integers(0, 200),
    n=st.integers(1, 90),
    seed=st.integers(0, 2**63),
    d=st.floats(0, 1),
    spread=st.floats(0, 1),
)
def test_pieces_equal_the_whole(start, n, seed, d, spread):
    whole, piece = (
        D.shapes(start + n, seed, d, spread=spread),
        D.shapes(n, seed, d, spread=spread, start=start),
    )
    assert all(torch.equal(w[start:], p) for w, p in zip(whole, piece))
    low, high = np.float32(d * (1 - spread)), np.float32(d * (1 + spread))
    assert piece.difficulty.min() >= low - 1e-6 and piece.difficulty.max() <= high + 1e-6


@pytest.mark.parametrize(
    "make, n",
    [(D.shapes, 70), (D.shapes_detection, 70), (D.shapes_segmentation, 70), (D.shapes_video, 20)],
)
def test_every_generator(make, n):
    a, b, c = make(n), make(n, start=5), make(n, seed=1)
    assert a.x.dtype == torch.uint8 and len(a.x) == len(a.difficulty) == n
    assert torch.equal(a.x[5:], b.x[:-5]) and not torch.equal(a.x, c.x)


def test_every_shape_fits_the_unit_disc():
    v = np.linspace(-1.3, 1.3, 261, dtype=np.float32)
    u, v = np.broadcast_arrays(v[None, :], v[:, None])
    outside = u * u + v * v > 1.01
    for name, distance in D.SHAPES.items():
        assert (distance(u, v)[outside] > 0).all(), name
        assert (distance(u, v) < 0).mean() > 0.1, name


def test_shapes_are_balanced_and_stay_inside():
    s = D.shapes(1600, difficulty=0.5)
    assert torch.bincount(s.y).tolist() == [100] * 16 and len(D.CLASSES) == 16
    assert D.shapes(16, size=48).x.shape == (16, 3, 48, 48)


def test_noise_grows_with_difficulty():
    def rough(x):
        return (x[..., 1:].float() - x[..., :-1].float()).abs().mean().item()

    levels = [rough(D.shapes(200, difficulty=d, spread=0).x) for d in (0, 0.5, 1)]
    assert levels[0] < levels[1] < levels[2]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), objects=st.integers(1, 9), size=st.sampled_from([48, 64, 80]))
def test_boxes_agree_with_masks(seed, objects, size):
    found, parts = (
        D.shapes_detection(6, seed, objects=objects, size=size),
        D.shapes_segmentation(6, seed, objects=objects, size=size),
    )
    assert torch.equal(found.x, parts.x) and found.boxes.shape == (6, objects, 4)
    for mask, boxes, labels in zip(parts.masks, found.boxes.int(), found.labels):
        there = labels >= 0
        assert (
            there.any()
            and there.tolist() == sorted(there.tolist(), reverse=True)
            and (boxes[~there] == 0).all()
        )
        union = torch.zeros(size, size, dtype=torch.bool)
        for (left, top, right, bottom), label in zip(boxes[there].tolist(), labels[there].tolist()):
            mine = mask[top:bottom, left:right] == label + 1
            assert 0 <= left < right <= size and 0 <= top < bottom <= size
            assert mine[0].any() and mine[-1].any() and mine[:, 0].any() and mine[:, -1].any()
            union[top:bottom, left:right] = True
        assert (mask[~union] == 0).all()
        assert set(mask.unique().tolist()) - {0} == set((labels[there] + 1).tolist())


def test_video():
    v = D.shapes_video(60, frames=5)
    assert (
        v.x.shape == (60, 5, 3, 32, 32)
        and v.visible.shape == (60, 5)
        and v.motion.max() < len(D.MOTIONS)
    )
    assert 0 <= v.visible.min() and v.visible.max() <= 1
    easy = D.shapes_video(40, difficulty=0)
    assert easy.visible.min() > 0.9 and (easy.x[:, 0] != easy.x[:, -1]).any()
    assert D.shapes_video(2, frames=1).x.shape[1] == 1


@pytest.mark.parametrize(
    "kw, error",
    [
        (dict(n=0), ValueError),
        (dict(n=-3), ValueError),
        (dict(n=2.5), TypeError),
        (dict(n=4, seed=-1), ValueError),
        (dict(n=4, difficulty=1.5), ValueError),
        (dict(n=4, difficulty=float("nan")), ValueError),
        (dict(n=4, spread=-1), ValueError),
        (dict(n=4, size=8), ValueError),
        (dict(n=4, start=-1), ValueError),
    ],
)
def test_generator_refuses(kw, error):
    for make in (D.shapes, D.shapes_detection, D.shapes_segmentation, D.shapes_video):
        with pytest.raises(error):
            make(**kw)


def test_generator_refuses_empty_scenes_and_films():
    with pytest.raises(ValueError, match="objects"):
        D.shapes_detection(4, objects=0)
    with pytest.raises(ValueError, match="frames"):
        D.shapes_video(4, frames=0)


# ---- batches


def test_loaders(small):
    x, y = next(iter(small.train))
    assert (
        x.dtype == torch.float32
        and x.shape == (64, 3, 32, 32)
        and y.dtype == torch.int64
        and small.input_shape == (3, 32, 32)
    )
    assert (
        len(small.train) == len(list(small.train)) == 4
        and len(small.valid) == len(list(small.valid)) == 1
        and len(small.test) == len(list(small.test)) == 2
    )
    assert sum(len(y) for _, y in small.test) == 70
    assert {k: len(v) for k, v in small.difficulty.items()} == dict(train=300, valid=50, test=70)


def test_epoch_is_a_pure_function_of_seed_and_epoch(small):
    def epoch(data, e):
        data.train.sampler.set_epoch(e)
        return torch.cat([x for x, _ in data.train])

    again = D.load(n_train=300, n_valid=50, n_test=70, batch_size=64)
    assert torch.equal(epoch(small, 3), epoch(again, 3)) and not torch.equal(
        epoch(small, 3), epoch(small, 4)
    )
    small.train.sampler.set_epoch(0)
    first, second = ([y for _, y in small.train] for _ in range(2))
    assert not torch.equal(torch.cat(first), torch.cat(second)), (
        "without set_epoch the next pass must differ"
    )


def test_augmentation_does_not_depend_on_the_batch():
    big, little = (D.load(n_train=60, n_valid=10, n_test=10, batch_size=b) for b in (60, 15))
    assert torch.equal(
        torch.cat([x for x, _ in big.train]), torch.cat([x for x, _ in little.train])
    )


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 300), batch=st.integers(1, 100), epoch=st.integers(0, 50))
def test_order_visits_each_picture_at_most_once(n, batch, epoch):
    order = D.Order(n, batch, shuffle=True, seed=1)
    order.set_epoch(epoch)
    batches = list(order)
    seen = torch.cat([i for i, _ in batches])
    assert len(batches) == len(order) and len(seen.unique()) == len(seen) and seen.max() < n
    assert all(len(i) == min(batch, n) for i, _ in batches)
    assert torch.cat(list(D.Order(n, batch))).tolist() == list(range(n))


def test_workers_see_the_same_batches(small):
    small.train.sampler.set_epoch(2)
    here = torch.cat([x for x, _ in small.train])
    small.train.sampler.set_epoch(2)
    there = torch.utils.data.DataLoader(
        small.train.dataset, sampler=small.train.sampler, batch_size=None, num_workers=1
    )
    assert torch.equal(here, torch.cat([x for x, _ in there]))


def test_data_can_be_pickled(small):
    assert torch.equal(
        pickle.loads(pickle.dumps(small)).test.dataset.pixels, small.test.dataset.pixels
    )


def test_crop_flip_moves_and_mirrors():
    x = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(400, -1, -1, -1) + 1
    out = D.crop_flip(x, D.Random(D._keys(0, np.arange(400))), pad=1)
    assert out.shape == x.shape and out.dtype == torch.uint8
    assert len({o.numpy().tobytes() for o in out}) == 18  # 3 x 3 shifts, mirrored or not
    same = D.crop_flip(x, D.Random(D._keys(0, np.arange(400))), pad=0, flip=False)
    assert torch.equal(same, x)


def test_normalisation_is_what_preprocessing_says(small):
    p = json.loads(json.dumps(small.preprocessing))
    pixels, (x, _) = small.test.dataset.pixels, small.test.dataset[:]
    by_hand = (pixels.numpy() / 255 - np.reshape(p["mean"], (3, 1, 1))) / np.reshape(
        p["std"], (3, 1, 1)
    )
    np.testing.assert_allclose(x.numpy(), by_hand, atol=1e-5)
    assert (
        p["size"] == [32, 32]
        and p["channels"] == "RGB"
        and p["layout"] == "NCHW"
        and p["range"] == [0, 1]
    )


def test_own_normalisation():
    d = D.load("digits", mean=[0.5], std=[0.25])
    assert d.preprocessing["mean"] == [0.5] and torch.equal(
        d.test.dataset[:][0], (d.test.dataset.pixels.float() / 255 - 0.5) / 0.25
    )


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_constants_are_the_measured_moments(name):
    d = D.load(name)
    mean, std = D._moments(torch.cat([part.dataset.pixels for part in (d.train, d.valid, d.test)]))
    np.testing.assert_allclose([d.mean, d.std], [mean, std], atol=0.003)


def test_splits_share_no_picture(small):
    seen = [
        {p.numpy().tobytes() for p in part.dataset.pixels}
        for part in (small.train, small.valid, small.test)
    ]
    assert len(set.union(*seen)) == 420


def test_test_set_is_the_same_for_every_seed():
    for name in ("shapes", "digits"):
        a, b = (D.load(name, n_train=100, n_valid=20, n_test=50, seed=s) for s in (0, 1))
        assert torch.equal(a.test.dataset.pixels, b.test.dataset.pixels) and not torch.equal(
            a.train.dataset.pixels, b.train.dataset.pixels
        )


def test_calibration(small):
    c = D.calibration(small, 100)
    assert (
        c.shape == (100, 3, 32, 32)
        and torch.equal(c, D.calibration(small, 100))
        and not torch.equal(c, D.calibration(small, 100, seed=1))
    )
    plain = {x.numpy().tobytes() for x in small.train.dataset[:][0]}
    assert len({x.numpy().tobytes() for x in c} & plain) == 100, (
        "calibration pictures are different training pictures, not augmented"
    )
    for n in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            D.calibration(small, n)
    with pytest.raises(ValueError, match="300"):
        D.calibration(small, 301)


def test_no_validation_set():
    assert D.load("digits", n_valid=0).valid is None


def test_augment_argument():
    plain = D.load("digits", augment=False)
    raw = {p.numpy().tobytes() for p in plain.train.dataset[:][0]}
    assert all(p.numpy().tobytes() in raw for x, _ in plain.train for p in x)
    dark = D.load("digits", augment=lambda x, rng: x * 0)
    assert all((x == x.min()).all() for x, _ in dark.train)


# ---- bad input


@pytest.mark.parametrize(
    "args, kw, error, says",
    [
        (["shape"], {}, ValueError, "shapes, digits, fashion_mnist"),
        (["digits"], dict(n_train=0), ValueError, "n_train"),
        (["digits"], dict(n_train=-5), ValueError, "n_train"),
        (["digits"], dict(n_train=5000), ValueError, "1437"),
        (["digits"], dict(n_train=1437), ValueError, "n_train <= 1294"),
        (["digits"], dict(n_test=361), ValueError, "360"),
        (["digits"], dict(n_test=0), ValueError, "n_test"),
        (["digits"], dict(n_valid=-1), ValueError, "n_valid"),
        (["digits"], dict(batch_size=0), ValueError, "batch_size"),
        (["digits"], dict(seed=-1), ValueError, "seed"),
        (["digits"], dict(size=3), ValueError, "size"),
        (["digits"], dict(n_train=1.5), TypeError, "integer"),
        (["digits"], dict(difficulty=0.5), TypeError, "difficulty"),
        (["shapes"], dict(difficulty=2, n_train=10), ValueError, "difficulty"),
        (["folder"], {}, ValueError, "folder:PATH"),
    ],
)
def test_load_refuses(args, kw, error, says):
    with pytest.raises(error, match=says):
        D.load(*args, **kw)


def test_from_arrays_refuses():
    x, y = torch.zeros(20, 3, 8, 8, dtype=torch.uint8), torch.arange(20) % 4
    D.from_arrays(x, y, x, y)
    for bad, error, says in [
        ((x.float(), y, x, y), TypeError, "uint8"),
        ((x[0], y, x, y), ValueError, "N, C, H, W"),
        ((x[:0], y[:0], x, y), ValueError, "at least one"),
        ((x, y[:5], x, y), ValueError, "20 pictures"),
        ((x, y.float(), x, y), ValueError, "integer"),
        ((x, y, x[..., :4], y), ValueError, "one size"),
        ((x, y, x, y + 9), ValueError, "4 classes"),
        ((x, y - 1, x, y), ValueError, "must lie in"),
    ]:
        with pytest.raises(error, match=says):
            D.from_arrays(*bad)


def test_from_arrays_measures_moments():
    x = torch.randint(0, 256, (200, 2, 8, 8), dtype=torch.uint8)
    d = D.from_arrays(
        x, torch.zeros(200, dtype=torch.long), x, torch.zeros(200, dtype=torch.long), n_valid=0
    )
    np.testing.assert_allclose(d.mean, (x / 255).double().mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(d.std, (x / 255).double().std((0, 2, 3), correction=0), atol=1e-4)


# ---- files on disk


def test_missing_files_say_where(tmp_path, monkeypatch):
    monkeypatch.setenv("MEP_DATA", str(tmp_path))
    for name, file in [
        ("fashion_mnist", "train-images-idx3-ubyte"),
        ("cifar10", "data_batch_3"),
        ("imagenette", "imagenette2-160/val"),
    ]:
        with pytest.raises(FileNotFoundError, match=file) as e:
            D.load(name, download=False)
        assert (
            str(tmp_path) in str(e.value)
            and "MEP_DATA" in str(e.value)
            and "online" in str(e.value)
        )


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")]
)
def test_failed_download_says_why(tmp_path, monkeypatch, error):
    def offline(*args, **kw):
        raise error

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    with pytest.raises(FileNotFoundError, match=str(error)):
        D.load("fashion_mnist", root=tmp_path)


def test_damaged_files_are_named(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in D._FASHION:
        (raw / name).write_bytes(b"not what it was")
    with pytest.raises(D.DataError, match="t10k-labels-idx1-ubyte") as e:
        D.load("fashion_mnist", root=tmp_path)
    assert "Delete" in str(e.value)


def picture(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    "Two classes of plain pictures in train/ and val/, of odd sizes, one of them grey."
    for part, n in (("train", 10), ("val", 4)):
        for i in range(n):
            picture(tmp_path / part / "red" / f"{i}.png", (250, 10, 10), (40 + i, 30))
            picture(tmp_path / part / "blue" / f"{i}.jpg", (10, 10, 250), (30, 40 + i))
    Image.new("L", (50, 50), 100).save(tmp_path / "train" / "red" / "grey.png")
    return tmp_path


def test_folder(folder):
    d = D.load(f"folder:{folder}", size=24, n_valid=5, batch_size=4)
    assert (
        d.classes == ["blue", "red"]
        and d.input_shape == (3, 24, 24)
        and d.preprocessing["resize"] == dict(shorter_side=27, centre_crop=24)
    )
    assert [len(p.dataset) for p in (d.train, d.valid, d.test)] == [16, 5, 8] and d.mean == [
        0.485,
        0.456,
        0.406,
    ]
    blue = d.test.dataset.pixels[d.test.dataset.labels == 0].float().mean((0, 2, 3))
    assert blue[2] > 200 > 50 > blue[0]
    assert next(iter(d.train))[0].shape == (4, 3, 24, 24)


def test_folder_too_large_for_memory_is_read_in_batches(folder, monkeypatch):
    here = D.load("imagefolder", root=folder, size=24, batch_size=4)
    monkeypatch.setattr(D, "_MEMORY", 0)
    lazy = D.load("folder", root=folder, size=24, batch_size=4)
    assert isinstance(lazy.train.dataset.pixels, D.Files) and torch.equal(
        D.calibration(here, 8), D.calibration(lazy, 8)
    )
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(here.train, lazy.train))
    assert torch.equal(lazy.test.dataset[1][0], here.test.dataset[1][0])


def test_folder_without_parts_is_cut(folder):
    d = D.load(f"folder:{folder / 'train'}", size=16, n_test=6, n_valid=0)
    assert len(d.test.dataset) == 6 and len(d.train.dataset) == 15


def test_folder_with_a_table(tmp_path):
    for i in range(6):
        picture(tmp_path / f"{i}.png", (i, i, i))
    (tmp_path / "labels.csv").write_text(
        "file,label\n" + "".join(f"{i}.png,{i * 10}\n" for i in range(6))
    )
    d = D.load(f"folder:{tmp_path}", size=16, n_test=4, n_valid=0)
    assert len(d.classes) == 51 and all(
        int(p.float().mean()) * 10 == y
        for p, y in zip(d.test.dataset.pixels, d.test.dataset.labels)
    )


def test_folder_refuses(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        D.load("folder:nowhere/at/all")
    with pytest.raises(ValueError, match="resize"):
        D.load(f"folder:{folder}", size=64, resize=32)
    (folder / "train" / "red" / "3.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(D.DataError, match="3.png"):
        D.load(f"folder:{folder}", size=16)
    shutil.rmtree(folder / "val" / "red")
    with pytest.raises(ValueError, match="red"):
        D.load(f"folder:{folder}")
    shutil.rmtree(folder / "val")
    with pytest.raises(FileNotFoundError, match="test"):
        D.load(f"folder:{folder}")


def test_imagenette(tmp_path):
    wnids = [
        "n01440764",
        "n02102040",
        "n02979186",
        "n03000684",
        "n03028079",
        "n03394916",
        "n03417042",
        "n03425413",
        "n03445777",
        "n03888257",
    ]
    for part in ("train", "val"):
        for w in wnids:
            for i in range(2):
                picture(tmp_path / "imagenette2-160" / part / w / f"{i}.JPEG", (i, i, i))
    d = D.load("imagenette", root=tmp_path, size=32, n_valid=0)
    assert d.classes[0] == "tench" and d.classes[9] == "parachute" and len(d.train.dataset) == 20
    t = D.load("imagenette", root=tmp_path, size=32, n_valid=0, imagenet_labels=True)
    assert len(t.classes) == 1000 and t.test.dataset.labels.unique().tolist() == [
        0,
        217,
        482,
        491,
        497,
        566,
        569,
        571,
        574,
        701,
    ]


# ---- the real sets


def test_real_fashion_mnist(mep_data):
    d = D.load("fashion_mnist", root=mep_data)
    assert (
        d.input_shape == (1, 28, 28)
        and [len(p.dataset) for p in (d.train, d.valid, d.test)] == [54000, 6000, 10000]
        and len(d.classes) == 10
    )
    np.testing.assert_allclose([d.mean, d.std], D._moments(d.train.dataset.pixels), atol=0.002)
    assert D.load("fashion_mnist", root=mep_data, size=32, n_train=100).input_shape == (1, 32, 32)


def test_real_cifar10(mep_data):
    d = D.load("cifar10", root=mep_data)
    assert (
        d.input_shape == (3, 32, 32) and len(d.test.dataset) == 10000 and d.classes[0] == "airplane"
    )
    np.testing.assert_allclose([d.mean, d.std], D._moments(d.train.dataset.pixels), atol=0.002)


def test_real_cifar10_truncated(mep_data, tmp_path):
    shutil.copytree(
        mep_data / "cifar-10-batches-py",
        tmp_path / "cifar-10-batches-py",
        copy_function=shutil.copyfile,
    )
    os.chmod(tmp_path / "cifar-10-batches-py", 0o755)
    torn = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    torn.write_bytes(torn.read_bytes()[:100_000])
    with pytest.raises(D.DataError, match="data_batch_2") as e:
        D.load("cifar10", root=tmp_path)
    assert "data_batch_1" not in str(e.value)
    torn.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        D.load("cifar10", root=tmp_path, download=False)


def test_real_photographs(mep_data):
    d = D.load(
        f"folder:{mep_data / 'imagenet_val500'}",
        size=128,
        resize=146,
        n_test=40,
        n_train=20,
        n_valid=0,
    )
    assert (
        d.input_shape == (3, 128, 128)
        and len(d.test.dataset) == 40
        and int(d.test.dataset.labels.max()) <= 701
    )
