"""The examples of CONTRIBUTING.md, run as they stand there: from Python, from the command line,
and in worker processes. And what a user's file does wrong."""

import json
import re
import shlex
from pathlib import Path

import joblib
import pytest
import torch

from mep.compress import COMPRESSIONS, compress, load_compressed, save_compressed
from mep.compress.select import Plan, apply_plan
from mep.data import DATASETS, Source, check_name, fingerprint, load
from mep.nas import CELLS, BlockLibrary, make_cell
from mep.nas.finetune import trained_accuracies
from mep.nas.space import choices, default_space
from mep.pipeline import options
from mep.pipeline import report as reports
from mep.pipeline.cli import main
from mep.pipeline.core import quantize_by
from mep.pipeline.options import STAGE_RECORDS, Config, command, config_from, option, stage
from mep.quant import ROUNDINGS
from mep.registry import carried, user_function
from mep.train import small_resnet

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))
COMMANDS = {
    name: next(c for c in re.findall(r"^mep run .*$", PAGE, re.M) if name in c) for name in FILES
}
TINY = "--epochs 1 --n-train 128 --n-test 50 --n-calib 32 --n-latency 3 --quiet".split()


@pytest.fixture(autouse=True)
def registries():
    "What a test registers is gone after it."
    before = [(r, dict(r)) for r in (CELLS, COMPRESSIONS, DATASETS, ROUNDINGS, STAGE_RECORDS)]
    yield
    for records, known in before:
        records.clear()
        records.update(known)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with the page's files, to work in"
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name, *more):
    "The page's command for a file, made small; what it wrote"
    words = [*shlex.split(COMMANDS[name])[1:], *TINY, *more]
    assert main(words) == 0
    return reports.read(words[words.index("--out") + 1])


def reused(report):
    return [s["stage"] for s in report.stages if s["reused"]]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refuses(capsys, words, says):
    assert main(words.split()) == 2
    assert says in capsys.readouterr().err


def test_the_page_has_them_all():
    assert list(FILES) == ["squeezed.py", "stripes.py", "sparse.py", "grouped.py", "pruned.py"]
    assert all(len(text.splitlines()) <= 16 for text in FILES.values())


def test_a_cell(folder):
    with user_function("squeezed.py:network") as (network, _):
        net = network()
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert make_cell("squeezed", 8, 16, stride=2)(torch.zeros(1, 8, 8, 8)).shape == (1, 16, 4, 4)
    report = run("squeezed.py")
    assert list(report.nets) == ["FP32", "INT8"]


def test_a_cell_in_a_worker_process(folder):
    data = load("digits", n_train=64, n_valid=32, n_test=32, augment=False)
    with user_function("squeezed.py:squeezed"):
        pass
    options = [*choices("squeezed"), *choices("basic")]
    space = default_space(10, (1, 8, 8), width=4, stem_stride=1, options=options)
    teacher = space.build(space.reference).eval()
    library = BlockLibrary(folder / "library", space, teacher)
    library.train(data, epochs=1, progress=False)
    archs = space.sample(2, 0)
    assert any("squeezed" in str(a) for a in archs)
    found = trained_accuracies(archs, library, data, epochs=1, n_jobs=2, progress=False)
    assert found.shape == (2,)


def test_a_data_set(folder, capsys):
    data = load("stripes.py:stripes", n_train=40, n_test=20, n_valid=0, period=6)
    assert (len(data.train.dataset), data.classes) == (40, ["upright", "flat"])
    assert data.input_shape == (1, 16, 16)
    assert (
        len(load("stripes", n_train=40).test.dataset) == 100
    )  # by its name, once the file was run
    until = ("--until", "reference")
    assert run("stripes.py", *until).data["classes"] == ["upright", "flat"]
    assert reused(run("stripes.py", *until)) == ["reference"]
    edit(folder / "stripes.py", "period=4", "period=6")
    assert reused(run("stripes.py", *until)) == []


def test_a_rounding_method(folder):
    report = run("sparse.py")
    assert list(report.nets) == ["FP32", "W4A8", "W4A8 sparse"]
    assert report.nets["W4A8 sparse"]["method"] == "sparse, a range per channel"
    assert {"quantize nearest", "quantize sparse.py:sparse"} <= set(reused(run("sparse.py")))
    edit(folder / "sparse.py", "share=0.1", "share=0.3")
    again = run("sparse.py")
    assert "quantize nearest" in reused(again)
    assert "quantize sparse.py:sparse" not in reused(again)


def test_a_rounding_method_for_one_file(folder):
    words = (
        "quantize --model squeezed.py:network --data digits --n-train 64 --n-test 32 "
        "--n-latency 3 --method sparse.py:sparse --quiet -o q.onnx"
    )
    assert main(words.split()) == 0
    assert (folder / "q.onnx").is_file()


def zeros(q):
    "How many weights are 0"
    return sum(int((layer.weight_q == 0).sum()) for layer in q.layers().values())


def job(method, share):
    net = small_resnet(10, 1, width=4).eval()
    images = torch.linspace(-1, 1, 16 * 64).view(16, 1, 8, 8)
    return zeros(quantize_by(method, net, images, progress=False, share=share))


@pytest.mark.parametrize("method", ["sparse.py:sparse", "sparse"])
def test_a_rounding_method_in_a_worker_process(method, folder):
    with user_function("sparse.py:sparse"):
        pass
    path = method.replace("sparse.py", str(folder / "sparse.py"))
    jobs = (joblib.delayed(carried(job))(path, share) for share in (0, 0.5))
    few, many = joblib.Parallel(2)(jobs)
    assert few < many


def test_a_method_that_learns_from_labels(folder):
    (folder / "labels.py").write_text(
        "from mep.quant import quantize, rounding\n"
        "@rounding('taught', 'looks at labels')\n"
        "def taught(model, data, w_bits=8, a_bits=8):\n"
        "    x, y = next(iter(data.train))\n"
        "    assert len(x) == len(y)\n"
        "    return quantize(model, x, w_bits, a_bits, progress=False)\n"
    )
    net = small_resnet(10, 1, width=4).eval()
    data = load("digits", n_train=64)
    assert quantize_by("labels.py:taught", net, data=data).layers()
    with pytest.raises(ValueError, match="taught needs images with labels"):
        quantize_by("labels.py:taught", net, torch.zeros(4, 1, 8, 8))


def test_a_compression_method(folder):
    report = run("grouped.py", "--n-train", "512")
    assert list(report.nets) == ["FP32", "compressed", "INT8"]
    assert any("grouped" in note for note in report.notes)
    assert {"reference", "compress"} <= set(reused(run("grouped.py", "--n-train", "512")))
    edit(folder / "grouped.py", "(4, 2)", "(8, 4, 2)")
    assert (
        "reference" in (again := reused(run("grouped.py", "--n-train", "512")))
        and "compress" not in again
    )


def test_a_compression_method_for_one_file(folder, capsys):
    words = (
        "compress --model squeezed.py:network --data digits --n-train 128 --n-test 32 --macs 0.7 "
        "--n-latency 3 --compress-by grouped.py:grouped --quiet -o c.onnx"
    )
    assert main(words.split()) == 0
    assert (folder / "c.onnx").is_file()
    refuses(capsys, words.replace("c.onnx", "grouped.py"), "also the file of --compress-by")
    refuses(capsys, words.replace(":grouped ", ":grouped,grouped "), "names grouped 2 times")
    refuses(capsys, words.replace(":grouped ", ":grown "), "has no function 'grown'")


@pytest.mark.parametrize("method", ["grouped.py:grouped", "grouped"])
def test_a_compression_method_in_a_worker_process(method, folder):
    with user_function("grouped.py:grouped"):
        pass
    net = small_resnet(10, 1, width=8).eval()
    images = torch.linspace(-1, 1, 64 * 64).sin().view(64, 1, 8, 8)
    how = dict(macs=0.7, steps=2, fit_steps=4, progress=False)
    found = [compress(net, images, methods=(method,), n_jobs=n, **how) for n in (1, 2)]
    rows = [[(r.method, r.rank) for r in small.report] for small in found]
    assert rows[0] == rows[1]
    assert {m for m, _ in rows[0]} == {"", "grouped"}
    y = [small.model(images) for small in found]
    assert torch.equal(*y)


def test_a_compression_method_beside_channels(folder):
    "Groups of what is left of a layer, in a file that is read again"
    with user_function("grouped.py:grouped"):
        pass
    net = small_resnet(10, 1, width=4).eval()
    images = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    how = dict(shares=(0.3, 0.6), steps=2, fit_steps=4, progress=False)
    small = compress(net, images, macs=0.5, methods=("grouped", "channel"), **how)
    assert small.report.plan.channels
    assert small.report.share <= 0.5
    save_compressed(folder / "c.safetensors", small.model, small.report.plan)
    again = load_compressed(folder / "c.safetensors", net)
    assert torch.equal(again(images), small.model(images))
    plain = compress(net, images, macs=0.7, methods=("grouped",), refit=False, **how)
    assert plain.model(images).isfinite().all()


def test_a_plan_of_a_method_that_is_not_there(folder):
    plan = Plan((1, 8, 8), {"blocks.0.body.0": ("grouped", 2)})
    with pytest.raises(ValueError, match="method 'grouped' is unknown"):
        apply_plan(small_resnet(10, 1, width=8), plan)


def test_a_stage(folder, capsys):
    report = run("pruned.py")
    assert list(report.nets) == ["FP32", "pruned", "INT8"]
    assert (folder / "runs/pruned/pruned.onnx").is_file()
    assert report.config["share"] == 0.3
    assert {"pruned", "quantize nearest"} <= set(reused(run("pruned.py")))
    again = reused(run("pruned.py", "--share", "0.4"))
    assert "reference" in again and not {"pruned", "quantize nearest"} & set(again)
    edit(folder / "pruned.py", "dict(pruned=facts)", "dict(pruned=facts | dict(method='pruned'))")
    assert "pruned" not in reused(run("pruned.py", "--share", "0.4"))
    config = json.loads((folder / "runs/pruned/config.json").read_text())
    assert config["share"] == 0.4
    assert {"pruned.py:pruned", "--share"} <= set(shlex.split(command(config_from(config))))
    assert main(["run", "--config", "runs/pruned/config.json", "--share", "0.4", "--quiet"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main("run --stage pruned.py:pruned --help".split())
    assert "share of the weights to set to zero (default: 0.5)" in capsys.readouterr().out


def test_what_is_registered_goes_along_to_worker_processes(folder):
    for name in ("squeezed.py:squeezed", "stripes.py:stripes", "pruned.py:pruned"):
        with user_function(name):
            pass
    found = joblib.Parallel(2)(joblib.delayed(carried(names_known))() for _ in range(2))
    assert all({"squeezed", "stripes", "pruned"} <= set(names) for names in found)


def names_known():
    return [*CELLS, *DATASETS, *STAGE_RECORDS]


def test_the_options_know_the_methods():
    "Their help is there before PyTorch is"
    assert options.COMPRESSIONS == list(COMPRESSIONS)
    assert list(ROUNDINGS) == options.METHODS


def test_a_stage_does_not_write_over_what_is_there(folder, capsys):
    (folder / "runs/pruned").mkdir(parents=True)
    (folder / "runs/pruned/pruned.onnx").write_text("somebody's")
    words = [*shlex.split(COMMANDS["pruned.py"])[1:], *TINY]
    assert main(words) == 2
    assert "not written by mep" in capsys.readouterr().err
    assert (folder / "runs/pruned/pruned.onnx").read_text() == "somebody's"


def test_stages_that_cannot_be_had(folder, capsys):
    (folder / "plain.py").write_text("def dense(state): pass\n")
    (folder / "late.py").write_text(
        "from mep.pipeline import stage\n@stage('late', before='lunch')\ndef late(state): pass\n"
    )
    for name, says in (
        ("plain.py:dense", "is not registered: write @stage(...)"),
        ("pruned.py:dense", "has no function 'dense'"),
        ("none.py:pruned", "no file none.py"),
        ("prunde", "unknown stage 'prunde'"),
        ("late.py:late", "unknown stage 'lunch'; known: load_data"),
        ("pruned.py:pruned --share 2", "share=2.0: give a number from 0 to 1"),
        ("pruned.py:pruned,pruned.py:pruned", "two stages have an option 'share'"),
    ):
        refuses(capsys, f"run --data digits --stage {name} --out r", says)


def test_arguments_of_a_stage():
    def untyped(state, *, share=option(0.5, "")): ...
    def unknown(state, *, shares): ...
    def taken(state, *, seed: int = option(0, "")): ...

    for make, says in (
        (untyped, "annotate 'share' as one of int, float, str, tuple, bool"),
        (unknown, "'shares' is no option of a run"),
        (taken, "every run has an option 'seed'"),
    ):
        with pytest.raises(ValueError, match=says):
            stage("")(make)
    assert Config(stage="a").stage == "a"


WRONG = [
    ("none.py:stripes", "no file none.py with a function stripes"),
    ("wrong.py:nothing", "has no function 'nothing': it returns a mep.data.Data"),
    ("wrong.py:number", "wrong.py:number returned a int: it must return a mep.data.Data"),
    ("wrong.py:fails", "wrong.py:fails failed (KeyError: 'x')"),
    ("broken.py:stripes", "can't be run (SyntaxError"),
]


@pytest.mark.parametrize("name, says", WRONG)
@pytest.mark.parametrize(
    "command", ["run --out r", "compress -o c.onnx --model squeezed.py:network"]
)
def test_data_that_cannot_be_had(name, says, command, folder, capsys):
    (folder / "wrong.py").write_text("def number(): return 3\ndef fails(): return {}['x']\n")
    (folder / "broken.py").write_text("def stripes(:\n")
    refuses(capsys, f"{command} --data {name} --quiet", says)


def test_methods_that_cannot_be_had(folder, capsys):
    (folder / "plain.py").write_text("def floor(model, images, w_bits, a_bits): return model\n")
    for name, says in (
        ("plain.py:floor", "is not registered: write @rounding(...)"),
        ("sparse.py:dense", "has no function 'dense'"),
        ("none.py:sparse", "no file none.py"),
        ("sparse.py:sparse,sparse.py:sparse", "names sparse 2 times"),
        ("spares", "choose nearest, dfq, adaround"),
    ):
        refuses(capsys, f"run --data digits --method {name} --out r", says)
    refuses(
        capsys, "run --method sparse.py:sparse --n-calib 0 --out r", "needs images; only method=dfq"
    )


def test_a_file_that_is_read_is_not_written_over(folder, capsys):
    command = (
        "quantize --model squeezed.py:network --data digits --method sparse.py:sparse -o sparse.py"
    )
    refuses(capsys, command, "sparse.py is also the file of --method")


def test_a_whole_data_and_what_it_does_not_take(folder):
    (folder / "whole.py").write_text(
        "import torch\nfrom mep.data import from_arrays\n"
        "x = torch.arange(40 * 64).remainder(255).byte().view(40, 1, 8, 8)\n"
        "def images(batch_size): return from_arrays(x, torch.arange(40) % 2, x, torch.arange(40) % 2,\n"
        "    batch_size=batch_size)\n"
    )
    data = load("whole.py:images", batch_size=10)
    assert len(next(iter(data.train))[0]) == 10
    with pytest.raises(TypeError, match="takes no n_train: leave it out, or make it a parameter"):
        load("whole.py:images", n_train=10)
    check_name("whole.py:images")


def test_code_counts_where_pictures_are_alike(folder):
    "An augmentation is in no picture, and still another one is another training."
    prints = [fingerprint(load("stripes.py:stripes"))]
    edit(folder / "stripes.py", "return Source", "# flipped\n    return Source")
    prints.append(fingerprint(load("stripes.py:stripes")))
    assert prints[0] != prints[1]
    assert load("digits", n_train=40).code is None


def test_a_source_takes_no_size_that_its_function_does_not(folder):
    with pytest.raises(TypeError, match="stripes takes no size"):
        load("stripes.py:stripes", size=32)
    assert Source._fields[:4] == ("x", "y", "x_test", "y_test")
