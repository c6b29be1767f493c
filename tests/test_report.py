"""The report: well-formed, self-contained, readable by screen readers, true to its numbers."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mep.pipeline.report import (
    Report,
    accuracy_se,
    change,
    figure_fronts,
    headline,
    html,
    read,
    si,
    table,
    text,
    write,
)
from mep.plot import INK, PAPER, SOFT


def net(**kw):
    return (
        dict(
            accuracy=0.912,
            accuracy_se=0.0063,
            n_test=2000,
            bytes=1_098_000,
            w_bits=32,
            a_bits=32,
            params=272_000,
            macs=41_000_000,
            bops=41_984_000_000,
            ms=2.31,
            ms_p10=2.24,
            ms_p90=2.52,
        )
        | kw
    )


INT8 = net(
    accuracy=0.9095,
    change=-0.0025,
    change_se=0.0012,
    agreement=0.989,
    sqnr_db=28.8,
    bytes=298_000,
    smaller=3.7,
    ms=0.98,
    ms_p10=0.95,
    ms_p90=1.1,
    speedup=2.36,
    speedup_lo=2.31,
    speedup_hi=2.4,
    w_bits=8,
    a_bits=8,
)


def report(**kw):
    return Report(
        **dict(
            title="small_resnet on shapes",
            command="mep run --out 'a b'",
            config=dict(data="shapes"),
            data=dict(name="shapes", classes=["a<b", "c&d"]),
            nets={"FP32": net(), "INT8": INT8},
            layers=[
                dict(net="INT8", name="conv1", sqnr_db=41.0),
                dict(net="INT8", name="fc", sqnr_db=44.0),
            ],
            stages=[dict(stage="measure", seconds=1.5, reused=True)],
            environment=dict(cpu="some CPU", torch="2"),
        )
        | kw
    )


def tree(page):
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.split("\n", 1)[1])


class Loads(HTMLParser):
    "Everything that a browser would fetch."

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [
            v
            for k, v in attrs
            if k in ("src", "href", "xlink:href", "data", "srcset", "poster")
            and not v.startswith(("#", "data:"))
        ]
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)


def test_page_is_well_formed_and_loads_nothing():
    page = html(report())
    tree(page)
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert len(page) < 300_000


def test_page_is_accessible():
    root = tree(html(report()))
    assert root.get("lang") == "en" and root.find("head/title").text == "small_resnet on shapes"
    figures = root.findall(".//{http://www.w3.org/2000/svg}svg")
    assert len(figures) == 2 and all(
        f.get("role") == "img" and f.get("aria-label") for f in figures
    )
    heads = [th for th in root.iter("th")]
    assert heads and all(th.get("scope") in ("row", "col") for th in heads)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))


def test_figures_follow_the_page_into_dark_mode():
    page = html(report())
    assert "prefers-color-scheme: dark" in page and "var(--ink)" in page
    figures = page[page.index("<svg") : page.rindex("</svg>")]
    assert not any(c in figures for c in (INK, PAPER, SOFT))


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), max_size=30))
def test_any_text_is_escaped(s):
    tree(
        html(
            report(
                title=s,
                notes=[s],
                config={"x": s},
                layers=[],
                nets={"FP32": dict(params=1), s: dict(params=2)},
            )
        )
    )


@pytest.mark.parametrize(
    "nets",
    [
        {},
        {"FP32": dict(params=1, macs=2)},
        {"FP32": net()},
        {"FP32": net(), "INT8": INT8, "W4A8": INT8},
    ],
)
def test_unfinished_runs_have_a_report_too(nets):
    r = report(nets=nets, layers=[], environment={})
    tree(html(r))
    assert isinstance(str(r), str)
    assert (headline(r) == "") == (len(nets) < 2)


def test_text_and_page_say_the_same():
    r = report()
    words = "".join(tree(html(r)).itertext())
    for label, how, cells in table(r):
        assert label in text(r) and label in words and how in words
        assert all(c in text(r) and c in words for c in cells)
    assert headline(r) in text(r) and headline(r) in words


def test_layers_of_several_networks_stand_side_by_side():
    layers = [
        dict(net=n, name=name, sqnr_db=db)
        for n, name, db in (
            ("INT8", "conv1", 41.0),
            ("INT8", "fc", 44.0),
            ("INT8 dfq", "conv1", 51.5),
            ("INT8 dfq", "add", 60.0),
        )
    ]
    page = tree(html(report(layers=layers)))
    rows = {r[0].text: [d.text for d in r[1:]] for r in page.find(".//details").iter("tr")}
    assert rows == {
        "layer": ["INT8: SQNR at the output (dB)", "INT8 dfq: SQNR at the output (dB)"],
        "conv1": ["41.0", "51.5"],
        "fc": ["44.0", "–"],
        "add": ["–", "60.0"],
    }


def test_a_searchs_fronts_are_drawn_and_its_foretelling_is_told(tmp_path):
    r = report(
        nets={"FP32": net(), "searched": INT8 | dict(predicted=0.9, predicted_ms=0.9)},
        fronts={"1 thread": [(0.4, 0.5), (1.0, 0.6)], "a<b": [(0.3, 0.4)]},
    )
    assert len(tree(html(r)).findall(".//{http://www.w3.org/2000/svg}svg")) == 3
    assert "accuracy, as predicted" in text(r) and "90.0 %" in text(r) and "0.9 ms" in text(r)
    write(r, tmp_path)
    assert html(read(tmp_path)) == html(r)
    assert figure_fronts(report()) is None


def test_slower_is_called_slower():
    r = report(nets={"FP32": net(), "INT8": INT8 | dict(speedup=0.5)})
    assert "2.0 times slower" in headline(r)


def test_written_and_read(tmp_path):
    r = report()
    page = write(r, tmp_path)
    assert page.read_text(encoding="utf-8") == html(r)
    again = read(tmp_path)
    assert again.nets == r.nets and html(again) == html(r)
    json.loads(
        (tmp_path / "results.json").read_text(),
        parse_constant=lambda c: pytest.fail(f"{c} is no JSON"),
    )


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run here"):
        read(tmp_path)
    for bad in ("{", "[]", '{"unknown": 1}'):
        (tmp_path / "results.json").write_text(bad)
        with pytest.raises(ValueError, match="isn't a report of mep"):
            read(tmp_path)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50))
def test_change_is_the_paired_difference(pairs):
    before, after = np.array(pairs).T
    d, se = change(before, after)
    assert math.isclose(d, after.mean() - before.mean(), abs_tol=1e-12)
    assert (
        se <= accuracy_se(before.mean(), len(pairs)) + accuracy_se(after.mean(), len(pairs)) + 1e-12
    )


@given(st.floats(1, 1e14))
def test_si_keeps_three_digits(x):
    number, *prefix = si(x).split()
    back = float(number) * 1000 ** " kMGT".index((prefix or [" "])[0])
    assert math.isclose(back, x, rel_tol=0.0051)
