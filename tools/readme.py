"""README.md from nbs/index.ipynb, without Quarto: markdown cells, code cells with their text outputs, links moved to the repository's root.

python tools/readme.py           write README.md
python tools/readme.py --check   say whether README.md is what the notebook yields (exit 1 if not)
"""
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


def output_text(out):
    data = out.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    text = "".join(out.get("text", "")) or "".join(data.get("text/plain", ""))
    return "```\n" + text.rstrip() + "\n```" if text.strip() else ""


def cell_text(cell):
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return relink(source)
    if cell["cell_type"] != "code" or not source or re.search(r"^#\|\s*(hide|default_exp|exports?)\s*$", source, re.M):
        return ""
    hidden = re.search(r"^#\|\s*echo:\s*false", source, re.M)
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    parts = [] if hidden else [f"```python\n{code.strip()}\n```"]
    return "\n\n".join(parts + [relink(t) for t in map(output_text, cell.get("outputs", [])) if t])


def readme():
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n" + "\n\n".join(t for t in map(cell_text, cells) if t) + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" in sys.argv:
        fresh = path.exists() and path.read_text(encoding="utf-8") == text
        print("README.md: " + ("ok" if fresh else "not what nbs/index.ipynb yields; run: python tools/readme.py"))
        sys.exit(not fresh)
    path.write_text(text, encoding="utf-8")
