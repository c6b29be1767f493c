"""The book hangs together: sidebar, links, anchors, cross references, stored outputs. Quarto
is not needed: what it would do is computed here."""

import ast
import configparser
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import normpath

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
conf = configparser.ConfigParser()
conf.read(ROOT / "settings.ini")
CONF = conf["DEFAULT"]
REPO, BRANCH = f"{CONF['user']}/{CONF['repo']}", CONF["branch"]
COLAB = f"https://colab.research.google.com/github/{REPO}/blob/{BRANCH}/"
GITHUB = re.compile(
    rf"https://github\.com/{re.escape(REPO)}/(?:blob|tree|raw)/{re.escape(BRANCH)}/"
)
SITE = CONF["doc_host"] + CONF["doc_baseurl"]


# Reading the book


def notebooks():
    "Every notebook of the book, relative to nbs/, by name."
    found = (p.relative_to(NBS) for p in NBS.rglob("*.ipynb"))
    return sorted(p.as_posix() for p in found if not any(part[0] in "._" for part in p.parts))


def sidebar():
    "The notebooks in the sidebar, in order."

    def flat(items):
        for item in items:
            if isinstance(item, str):
                yield item
            elif "contents" in item:
                yield from flat(item["contents"])
            elif "href" in item:
                yield item["href"]

    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    return list(flat(site["sidebar"]["contents"]))


def number(path):
    "30 for quant/30_grid.ipynb; None for a page without a number."
    found = re.match(r"(\d+)_", PurePosixPath(path).name)
    return int(found[1]) if found else None


def is_chapter(path):
    "Whether a notebook has a number or exports a module: a few foundations have a name alone."
    text = (NBS / path).read_text(encoding="utf-8")
    return number(path) is not None or "#| default_exp" in text


NOTEBOOKS = notebooks()
CHAPTERS = [p for p in NOTEBOOKS if is_chapter(p)]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS)
each_chapter = pytest.mark.parametrize("path", CHAPTERS)


def cells(path, folder=NBS):
    return json.loads((folder / path).read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def directives(cell):
    return re.findall(r"^#\|\s*(.+?)\s*$", source(cell), re.M)


def report(problems):
    "Fail with one line per problem."
    if problems := list(problems):
        pytest.fail("\n".join(problems), pytrace=False)


# Markdown, as pandoc reads it

CODE = re.compile(r"^[ \t]*(```+|~~~+).*?^[ \t]*\1|(`+)(?!`).+?(?<!`)\2(?!`)", re.M | re.S)
MATH = re.compile(r"\$\$.+?\$\$|(?<!\\)\$(?!\s)[^$\n]+?(?<!\s)\$(?!\d)", re.S)
IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
LINK = re.compile(r"\[[^\[\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
DEFINED = re.compile(r"^\[[^\]^]+\]:\s*<?([^\s>]+)>?", re.M)  # [name]: target
ATTRIBUTE = re.compile(r"""<[^>]*\b(?:href|src)\s*=\s*["']([^"']+)["']""")
CROSS_REFERENCE = re.compile(r"(?<![\w`@.])@((?:fig|tbl|sec|eq|lst)-[\w-]*\w)")
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", re.M)
GIVEN_ID = re.compile(r"\{[^}]*#([\w.:-]+)[^}]*\}|<\w+[^>]*\b(?:id|name)=[\"']([^\"']+)[\"']")


def prose(text):
    "Markdown without its code and formulas."
    return MATH.sub("", CODE.sub("", text))


def links(text):
    "Every target in a piece of markdown: images, links (also around images), definitions, HTML."
    text = prose(text)
    images = IMAGE.findall(text)
    text = IMAGE.sub("", text)
    return images + LINK.findall(text) + DEFINED.findall(text) + ATTRIBUTE.findall(text)


def identifier(heading):
    """pandoc's auto_identifiers: no formatting, letters digits _ - . kept, words joined by -,
    lower case, from the first letter on."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link's text
    text = re.sub(r"(?<!\w)_(.+?)_(?!\w)", r"\1", text)  # emphasis
    text = re.sub(r"(?<=[^-])-{2,3}(?=[^-])", "", text)  # smart dashes
    text = "-".join(re.sub(r"[^\w\s.-]", "", text).lower().split())
    return re.sub(r"^[^a-zA-Z]+", "", text) if re.search(r"[^\W\d_]", text) else "section"


def ids(texts):
    "Every anchor in a page's markdown, with pandoc's -1, -2 for repeated headings."
    found, seen = set(), {}
    for text in texts:
        text = re.sub(r"^[ \t]*(```+|~~~+).*?^[ \t]*\1", "", text, flags=re.M | re.S)
        found.update(a or b for a, b in GIVEN_ID.findall(text))
        for heading in HEADING.findall(text):
            if GIVEN_ID.search(heading):
                continue
            name = identifier(re.sub(r"\{[^}]*\}\s*$", "", heading))
            found.add(name + (f"-{seen[name]}" if name in seen else ""))
            seen[name] = seen.get(name, 0) + 1
    return found


@pytest.mark.parametrize(
    "heading, expected",
    [
        ("Heading identifiers in HTML", "heading-identifiers-in-html"),
        ("Maître d'hôtel", "maître-dhôtel"),
        ("*Dogs*?--in *my* house?", "dogsin-my-house"),
        ("[HTML], [S5], or [RTF]?", "html-s5-or-rtf"),
        ("3. Applications", "applications"),
        ("33", "section"),
        ("`fake_quant`, again", "fake_quant-again"),
        ("Symmetric or asymmetric?", "symmetric-or-asymmetric"),
        ("a - b", "a---b"),
        ("W4A8: [a link](x.ipynb)", "w4a8-a-link"),
    ],
)
def test_identifiers_are_pandocs(heading, expected):
    assert identifier(heading) == expected


def test_links_and_anchors_are_found_where_they_are():
    text = (
        "[a](x.ipynb#y) ![b](p.png) [![c](q.svg)](z.html) `[no](code)` $[no](math)$ <a "
        "href='h.html'>\n\n[d]: e.ipynb\n```\n[no](fence)\n```\n"
    )
    assert sorted(links(text)) == ["e.ipynb", "h.html", "p.png", "q.svg", "x.ipynb#y", "z.html"]
    assert ids(
        ["# A title\n\n## Twice", "## Twice\n\n```\n## not one\n```\n### Named {#sec-own}"]
    ) == {"a-title", "twice", "twice-1", "sec-own"}


# The sidebar


def test_sidebar_names_every_notebook_once():
    order = sidebar()
    report(
        [
            f"_quarto.yml: {p} is in the sidebar, but nbs/{p} does not exist"
            for p in order
            if not (NBS / p).is_file()
        ]
        + [f"_quarto.yml: nbs/{p} is missing in the sidebar" for p in NOTEBOOKS if p not in order]
        + [
            f"_quarto.yml: {p} stands {order.count(p)} times in the sidebar"
            for p in sorted(set(order))
            if order.count(p) > 1
        ]
    )


def test_sidebar_follows_the_numbers():
    numbered = [p for p in sidebar() if number(p) is not None]
    report(
        f"_quarto.yml: {b} stands after {a}, against their numbers"
        for a, b in zip(numbered, numbered[1:])
        if number(b) <= number(a)
    )


def test_quarto_files_point_where_they_should():
    pointer = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert "../_quarto.yml" in pointer["metadata-files"]
    css = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["format"]["html"].get(
        "css", []
    )
    report(
        f"_quarto.yml: css {f} does not exist in nbs/"
        for f in ([css] if isinstance(css, str) else css)
        if not (NBS / f).is_file()
    )


# Links in the processed notebooks: what the site will be made of


@dataclass
class Page:
    path: str  # relative to nbs/
    html: str  # its file on the site
    texts: list  # (cell number, markdown)
    ids: set


def read_page(folder, path):
    texts, labels, html = (
        [],
        set(),
        re.sub(r"(^|/)\d+_([^/]+)\.ipynb$", r"\1\2.html", path).replace(".ipynb", ".html"),
    )
    for i, cell in enumerate(cells(path, folder)):
        if cell["cell_type"] == "raw":
            if found := re.search(r"^output-file: (.+)$", source(cell), re.M):
                html = str(PurePosixPath(path).with_name(found[1].strip()))
        elif cell["cell_type"] == "markdown":
            texts.append((i, source(cell)))
        else:
            labels.update(
                d.split(":", 1)[1].strip() for d in directives(cell) if d.startswith("label:")
            )
            texts += [
                (i, "".join(o["data"]["text/markdown"]))
                for o in cell["outputs"]
                if "text/markdown" in o.get("data", {})
            ]
    return Page(path, html, texts, ids(t for _, t in texts) | labels)


PROCESS = """
import json, multiprocessing, sys, traceback
from pathlib import Path
# Once, as every notebook wants them:
import matplotlib.pyplot, onnxruntime, scipy.stats, sklearn.linear_model, torch, torchvision, tqdm.auto
from nbdev.serve import FilterDefaults
from nbdev.serve_drv import main

def process(path):
    try: main((Path("nbs", path), Path("_proc", path), FilterDefaults))
    except BaseException: return path, traceback.format_exc()
    return path, None

if __name__ == "__main__":
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with multiprocessing.get_context(start).Pool(2, maxtasksperchild=1) as pool:
        found = dict(pool.imap_unordered(process, sys.argv[1:]))
    Path("errors.json").write_text(json.dumps(found))
"""


def failure(stderr):
    """The first exception of a chain (the cause) and the last (nbdev's, which shows the cell),
    without their tracebacks."""
    messages = re.findall(
        r"^([\w.]*(?:Error|Exception|Interrupt)\b.*?)(?=\n\n|\Z)", stderr.strip(), re.M | re.S
    )
    return "\n".join(dict.fromkeys(m[:300] for m in messages[:1] + messages[-1:])) or stderr[-600:]


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """Every notebook as nbdev hands it to Quarto, made in a copy: the folder, and what went
    wrong by notebook. (The command nbdev_proc_nbs makes the same, but may call pip and
    sudo.)"""
    copy = tmp_path_factory.mktemp("site")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.onnx", "runs")
    for folder in ("nbs", CONF["lib_path"]):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copy(ROOT / "settings.ini", copy)
    env = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}

    for path in NOTEBOOKS:
        (copy / "_proc" / path).parent.mkdir(parents=True, exist_ok=True)
    (copy / "process.py").write_text(PROCESS)
    subprocess.run(
        [sys.executable, "process.py", *NOTEBOOKS],
        cwd=copy,
        env=env,
        check=True,
        capture_output=True,
    )
    errors = {
        path: error and failure(error)
        for path, error in json.loads((copy / "errors.json").read_text()).items()
    }
    return copy / "_proc", {path: error for path, error in errors.items() if error}


@pytest.fixture(scope="module")
def pages(processed):
    "The pages of the site by notebook; of a notebook that can't be processed, the notebook itself."
    folder, errors = processed
    return {path: read_page(NBS if path in errors else folder, path) for path in NOTEBOOKS}


@each_notebook
def test_nbdev_can_process(path, processed):
    errors = processed[1]
    report([f"nbs/{path}: building the docs fails: {errors[path]}"] if path in errors else [])


def test_every_page_has_a_file_of_its_own(pages):
    made = {}
    for page in pages.values():
        made.setdefault(page.html, []).append(page.path)
    report(
        f"{' and '.join(paths)} are all written to {html}"
        for html, paths in made.items()
        if len(paths) > 1
    )


def wrong(target, page, pages):
    "What is wrong with a link, or None."
    address, _, anchor = target.partition("#")
    for own in (COLAB, GITHUB.match(address) and GITHUB.match(address)[0]):
        if own and address.startswith(own):
            return (
                None if (ROOT / address[len(own) :]).exists() else "no such file in the repository"
            )
    if address.startswith(SITE):
        file = address[len(SITE) :].strip("/") or "index.html"
        problem = wrong_page([p for p in pages.values() if p.html == file], anchor)
        return (
            problem
            and problem
            + " (nbdev links every name in backticks: document it with show_doc, or write it another way)"
        )
    if re.match(r"[a-z][a-z0-9+.-]*:|//", address):
        return None  # somewhere else
    if not address:
        return wrong_page([page], anchor)
    file = normpath((PurePosixPath(page.path).parent / address).as_posix())
    if file.startswith(".."):
        return "leaves nbs/, which the site can't: give the file's address on GitHub"
    if file.endswith((".ipynb", ".html")):
        return wrong_page([p for p in pages.values() if file in (p.path, p.html)], anchor)
    return None if (NBS / file).is_file() else "no such file"


def wrong_page(found, anchor):
    if not found:
        return "no such page"
    return (
        None if not anchor or anchor in found[0].ids else f"{found[0].path} has no anchor #{anchor}"
    )


@each_notebook
def test_links_resolve(path, pages):
    page = pages[path]
    found = [
        (i, target, wrong(target, page, pages)) for i, text in page.texts for target in links(text)
    ]
    report(
        f"nbs/{path}, processed cell {i}, link {target}: {problem}"
        for i, target, problem in found
        if problem
    )


@each_notebook
def test_cross_references_resolve(path, pages):
    page = pages[path]
    found = [(i, name) for i, text in page.texts for name in CROSS_REFERENCE.findall(prose(text))]
    report(
        f"nbs/{path}, processed cell {i}: nothing on the page has the label @{name}"
        for i, name in found
        if name not in page.ids
    )


@each_notebook
def test_names_in_backticks_exist(path):
    "A name like `mep.quant.grid.make_grid` in the text can be imported."

    def exists(name):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return False
        return True

    found = [
        (i, name)
        for i, c in enumerate(cells(path))
        if c["cell_type"] == "markdown"
        for name in re.findall(r"`(mep(?:\.[a-zA-Z]\w*)+)(?:\(\))?`", source(c))
    ]
    report(
        f"nbs/{path}, cell {i}: `{name}` does not exist" for i, name in found if not exists(name)
    )


# Every chapter's own form


@each_chapter
def test_colab_link_opens_this_chapter(path):
    found = [
        t
        for c in cells(path)
        if c["cell_type"] == "markdown"
        for t in links(source(c))
        if "colab.research.google.com" in t
    ]
    if found != [f"{COLAB}nbs/{path}"]:
        report([f"nbs/{path} links to Colab as {found}, expected once {COLAB}nbs/{path}"])


@each_chapter
def test_previous_and_next_follow_the_sidebar(path):
    order = [p for p in sidebar() if p in CHAPTERS]
    if path not in order:
        pytest.skip("not in the sidebar: another test says so")
    last = [source(c) for c in cells(path) if c["cell_type"] == "markdown"][-1]
    problems = []
    for word, at in (("Previous", order.index(path) - 1), ("Next", order.index(path) + 1)):
        found = re.search(word + r":\s*\[[^\]]*\]\(([^)#]+)[^)]*\)", last)
        target = found and normpath((PurePosixPath(path).parent / found[1]).as_posix())
        expected = [order[at]] if 0 <= at < len(order) else [None, "index.ipynb"]
        if target not in expected:
            problems.append(
                f"nbs/{path}, last markdown cell: '{word}: [...](...)' leads to {target}, expected {expected[-1]}"
            )
    report(problems)


@each_notebook
def test_begins_with_title_and_one_liner(path):
    first = source(next(c for c in cells(path) if c["cell_type"] == "markdown"))
    if not re.match(r"# \S.*\n+> \S", first):
        report(
            [
                f"nbs/{path}: the first markdown cell must be '# Title' and a '> one-liner', found {first[:80]!r}"
            ]
        )


@each_chapter
def test_first_text_is_short(path):
    texts = [source(c) for c in cells(path) if c["cell_type"] == "markdown"]
    rest = re.sub(r"\A# .*\n+(>.*\n?)+", "", texts[0]).strip()
    words = re.sub(r"\[[^\]]*\]\([^)]*colab[^)]*\)", "", rest or texts[1]).split()
    if len(words) > 120:
        report([f"nbs/{path}: the introduction has {len(words)} words, at most 120 are read"])


def imports_only(cell):
    """Whether a cell keeps nbdev's rule: it runs every cell with an import when it builds the
    docs, where what other cells made is missing. Exported cells run there anyway, so they
    may import inside functions."""
    if "eval: false" in directives(cell):
        return True
    tree = ast.parse(
        "\n".join(
            "" if line.lstrip().startswith(("%", "!")) else line
            for line in source(cell).splitlines()
        )
    )
    is_import = lambda node: isinstance(node, (ast.Import, ast.ImportFrom))
    if any(map(is_import, tree.body)):
        return all(map(is_import, tree.body))
    exported = any(d.split()[0] in ("export", "exports", "exporti") for d in directives(cell))
    return exported or not any(map(is_import, ast.walk(tree)))


@each_notebook
def test_import_cells_hold_imports_only(path):
    code = [
        (i, c)
        for i, c in enumerate(cells(path))
        if c["cell_type"] == "code" and not source(c).startswith("%%")
    ]
    report(
        f"nbs/{path}, cell {i}: imports and other code in one cell: {source(c)[:80]!r}"
        for i, c in code
        if not imports_only(c)
    )


def test_import_rule_itself():
    cell = lambda text: dict(source=[text])
    good = (
        "#| export\nimport os\nfrom a import b # why",
        "x = 1",
        "%matplotlib inline\nimport os",
        "#| eval: false\nimport os\nx = 1",
        "#| export\ndef f():\n    import os",
    )
    bad = (
        "import os\nx = 1",
        "#| export\nimport os\nX = 1",
        "def f():\n    import os",
        "with f():\n    import os",
    )
    assert all(imports_only(cell(c)) for c in good) and not any(imports_only(cell(c)) for c in bad)


# Stored outputs


@pytest.fixture(scope="module")
def stored():
    "tools/check.py's list of what a notebook should not store."
    spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.stored


@each_notebook
def test_stored_outputs_are_fit_to_publish(path, stored):
    report(stored(NBS / path))


@each_chapter
def test_outputs_are_stored(path):
    if not any(c.get("outputs") for c in cells(path)):
        report([f"nbs/{path} stores no outputs: run it top to bottom before committing"])
    report(
        f"nbs/{path}, cell {i}: makes a figure, but stores none"
        for i, c in enumerate(cells(path))
        if c["cell_type"] == "code"
        and re.search(r"^[^#\n]*plt\.subplots\(", source(c), re.M)
        and not re.search(r"^\s*(def|#\|\s*(exports?|eval: *false))", source(c), re.M)
        and not any("image/png" in o.get("data", {}) for o in c["outputs"])
    )


def test_readme_is_the_index():
    tool = ROOT / "tools" / "readme.py"
    if not tool.exists() or not (NBS / "index.ipynb").exists():
        pytest.skip("tools/readme.py or nbs/index.ipynb is not there yet")
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
