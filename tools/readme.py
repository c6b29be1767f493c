"""README.md from nbs/index.ipynb, without Quarto: markdown cells, code cells with their
outputs, links moved to the repository's root.

Pictures go to images/, because GitHub shows no picture that is part of a README's text.

python tools/readme.py           write README.md python tools/readme.py --check   say
whether README.md is what the notebook yields (exit 1 if not)"""

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)]+)(\))")  # a relative link or image


def relink(text):
    "Links in the notebook are relative to nbs/; in README.md to the repository's root."

    def move(m):
        target = m[2][3:] if m[2].startswith("../") else "nbs/" + m[2]
        return m[1] + target + m[3]

    return LINK.sub(move, text)


def output_text(out, cell, pictures):
    data = out.get("data", {})
    if "image/png" in data:
        name = f"images/{cell['id']}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![{caption(cell)}]({name})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    text = "".join(out.get("text", "")) or "".join(data.get("text/plain", ""))
    return "```\n" + text.rstrip() + "\n```" if text.strip() else ""


def caption(cell):
    found = re.search(r"^#\|\s*fig-(?:alt|cap):\s*(.+)$", "".join(cell["source"]), re.M)
    return found[1].strip('"') if found else ""


def cell_text(cell, pictures):
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return relink(source)
    if (
        cell["cell_type"] != "code"
        or not source
        or re.search(r"^#\|\s*(hide|default_exp|exports?)\s*$", source, re.M)
    ):
        return ""
    hidden = re.search(r"^#\|\s*echo:\s*false", source, re.M)
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    parts = [] if hidden else [f"```python\n{code.strip()}\n```"]
    texts = [output_text(o, cell, pictures) for o in cell.get("outputs", [])]
    return "\n\n".join(parts + [t if t.startswith("![") else relink(t) for t in texts if t])


def readme():
    "What the notebook yields: file -> content."
    cells, pictures = (
        json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"],
        {},
    )
    text = "\n\n".join(t for t in [cell_text(c, pictures) for c in cells] if t)
    head = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"
    return {"README.md": (head + text + "\n").encode(), **pictures}


if __name__ == "__main__":
    wanted = readme()
    stale = [
        name
        for name, content in wanted.items()
        if not (ROOT / name).exists() or (ROOT / name).read_bytes() != content
    ]
    if "--check" in sys.argv:
        print(
            "README.md: "
            + (
                f"{', '.join(stale)} not what nbs/index.ipynb yields; run: python tools/readme.py"
                if stale
                else "ok"
            )
        )
        sys.exit(bool(stale))
    for name in stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(wanted[name])
    for old in set((ROOT / "images").glob("*.png")) - {ROOT / name for name in wanted}:
        old.unlink()
