"""Pictures of every kind, folders with loops and pipes, tables as people write them: handled
rightly, or refused by name."""

import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import mep.data as D


def decoded(path):
    return D._decode(path, 16, 16)


def wide(value):
    return np.full((16, 16), value)


# ---- depth, alpha, orientation


@pytest.mark.parametrize(
    "level, right", [(0, 0), (65535, 255), (32768, 128), (257, 1), (25700, 100)]
)
def test_sixteen_bits(level, right, tmp_path):
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(wide(level).astype(np.uint16)).save(tmp_path / name)
        assert decoded(tmp_path / name).unique().tolist() == [right]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_whose_white_is_not_known_are_refused_by_name(dtype, tmp_path):
    Image.fromarray(wide(0.5).astype(dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(D.DataError, match=r"deep.tif.*8 or 16 bits"):
        decoded(tmp_path / "deep.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode, tmp_path):
    black = Image.new(mode, (16, 16), 0)
    black.save(tmp_path / "clear.png")
    assert decoded(tmp_path / "clear.png").unique().tolist() == [255]
    Image.new("RGBA", (16, 16), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert decoded(tmp_path / "half.png").unique().tolist() == [127]
    Image.new("RGBA", (16, 16), (10, 20, 30, 255)).save(tmp_path / "solid.png")
    assert decoded(tmp_path / "solid.png")[:, 0, 0].tolist() == [10, 20, 30]


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "p.png", transparency=1)
    assert decoded(tmp_path / "p.png").unique().tolist() == [255]


@pytest.mark.parametrize(
    "note, corner", [(1, (0, 0)), (3, (15, 15)), (6, (0, 15)), (8, (15, 0)), (2, (0, 15))]
)
def test_the_note_how_to_turn_it_is_obeyed(note, corner, tmp_path):
    image = Image.new("RGB", (16, 16), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[274] = note
    image.save(tmp_path / "turned.png", exif=exif)
    x = decoded(tmp_path / "turned.png")
    row, column = corner
    assert x[:, row, column].tolist() == [255] * 3 and int((x > 0).sum()) == 3


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes(mode, tmp_path):
    path = tmp_path / ("x.png" if mode in "1L" else "x.jpg")
    Image.new("RGB", (16, 16), "white").convert(mode).save(path)
    assert int(decoded(path).min()) >= 253


def test_what_a_decoder_raises_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(D.DataError, match="bomb.png"):
        decoded(tmp_path / "bomb.png")


# ---- folders


def fill(folder, n=6, classes=("blue", "red")):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (16, 16), (i, len(name), 0)).save(folder / name / f"{i}.png")


def total(folder):
    d = D.load(f"folder:{folder}", size=16, n_valid=0)
    return len(d.train.dataset) + len(d.test.dataset)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("to", ["..", ".", "../..", "../red"])
def test_links_that_lead_back_add_no_pictures(to, tmp_path):
    fill(tmp_path / "data")
    (tmp_path / "data" / "red" / "loop").symlink_to(to, target_is_directory=True)
    (tmp_path / "data" / "blue" / "loop").symlink_to("../blue/.", target_is_directory=True)
    assert total(tmp_path / "data") == 12


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_to_another_class_is_refused_by_name(tmp_path):
    fill(tmp_path)
    (tmp_path / "red" / "more").symlink_to("../blue", target_is_directory=True)
    with pytest.raises(D.DataError, match="same file, with two labels"):
        total(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_pictures_elsewhere_may_be_linked(tmp_path):
    fill(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    for name in ("blue", "red"):
        (tmp_path / "here" / name).symlink_to(
            tmp_path / "elsewhere" / name, target_is_directory=True
        )
    assert total(tmp_path / "here") == 12
    (tmp_path / "here" / "red" / "again.png").symlink_to(tmp_path / "elsewhere" / "red" / "0.png")
    assert total(tmp_path / "here") == 12


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_pipes_and_links_to_nothing_are_refused_and_not_waited_for(tmp_path):
    fill(tmp_path)
    os.mkfifo(tmp_path / "red" / "pipe.png")
    said = []

    def look():
        try:
            total(tmp_path)
        except D.DataError as e:
            said.append(str(e))

    t = threading.Thread(target=look, daemon=True)
    t.start()
    t.join(60)
    assert said and "pipe.png is no file" in said[0]
    os.remove(tmp_path / "red" / "pipe.png")
    (tmp_path / "red" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(D.DataError, match="gone.png can't be read"):
        total(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_the_same_file_in_train_and_test(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    os.remove(tmp_path / "test" / "red" / "0.png")
    os.link(tmp_path / "train" / "red" / "0.png", tmp_path / "test" / "red" / "0.png")
    with pytest.raises(D.DataError, match="trained on"):
        total(tmp_path)


def test_an_empty_class_is_named(tmp_path):
    fill(tmp_path)
    (tmp_path / "green").mkdir()
    with pytest.raises(FileNotFoundError, match="green has no pictures"):
        total(tmp_path)


# ---- labels.csv


def table(folder, text, n=6, encoding="utf-8"):
    for i in range(n):
        Image.new("RGB", (16, 16), (i * 10, 0, 0)).save(folder / f"{i}.png")
    (folder / "labels.csv").write_text(text, encoding=encoding)
    return D._listing(folder)


ROWS = [(f"{i}.png", i % 3) for i in range(6)]


def lines(mark=",", head="", quote=""):
    return head + "".join(f"{quote}{f}{quote}{mark}{quote}{y}{quote}\n" for f, y in ROWS)


@pytest.mark.parametrize(
    "text",
    [
        lines(),
        lines(head="file,label\n"),
        lines(";"),
        lines(";", "file;label\n"),
        lines("\t"),
        lines(quote='"'),
        lines(head='"file","label"\n', quote='"'),
        "\n" + lines(),
        lines().replace(",", ", "),
        "\ufeff" + lines(head="file,label\n"),
        lines().replace("\n", "\r\n"),
    ],
)
def test_tables_as_people_write_them(text, tmp_path):
    paths, labels, classes = table(tmp_path, text)
    assert (
        [p.name for p in paths] == [f for f, _ in ROWS]
        and labels == [y for _, y in ROWS]
        and classes == ["0", "1", "2"]
    )


def test_labels_may_be_names(tmp_path):
    text = "".join(f"{f},{'cat' if y else 'a, dog'}\n" if y else f'{f},"a, dog"\n' for f, y in ROWS)
    _, labels, classes = table(tmp_path, text)
    assert classes == ["a, dog", "cat"] and labels == [int(y > 0) for _, y in ROWS]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "lists no pictures"),
        ("\n\n", "lists no pictures"),
        ("file,label\n", "lists no pictures"),
        ("0.png\n1.png\n", "has no label"),
        ("0.png,-1\n1.png,0\n", "'-1' is no number from 0"),
        ("0.png,1.5\n1.png,1\n", "1.5"),
        ("0.png,99999999999999999999\n", "too large"),
        ("0.png,2000000\n", "too large"),
        ("9.png,1\n", "9.png can't be read"),
        (",1\n0.png,1\n", "is no file"),
        ("0.png,1\n0.png,2\n", "two labels"),
        ("0.png,1\n1.png,cat\n", "'cat'"),
    ],
)
def test_tables_that_cannot_be_read_right(text, says, tmp_path):
    with pytest.raises(D.DataError, match=says.replace(".", r"\.")):
        table(tmp_path, text)


def test_another_encoding(tmp_path):
    for encoding in ("utf-16", "latin-1"):
        with pytest.raises(D.DataError, match="isn't UTF-8"):
            table(tmp_path, "0.png,ähnlich\n1.png,ö\n", encoding=encoding)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "a/../../secret.png",
        "/etc/passwd.png",
        "..\\secret.png",
        "C:\\x.png",
        "C:x.png",
        "\\\\host\\x.png",
    ],
)
def test_a_path_out_of_the_folder(name, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    with pytest.raises(D.DataError, match="leads out of the folder"):
        table(tmp_path / "data", f"0.png,0\n{name},1\n")


# ---- what a data set is


@pytest.mark.parametrize(
    "kw",
    [
        dict(std=[0.0]),
        dict(std=[float("nan")]),
        dict(std=[-1]),
        dict(mean=[float("inf")]),
        dict(mean=[0.1, 0.2, 0.3]),
        dict(mean="abc"),
        dict(std=[True]),
    ],
)
def test_scales_that_make_no_numbers(kw):
    with pytest.raises(ValueError, match=next(iter(kw))):
        D.load("digits", n_train=20, **kw)


def test_the_fingerprint_sees_every_picture_and_label(tmp_path):
    fill(tmp_path)

    def read():
        return D.load(f"folder:{tmp_path}", size=16, n_valid=2)

    seen = [D.fingerprint(read())]
    for i in range(6):
        Image.new("RGB", (16, 16), (200, i, 0)).save(tmp_path / "red" / f"{i}.png")
        seen.append(D.fingerprint(read()))
    assert len(set(seen)) == 7


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_the_fingerprint_sees_each_part(part):
    d = D.load("digits", n_train=50, n_valid=20, n_test=20)
    before = D.fingerprint(d)
    images = getattr(d, part).dataset
    images.labels[7] = (images.labels[7] + 1) % 10
    labels = D.fingerprint(d)
    images.pixels[3, 0, 2, 2] ^= 1
    assert len({before, labels, D.fingerprint(d)}) == 3


def test_files_too_many_for_memory_have_a_fingerprint(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr(D, "_MEMORY", 0)

    def read():
        return D.fingerprint(D.load(f"folder:{tmp_path}", size=16, n_valid=2))

    before = read()
    assert before == read()
    Image.new("RGB", (16, 16), "white").save(tmp_path / "blue" / "3.png")
    assert read() != before


def test_loaders_leave_the_global_random_numbers_alone():
    d = D.load("digits", n_train=100, n_test=20)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for loader in (d.train, d.valid, d.test):
        list(loader)
    assert torch.equal(before, torch.get_rng_state())
