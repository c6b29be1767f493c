"""mep.store: what goes in comes out, damage is named, and processes that are really killed
leave nothing half."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mep import store as S
from mep.store import (
    DamagedError,
    LockedError,
    MissingError,
    Store,
    StoreError,
    content_hash,
    load,
    save,
    write_atomic,
)

posix = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs processes that can be forked and killed"
)
in_tmp = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
]


def same(a, b):
    "Equal bit for bit, NaN included"
    a_, b_ = (x.flatten().unsqueeze(-1).contiguous().view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_, b_)


# --- round trips
# ------------------------------------------------------------------------------------------


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    x = (
        (torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 50)
        .abs()
        .to(draw(st.sampled_from(DTYPES)))
    )
    if x.dim() > 1 and draw(st.booleans()):
        x = x.transpose(0, 1)
    return x[::2] if x.dim() and draw(st.booleans()) else x


facts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(), c, max_size=3),
    max_leaves=8,
)
names = st.text(max_size=8).filter(
    lambda k: k != "__metadata__" and not any(0xD800 <= ord(c) < 0xE000 for c in k)
)


@in_tmp
@given(ts=st.dictionaries(names, tensors(), max_size=5), meta=facts)
def test_round_trip(tmp_path, ts, meta):
    digest = save(tmp_path / "a", ts, meta)
    back, facts = load(tmp_path / "a")
    assert list(back) == list(ts) and all(same(back[k], ts[k]) for k in ts)
    assert facts == ({} if meta is None else meta)
    assert (
        save(tmp_path / "b", ts, meta) == digest
        and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_0d_and_empty(tmp_path, dtype):
    ts = dict(
        scalar=torch.tensor(1).to(dtype),
        empty=torch.empty(0, 3).to(dtype),
        one=torch.ones(3).to(dtype),
    )
    save(tmp_path / "a", ts)
    assert all(same(ts[k], v) for k, v in load(tmp_path / "a").tensors.items())
    assert len({content_hash(t) for t in ts.values()}) == 3
    assert content_hash(torch.arange(8).to(torch.float32).to(dtype)[::8]) == content_hash(
        torch.zeros(1).to(dtype)
    )


def test_shared_strided_and_gradient_tensors(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    p = torch.nn.Parameter(x.clone())
    ts = dict(
        x=x,
        row=x[1],
        column=x[:, 1],
        again=x,
        t=x.T,
        expanded=x[:1].expand(5, 4),
        p=p,
        conj=(x + 1j).conj(),
    )
    save(tmp_path / "a", ts)
    back = load(tmp_path / "a").tensors
    assert all(torch.equal(back[k], v.detach().resolve_conj()) for k, v in ts.items())
    assert not back["p"].requires_grad and type(back["p"]) is torch.Tensor
    assert len({v.untyped_storage().data_ptr() for v in back.values()}) == len(ts)
    assert x.equal(torch.arange(12.0).view(3, 4)) and p.requires_grad


def test_arrays_of_any_kind(tmp_path):
    big = np.arange(6, dtype=">f4").reshape(2, 3)
    frozen = np.ones(3)
    frozen.flags.writeable = False
    ts = dict(
        big=big,
        fortran=np.asfortranarray(big),
        back=np.arange(5)[::-1],
        scalar=np.float64(2.5),
        zero_d=np.array(3),
        frozen=frozen,
        bools=np.array([True, False]),
    )
    save(tmp_path / "a", ts)
    for k, v in load(tmp_path / "a").tensors.items():
        assert np.array_equal(v.numpy(), ts[k]) and v.shape == np.shape(ts[k])


def test_state_dict_of_a_network_with_tied_weights(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    net[2].weight = net[0].weight
    save(tmp_path / "a", net.state_dict())
    net.load_state_dict(load(tmp_path / "a").tensors)


@pytest.mark.parametrize(
    "meta, where",
    [
        ({"a": [1, {2}]}, r"meta\['a'\]\[1\] is a set"),
        ({"a": {1: 2}}, r"meta\['a'\] has the key 1"),
        (dict(t=torch.ones(1)), r"meta\['t'\] is a Tensor"),
        (torch.nn.Linear(1, 1), "state_dict"),
        (dict(x=1j), "complex"),
        (dict(x=b"x"), "bytes"),
        (dict(x=np.ones(2)), "ndarray"),
    ],
)
def test_meta_that_json_cannot_hold_is_named(tmp_path, meta, where):
    with pytest.raises(TypeError, match=where):
        save(tmp_path / "a", meta=meta)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "x",
    [
        [1.0, 2.0],
        "x",
        np.array(["a"]),
        np.array([None]),
        torch.ones(2).to_sparse(),
        torch.ones(2, device="meta"),
        np.ones(2, np.longdouble),
        np.ones(2, "M8[s]"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_tensors_that_cannot_be_stored_are_named(tmp_path, x):
    with pytest.raises(TypeError, match=r"tensors\['bad'\] "):
        save(tmp_path / "a", dict(good=torch.ones(1), bad=x))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [1, None, "__metadata__"])
def test_bad_tensor_names(tmp_path, name):
    with pytest.raises(TypeError, match="a name is a string"):
        save(tmp_path / "a", {name: torch.ones(1)})


def test_facts_too_long_for_the_format_are_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "_MOST", 1000)
    with pytest.raises(ValueError, match="put long lists into tensors"):
        save(tmp_path / "a", meta="x" * 1000)
    assert os.listdir(tmp_path) == []


# --- content_hash
# ------------------------------------------------------------------------------------------

EXAMPLE = (
    "dict(b=[1, 2.5, None, True, 'é'], a=torch.arange(6.).view(2, 3).bfloat16(), "
    "c=np.int8([1, 2]), d=dict(y=1, x=-0.0))"
)


def test_hash_is_the_same_everywhere():
    code = f"import numpy as np, torch; from mep.store import content_hash; print(content_hash({EXAMPLE}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": s},
        ).stdout.strip()
        for s in "12"
    }
    assert (
        seen
        == {content_hash(eval(EXAMPLE))}
        == {"851e583e0348913e74f9010e456267f2b45460fea3432936e771ccea85f9598c"}
    )  # a new value here makes every stored key stale


@given(facts, st.randoms())
def test_hash_ignores_the_order_of_dicts_only(obj, rnd):
    def shuffled(x):
        if isinstance(x, dict):
            items = [(k, shuffled(v)) for k, v in x.items()]
            rnd.shuffle(items)
            return OrderedDict(items)
        return tuple(map(shuffled, x)) if isinstance(x, list) else x

    assert content_hash(shuffled(obj)) == content_hash(obj)


def test_hash_tells_apart():
    different = [
        1,
        1.0,
        True,
        "1",
        None,
        [],
        {},
        [1],
        [[1]],
        [1, 1],
        {"a": 1},
        {"a": [1]},
        "",
        0,
        -0.0,
        0.0,
        float("nan"),
        torch.tensor(1),
        torch.tensor([1]),
        torch.tensor(1.0),
        torch.tensor(True),
        torch.ones(2, 3),
        torch.ones(3, 2),
        torch.ones(6),
        torch.ones(6).half(),
        torch.ones(6).bfloat16(),
        torch.zeros(6),
        torch.empty(0),
        torch.empty(0, 1),
    ]
    assert len({content_hash(x) for x in different}) == len(different)
    assert content_hash(np.float32(0.1)) == content_hash(float(np.float32(0.1)))


@in_tmp
@given(tensors())
def test_hash_of_tensor_is_that_of_its_values(x):
    assert (
        content_hash(x)
        == content_hash(x.clone())
        == content_hash(x.t().contiguous().t() if x.dim() == 2 else x)
    )
    if x.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        assert content_hash(x) == content_hash(x.numpy())


def test_hash_sees_every_piece():
    x = torch.zeros(3_000_000)  # 12 pieces
    seen = {content_hash(x)}
    for i in range(0, x.numel(), 250_000):
        y = x.clone()
        y[i] = 1
        seen.add(content_hash(y))
    assert len(seen) == 13


def test_hash_names_what_it_cannot():
    with pytest.raises(TypeError, match=r"obj\['a'\]\[0\] is a object"):
        content_hash(dict(a=[object()]))
    with pytest.raises(TypeError, match="state_dict"):
        content_hash(torch.nn.Linear(1, 1))


# --- damage
# ------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path):
    save(
        tmp_path / "good", dict(w=torch.randn(700_000), b=torch.ones(3)), dict(accuracy=0.9)
    )  # three pieces
    return (tmp_path / "good").read_bytes()


@in_tmp
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path, good, data):
    at = data.draw(st.integers(0, 600) | st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(1, 255))
    (tmp_path / "bad").write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    with pytest.raises(DamagedError, match="bad "):
        load(tmp_path / "bad")


@in_tmp
@given(data=st.data())
def test_cut_lengthened_and_shifted_files_are_noticed(tmp_path, good, data):
    at = data.draw(st.integers(0, len(good) - 1))
    more = data.draw(st.binary(min_size=1, max_size=9))
    for bad in (good[:at], good + more, more + good, good[:at] + more + good[at:]):
        (tmp_path / "bad").write_bytes(bad)
        if bad != good:
            with pytest.raises(DamagedError, match="bad "):
                load(tmp_path / "bad")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 500,
        b"hello",
        json.dumps(dict(a=1)).encode(),
        pickle.dumps(dict(a=1)),
        safetensors.torch.save(dict(w=torch.ones(2))),
        safetensors.torch.save(dict(w=torch.ones(2)), {"mep": "sha256:" + "0" * 64 + " {}"}),
    ],
    ids=range(8),
)
def test_foreign_files_are_named(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(DamagedError, match="foreign "):
        load(tmp_path / "foreign")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    (tmp_path / "a").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "b")
    for f in "ab":
        with pytest.raises(DamagedError):
            load(tmp_path / f)
    assert not (tmp_path / "boom").exists()


def test_newer_format_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "_FORMAT", 2)
    save(tmp_path / "a", dict(w=torch.ones(1)))
    monkeypatch.setattr(S, "_FORMAT", 1)
    with pytest.raises(StoreError, match="format 2.*update mep") as e:
        load(tmp_path / "a")
    assert not isinstance(e.value, DamagedError)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "a")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


def test_other_safetensors_tools_read_it(tmp_path):
    save(tmp_path / "a.safetensors", dict(w=torch.ones(2)), dict(a=1))
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a.safetensors")["w"], torch.ones(2))


# --- disks that fail
# ------------------------------------------------------------------------------------------


def leftovers(folder):
    return [p for p in Path(folder).rglob("*") if p.name.endswith(S._TEMP)]


@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 1 MB"
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("only root may mount a small disk here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(small_disk):
    store = Store(small_disk / "run")
    store.put("a", dict(w=torch.ones(50_000)))
    for key in ("a", "b", "deep/er/c"):
        with pytest.raises(
            StoreError, match=rf"{key}\.safetensors could not be written \(4,000,.* No space left"
        ) as e:
            store.put(key, dict(w=torch.ones(1_000_000)))
        assert e.value.__cause__.errno == errno.ENOSPC
    assert store.keys() == ["a"] and store.verify() == [] and leftovers(small_disk) == []
    store.put("b", dict(w=torch.ones(50_000)))


@posix
def test_file_size_limit(tmp_path):
    store = Store(tmp_path)
    store.put("a", meta=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StoreError, match="a.safetensors could not be written"):
            store.put("a", dict(w=torch.ones(1_000_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.get("a").meta == 1 and leftovers(tmp_path) == []


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()],
    ids=["EIO", "interrupt"],
)
def test_failure_of_each_call(tmp_path, monkeypatch, call, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*a, **k):
        raise error

    with monkeypatch.context() as m:
        m.setattr(os, call, fail)
        with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_unusable_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        Store(tmp_path / "file").put("a")
    with pytest.raises(StoreError, match="can't be used as a store"):
        with Store(tmp_path / "file").lock():
            pass
    with pytest.raises(StoreError, match="could not be written"):
        write_atomic(tmp_path, b"x")
    assert os.listdir(tmp_path) == ["file"]


def test_short_writes_are_finished(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:7])))
    write_atomic(tmp_path / "a", b"x" * 100, b"", b"y")
    assert (tmp_path / "a").read_bytes() == b"x" * 100 + b"y"


def test_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls, kind = [], lambda fd: "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(kind(fd)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to tell files from folders")
    write_atomic(tmp_path / "a", b"x")
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    write_atomic(tmp_path / "x/y/a", b"x")
    assert calls == ["folder", "folder", "file", "rename", "folder"]


# --- processes that die
# ------------------------------------------------------------------------------------------

CALLS = ["open", "write", "fsync", "replace", "close", "mkdir"]


def in_child(fn):
    "Run `fn` in a forked process; returns its exit status, negative if it was killed"
    if not (pid := os.fork()):
        code = 1
        try:
            fn()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying(fn, step, half=False):
    """`fn` in a process that kills itself before its `step`-th call of the system, or in the
    middle of it if that writes"""

    def run():
        left = [step]

        def wrap(name, f):
            def g(*a, **k):
                left[0] -= 1
                if left[0] < 0:
                    if half and name == "write":
                        f(a[0], bytes(a[1])[: len(a[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return f(*a, **k)

            return g

        for name in CALLS:
            setattr(os, name, wrap(name, getattr(os, name)))
        fn()

    return in_child(run)


@posix
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_killed_at_every_step_of_a_put(tmp_path, exists, half):
    store, new = Store(tmp_path / "run"), torch.full((1000,), 2.0)
    seen = []
    for step in range(100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        if exists:
            store.put("a/b", dict(w=torch.ones(1000)))
        code = dying(lambda: store.put("a/b", dict(w=new)), step, half)
        assert store.verify() == [] and len(leftovers(tmp_path)) <= 1
        seen.append(store.get("a/b").tensors["w"][0].item() if "a/b" in store else None)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        store.cached("a/b", lambda: (dict(w=new), {}))
        store.put("a/b", dict(w=new))  # the second run goes on
        assert torch.equal(store.get("a/b").tensors["w"], new) and leftovers(tmp_path) == []
    assert code == 0 and step >= 7
    old = 1.0 if exists else None
    assert (
        seen == [old] * seen.count(old) + [2.0] * seen.count(2.0)
        and seen.count(old) >= 4
        and seen.count(2.0) >= 3
    )


@posix
def test_random_kills_of_writers_in_one_folder(tmp_path):
    store, rnd = Store(tmp_path), random.Random(0)

    def forever(seed):
        i = 0
        while True:
            i += 1
            store.put(f"k{i % 3}", dict(w=torch.full((30_000,), float(seed))), dict(seed=seed))

    for _ in range(15):
        pids = []
        for seed in (1, 2, 3):
            if not (pid := os.fork()):
                try:
                    forever(seed)
                finally:
                    os._exit(1)
            pids.append(pid)
        time.sleep(rnd.uniform(0.005, 0.08))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        for k in store.keys():
            t, m = store.get(k)
            assert (t["w"] == m["seed"]).all()
    with store.lock():
        pass
    assert leftovers(tmp_path) == [] and store.verify() == [] and store.keys()


@posix
@pytest.mark.parametrize(
    "inject, found",
    [
        ("fsync:signal=KILL:when=1", "old"),
        ("fsync:signal=KILL:when=2", "new"),
        ("rename,renameat,renameat2:error=ENOSPC:when=1", "old"),
    ],
)
def test_faults_injected_by_the_kernel_tracer(tmp_path, inject, found):
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = f"import mep.store as s; s.write_atomic({str(path)!r}, b'new')"
    calls = inject.split(":")[0]
    run = subprocess.run(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            os.devnull,
            "-e",
            f"trace={calls}",
            "-e",
            f"inject={inject}",
            sys.executable,
            "-c",
            code,
        ],
        capture_output=True,
        text=True,
    )
    if (
        run.returncode == 0
        or "ptrace" in run.stderr.lower()
        or "StoreError" not in run.stderr
        and "error" in inject
    ):
        pytest.skip(f"strace can't inject faults here: {run.stderr[-200:]}")
    assert path.read_text() == found
    S.clean(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_clean_spares_living_writers_and_other_files(tmp_path):
    fd, living = S._open_temp(tmp_path / "a")
    (tmp_path / ".other.tmp").write_text("")
    (tmp_path / f".dead.1{S._TEMP}").write_text("")
    assert [p.name for p in S.clean(tmp_path)] == [f".dead.1{S._TEMP}"] and living.exists()
    write_atomic(tmp_path / "a", b"new")
    assert living.exists()
    os.close(fd)
    assert S.clean(tmp_path) == [living]


def test_threads_writing_one_key(tmp_path):
    store = Store(tmp_path)

    def work(i):
        for _ in range(15):
            store.put("k", dict(w=torch.full((1000,), float(i))), dict(i=i))
            t, m = store.get("k")
            assert (t["w"] == m["i"]).all()

    errors = []

    def guarded(i):
        try:
            work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == [] and leftovers(tmp_path) == [] and store.verify() == []


# --- store
# ------------------------------------------------------------------------------------------


def test_put_get_keys_delete(tmp_path):
    store = Store(tmp_path / "run")
    assert (
        store.keys() == []
        and store.verify() == []
        and "a" not in store
        and not (tmp_path / "run").exists()
    )
    h = store.put("a/b.c/d", dict(w=np.ones(2)), dict(acc=0.5))
    store.put("a", meta=[1, 2])
    assert store.keys() == ["a", "a/b.c/d"] and len(h) == 64 and store.get("a") == ({}, [1, 2])
    tensors, meta = store.get("a/b.c/d")
    assert meta["acc"] == 0.5 and tensors["w"].tolist() == [1, 1]
    store.delete("a")
    assert store.keys() == ["a/b.c/d"]
    for f in (store.get, store.delete):
        with pytest.raises(MissingError, match="nothing under 'a'; it has a/b.c/d") as e:
            f("a")
        assert isinstance(e.value, (KeyError, StoreError)) and '"' not in str(e.value)[0]


def test_verify_names_every_damaged_file(tmp_path):
    store = Store(tmp_path)
    for k in ("a", "b", "c/d"):
        store.put(k, dict(w=torch.ones(3)))
    with open(store.path("b"), "r+b") as f:
        f.truncate(100)
    with open(store.path("c/d"), "r+b") as f:
        f.seek(-1, 2)
        f.write(b"!")
    (tmp_path / "not a key.safetensors").write_text("")
    problems = store.verify()
    assert len(problems) == 3 and all(
        n in p for n, p in zip(("b.safetensors", "d.safetensors", "not a key"), problems)
    )
    with pytest.raises(DamagedError):
        store.get("b")
    with pytest.raises(DamagedError, match="Delete it and run again"):
        store.cached("b", lambda: ({}, {}))
    store.delete("b")
    assert store.cached("b", lambda: ({}, dict(new=1))).meta == dict(new=1)


@given(st.text(max_size=30))
def test_no_key_leads_out_of_the_folder(key):
    root = Path("/root-of-store")
    try:
        path = Store(root).path(key)
    except ValueError:
        return
    assert (
        Path(os.path.normpath(path)) == path
        and root in path.parents
        and not any(p.startswith(".") for p in path.parts[2:])
    )


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "..",
        "../a",
        "a/../b",
        "./a",
        ".a",
        "a\\b",
        "C:a",
        "a:b",
        "a b",
        "a\n",
        "a\0",
        "con",
        "NUL.txt",
        "lpt1",
        "a.",
        "-a",
        "é",
        "x" * 201,
        "a.safetensors",
    ],
)
def test_bad_keys(tmp_path, key):
    store = Store(tmp_path)
    for f in (
        store.put,
        store.get,
        store.delete,
        store.__contains__,
        lambda k: store.cached(k, lambda: ({}, {})),
    ):
        with pytest.raises(ValueError, match="is no key"):
            f(key)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", [None, 3, Path("a"), ("a",)])
def test_keys_are_strings(tmp_path, key):
    with pytest.raises(TypeError, match="A key is a string"):
        Store(tmp_path).get(key)


def test_cached_computes_once_and_gives_what_a_second_run_gives(tmp_path):
    store, calls = Store(tmp_path), []

    def job():
        calls.append(1)
        return dict(w=np.ones(2)), dict(shape=(1, 2), x=np.float32(0.5))

    first, second = store.cached("a", job), store.cached("a", job)
    assert (
        len(calls) == 1
        and first.meta == second.meta == dict(shape=[1, 2], x=0.5)
        and torch.equal(first.tensors["w"], second.tensors["w"])
    )
    for bad in (None, {}, dict(a=1, b=2), (1,)):
        with pytest.raises(TypeError, match="must return"):
            store.cached("b", lambda bad=bad: bad)
    with pytest.raises(ZeroDivisionError):
        store.cached("b", lambda: 1 / 0)
    assert store.keys() == ["a"]


# --- lock
# ------------------------------------------------------------------------------------------

HOLD = (
    "import sys, mep.store as s; l = s.Store(sys.argv[1]).lock(); l.__enter__(); "
    "print('locked', flush=True); sys.stdin.read()"
)


@posix
def test_lock_of_another_process_and_after_its_kill(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(LockedError, match=f"process {other.pid} on {socket.gethostname()}"):
        with Store(tmp_path).lock():
            pass
    Store(tmp_path).put("a")  # writing needs no lock
    other.kill()
    other.communicate()
    with Store(tmp_path).lock():
        pass


def test_lock_in_this_process(tmp_path):
    store = Store(tmp_path)
    with store.lock():
        with pytest.raises(LockedError, match=f"process {os.getpid()} "):
            with Store(tmp_path).lock():
                pass
    with pytest.raises(ZeroDivisionError):
        with store.lock():
            raise ZeroDivisionError
    with store.lock():
        pass
    assert store.keys() == [] and S._held == set()


@posix
def test_a_worker_that_outlives_its_killed_parent_holds_no_lock(tmp_path):
    r, w = os.pipe()

    def parent():
        with Store(tmp_path).lock():
            if not (pid := os.fork()):
                time.sleep(30)
                os._exit(0)
            os.write(w, pid.to_bytes(4, "little"))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(parent) == -signal.SIGKILL
    worker = int.from_bytes(os.read(r, 4), "little")
    os.kill(worker, 0)  # it lives
    with Store(tmp_path).lock():
        pass
    os.kill(worker, signal.SIGKILL)


def test_lock_takes_away_dead_writers_files(tmp_path):
    (tmp_path / "deep").mkdir()
    dead = tmp_path / "deep" / f".x.1{S._TEMP}"
    dead.write_text("half")
    with Store(tmp_path).lock():
        assert not dead.exists()


def test_unreadable_lock_file_still_locks(tmp_path):
    with Store(tmp_path).lock():
        (tmp_path / ".lock").write_text("garbage")
        with pytest.raises(LockedError, match="another process"):
            with Store(tmp_path).lock():
                pass


def test_windows_locks(tmp_path, monkeypatch):
    taken = set()

    def locking(fd, mode, n):
        if os.fstat(fd).st_ino in taken:
            raise PermissionError(errno.EACCES, "Permission denied")
        taken.add(os.fstat(fd).st_ino)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with Store(tmp_path).lock():
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(LockedError, match=f"process {os.getpid()} "):
            with Store(tmp_path).lock():
                pass


def test_drive_without_locks(tmp_path, monkeypatch):
    def no_locks(fd):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(S, "_try_lock", no_locks)
    store = Store(tmp_path)
    store.put("a", meta=1)
    assert store.get("a").meta == 1 and leftovers(tmp_path) == []
    with pytest.raises(StoreError, match="No locks available.*drive with file locks"):
        with store.lock():
            pass
