"""What a stored result stands for: change anything that it was made of, and it is made again;
move it, and it is refused."""

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mep.cost import profile
from mep.nas.bkd import BlockLibrary
from mep.nas.space import Arch, choices, default_space
from mep.networks import (
    build_network,
    code_identity,
    count_outputs,
    load_weights,
)
from mep.pipeline.core import (
    Config,
    cost_facts,
    find_classes,
    run,
)
from mep.quant.sim import quantize
from mep.store import DamagedError, Store

TINY = Config(epochs=1, n_calib=8, n_latency=2, batch=8)


def reused(report):
    return [s["stage"].split()[0] for s in report.stages if s["reused"]]


# ---- data


@pytest.fixture
def pictures(tmp_path):
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    for part, n in (("train", 20), ("test", 4)):
        for name in ("blue", "red"):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(
                    folder / part / name / f"{i}.png"
                )
    return folder


def until_reference(folder, out):
    return run(
        replace(TINY, data=f"folder:{folder}", size=16, out=str(out), until="reference"),
        progress=False,
    )


def test_every_training_picture_and_label_is_in_the_keys(pictures, tmp_path):
    until_reference(pictures, tmp_path / "run")
    assert reused(until_reference(pictures, tmp_path / "run")) == ["reference"]
    Image.new("RGB", (16, 16), "white").save(pictures / "train" / "red" / "17.png")  # one of forty
    assert reused(until_reference(pictures, tmp_path / "run")) == []
    for i in range(20):  # every label swapped
        a, b, spare = (pictures / "train" / n for n in (f"red/{i}.png", f"blue/{i}.png", "spare"))
        os.replace(a, spare)
        os.replace(b, a)
        os.replace(spare, b)
    assert reused(until_reference(pictures, tmp_path / "run")) == []


# ---- networks from files


def write_net(folder, act, extra=""):
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(
        f"from torch import nn\nimport helpers{extra}\ndef make(): return "
        "nn.Sequential(nn.Flatten(), nn.Linear(64, 10), helpers.act())\n"
    )
    (folder / "helpers.py").write_text(f"from torch import nn\nact = nn.{act}\n")
    return f"{folder / 'net.py'}:make"


def test_two_files_with_helpers_of_one_name(tmp_path):
    a, b = write_net(tmp_path / "a", "ReLU"), write_net(tmp_path / "b", "Sigmoid")
    for _ in range(2):
        assert [type(build_network(n, 10)[2]) for n in (a, b)] == [nn.ReLU, nn.Sigmoid]
    assert "helpers" not in sys.modules and str(tmp_path / "a") not in sys.path
    assert not list(tmp_path.rglob("__pycache__"))


def test_what_the_user_imported_stays_imported(tmp_path, monkeypatch):
    a = write_net(tmp_path / "a", "ReLU")
    mine = type(sys)("helpers")
    mine.__file__ = str(tmp_path / "elsewhere" / "helpers.py")
    monkeypatch.setitem(sys.modules, "helpers", mine)
    assert isinstance(build_network(a, 10)[2], nn.ReLU)
    assert sys.modules["helpers"] is mine


@pytest.mark.parametrize("edit", ["helpers.py", "net.py", "deep/inner.py", "numbers.json"])
def test_an_edited_helper_is_another_network(edit, tmp_path):
    write_net(tmp_path / "a", "ReLU", "\nimport deep.inner")
    (tmp_path / "a" / "deep").mkdir()
    inner = (
        "import json, pathlib\nsize = "
        "json.loads((pathlib.Path(__file__).parent.parent/'numbers.json').read_text())\n"
    )
    (tmp_path / "a" / "deep" / "inner.py").write_text(inner)
    (tmp_path / "a" / "numbers.json").write_text("10")
    (tmp_path / "a" / "net.py").write_text(
        (tmp_path / "a" / "net.py").read_text().replace("64, 10", "64, deep.inner.size")
    )
    path = tmp_path / "a" / "net.py"
    before = code_identity(path, "make")
    assert before == code_identity(path, "make")
    file = tmp_path / "a" / edit
    file.write_text("11" if edit.endswith("json") else file.read_text() + "\nx = 1\n")
    assert code_identity(path, "make") != before


def test_an_edit_of_the_same_length_within_a_second(tmp_path):
    a = write_net(tmp_path / "a", "ReLU")
    seen = []
    for act in ("ReLU", "SELU", "GELU", "SiLU"):
        (tmp_path / "a" / "helpers.py").write_text(f"from torch import nn\nact = nn.{act}\n")
        seen.append(type(build_network(a, 10)[2]).__name__)
    assert seen == ["ReLU", "SELU", "GELU", "SiLU"]


def test_random_numbers_of_any_kind_are_the_same_again(tmp_path):
    (tmp_path / "net.py").write_text(
        "import random\nimport numpy as np\nimport torch\nfrom torch import nn\ndef make():\n    "
        "net = nn.Linear(2, 2)\n"
        "    with torch.no_grad(): net.bias.copy_(torch.tensor([random.random(), np.random.rand()]))\n    return net\n"
    )
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert code_identity(tmp_path / "net.py", "make") == code_identity(tmp_path / "net.py", "make")
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_an_edited_helper_trains_again(tmp_path):
    a = write_net(tmp_path / "a", "ReLU")
    config = replace(
        TINY,
        data="digits",
        n_train=64,
        n_test=20,
        model=a,
        out=str(tmp_path / "run"),
        until="reference",
    )
    run(config, progress=False)
    assert reused(run(config, progress=False)) == ["reference"]
    write_net(tmp_path / "a", "Sigmoid")
    assert reused(run(config, progress=False)) == []


@pytest.mark.parametrize(
    "text, says",
    [
        ("import nothing_like_this\n", "ModuleNotFoundError"),
        ("def make(:\n", "SyntaxError"),
        ("def make(): 1/0\n", "ZeroDivisionError"),
        ("make = 3\n", "make is of type int, not a function"),
        ("x = 1\n", "no function 'make'"),
    ],
)
def test_files_that_fail_say_so_in_a_line(text, says, tmp_path):
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(ValueError, match=says):
        build_network(f"{tmp_path / 'net.py'}:make", 10)


# ---- results that were moved


def test_a_valid_file_under_another_key_is_refused(tmp_path):
    store = Store(tmp_path)
    for i in range(5):
        store.put(f"a/{i}", dict(x=torch.tensor(float(i))), dict(i=i))
    for i in range(5):
        other = (
            store.path(f"a/{(i + 1) % 5}").read_bytes() if i < 4 else store.path("a/1").read_bytes()
        )
        here = store.path(f"a/{i}")
        before = here.read_bytes()
        here.write_bytes(other)
        with pytest.raises(DamagedError, match=f"a/{i}.safetensors was stored under the key"):
            store.get(f"a/{i}")
        assert len(store.verify()) == 1
        here.write_bytes(before)
    assert store.verify() == []


def test_two_results_of_a_run_swapped(tmp_path):
    config = replace(
        TINY, data="digits", n_train=64, n_test=20, out=str(tmp_path), until="reference"
    )
    run(config, progress=False)
    run(replace(config, seed=1), progress=False)
    a, b = (tmp_path / "store").glob("reference-*")
    a.write_bytes(b.read_bytes())
    with pytest.raises(DamagedError, match="stored under the key"):
        run(config, progress=False)
        run(replace(config, seed=1), progress=False)


def test_measuring_again_trains_no_exits_again(tmp_path, monkeypatch):
    config = replace(
        TINY,
        data="digits",
        n_train=128,
        n_test=40,
        exits="blocks.0",
        exit_epochs=1,
        out=str(tmp_path),
    )
    run(config, progress=False)
    again = run(replace(config, n_latency=3), progress=False)
    assert "measure" not in reused(again) and "early_exit" in reused(again)


# ---- what a network is told


@pytest.mark.parametrize("index", [(0, 0, 0), (1, 2, 1), (0, 1), (0, 1, 10), (-1, 0, 1)])
def test_class_indices_that_can_only_be_right(index):
    with pytest.raises(ValueError, match="class_index"):
        find_classes(["a", "b", "c"], 10, index)


def test_counting_outputs_leaves_the_mode_alone():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).train()
    net[1].eval()
    assert count_outputs(net, (3, 8, 8)) == 5
    assert [m.training for m in net] == [True, False, True, True]


def test_a_library_leaves_its_teacher_alone(tmp_path):
    space = default_space(4, (3, 16, 16), 8, options=choices("basic", width=(1.0, 0.5)))
    teacher = space.build(space.reference).train()
    BlockLibrary(tmp_path, space, teacher)
    assert teacher.training and all(m.training for m in teacher.modules())


def test_a_bias_that_says_more_than_is_stored(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    weights = net.state_dict() | {"1.bias": torch.zeros(1).expand(2_000_000_000)}
    torch.save(weights, tmp_path / "tiny.pth")
    with pytest.raises(
        ValueError, match=r"1.bias has 2,000,000,000 numbers, of which 1 are stored"
    ):
        load_weights(tmp_path / "tiny.pth")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"frame": "x"}',
        '{"blocks": [], "frame": 3}',
        '{"blocks": "basic", "frame": "x"}',
        '{"blocks": [3], "frame": "x"}',
    ],
)
def test_text_that_is_no_architecture(text):
    with pytest.raises(ValueError, match="no architecture|no option"):
        Arch.from_json(text)


def test_costs_count_the_bits_of_each_layer():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    macs = {l.name: l.macs for l in profile(net, (3, 8, 8)).layers}
    for bits, first in ((8, 8), 8 * 8), ((4, 6), 4 * 8), ((None, 8), 32 * 8):
        q = quantize(net, x, layer_bits={"0": bits})
        second = 8 * (bits[1] if bits != (None, 8) else 8)
        assert cost_facts(net, (3, 8, 8), q)["bops"] == macs["0"] * first + macs["2"] * second
