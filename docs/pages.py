"""Turn an executed notebook into a page of Markdown that reads well on a code host and as a site.

Code hosts drop styles and scripts and show no HTML file, so a page is Markdown: figures are
small PNG files beside it, tables are plain, code is folded, and the findings come first.
"""

import base64
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag
from PIL import Image

from docs.site import make_anchor

IN_SHORT = "**In short**"
LINKS = "**Go to**"  # starts a notebook's line of links to its neighbours
TEXT_TAG = "battle-text"  # of a cell that shows texts of battles
LEFT_OUT = "*Texts of the competition's battles stood here; they are not ours to publish.*"
_COLORS = 64  # of a figure's palette
_LONG = 12  # lines of printed text that are shown; more are folded
_NUMBER = re.compile(r"[\s\d.,%×x+−–()-]*|.*\d \([^)]*\d\)")
Node = Any  # a cell or an output of a notebook


@dataclass
class Page:
    """One page: where it goes, what stands above its first result, and what must not be in it."""

    path: Path  # of the Markdown file; figures go into the folder of the same stem
    title: str  # "01 · What moves a human vote"
    battles: str  # "demo arena, simulated battles" or "898 real battles"
    above: list[str]  # lines under the title: neighbours, data
    origin: Path = Path()  # the folder of the notebook, to which its links are relative
    hide: dict[str, str] = field(default_factory=dict)  # texts to replace: absolute paths
    has_no_texts: bool = False  # leave out what a cell tagged TEXT_TAG shows
    is_quoted: Callable[[str], bool] = lambda text: False  # whether it repeats a real battle

    def write(self, source: Node, executed: Node) -> list[str]:
        """Write the page and its figures; return its findings, one sentence each."""
        results = {cell.id: cell.get("outputs", []) for cell in executed.cells}
        cells = [(cell, results.get(cell.id, [])) for cell in source.cells]
        findings = find_findings([output for _, outputs in cells for output in outputs])
        self._pictures: dict[str, bytes] = {}
        body = "\n\n".join(self._write_cells(cells))
        head = [f"# {self.title}: {self.battles}", *self.above]
        if findings:
            head.append(IN_SHORT + "\n\n" + "\n".join(f"- {text}" for text in findings))
        head.append("**On this page:** " + " · ".join(_contents(body)))
        text = "\n\n".join([*head, body]) + "\n"
        for old, new in self.hide.items():
            text = text.replace(old, new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="utf-8")
        for name, data in self._pictures.items():
            picture = self.path.with_suffix("") / name
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(data)
        return findings

    def _write_cells(self, cells: list[tuple[Node, list[Node]]]) -> Iterator[str]:
        """Write text, results, and the code of one or several cells folded above its results."""
        code: list[str] = []
        heading = "Figure"
        yield self._rebase(_fold_header(cells[0][0].source))
        for cell, outputs in cells[1:]:
            if cell.cell_type == "markdown":
                yield from _fold_code(code)
                heading = (re.findall(r"^##+ (.+)", cell.source, re.M) or [heading])[-1]
                yield self._rebase(cell.source)
                continue
            code.append(cell.source)
            shown = list(self._write_outputs(cell.id, outputs, heading))
            if self.has_no_texts and shown and TEXT_TAG in cell.metadata.get("tags", []):
                shown = [LEFT_OUT]
            if shown:
                yield from _fold_code(code)
                yield from shown
        yield from _fold_code(code)

    def _rebase(self, text: str) -> str:
        """Let the links of a notebook lead to the same files from the page."""

        def move(match: re.Match[str]) -> str:
            path = os.path.relpath(self.origin / match[1], self.path.parent)
            return f"]({path})"

        return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", move, text)

    def _write_outputs(self, cell_id: str, outputs: list[Node], heading: str) -> Iterator[str]:
        for place, output in enumerate(outputs):
            data = output.get("data", {})
            shown = "".join(
                output.get("text", data.get("text/markdown", data.get("text/html", "")))
            )
            if shown.startswith(IN_SHORT):  # it stands at the top
                continue
            if self.is_quoted(shown) or self.is_quoted("".join(data.get("text/plain", ""))):
                yield LEFT_OUT
            elif "image/png" in data:
                name = f"{cell_id}{f'-{place}' if place else ''}.png"
                self._pictures[name] = compress(base64.b64decode(data["image/png"]))
                yield f"![{heading}]({self.path.stem}/{name})"
            elif "text/markdown" in data:
                yield self._rebase(shown)
            elif "application/vnd.jupyter.widget-view+json" in data:
                continue  # works in Jupyter alone
            elif "text/html" in data:
                yield clean_html(shown)
            else:
                yield from _write_text(shown or "".join(data.get("text/plain", "")))


def find_findings(outputs: list[Node]) -> list[str]:
    """Find the bullets of the box "In short"; where there is none, those of the last text."""
    texts = ["".join(output.get("data", {}).get("text/markdown", "")) for output in outputs]
    boxes = [text for text in texts if text.startswith(IN_SHORT)] or list(filter(None, texts))[-1:]
    bullets = re.findall(r"^- (.+(?:\n(?!- )\S? ?.+)*)", "\n".join(boxes), re.MULTILINE)
    return [" ".join(bullet.split()) for bullet in bullets[:5]]


def compress(png: bytes) -> bytes:
    """Reduce a figure to a palette: about a third of its bytes, and no difference to see."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.quantize(_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    written = io.BytesIO()
    image.save(written, format="PNG", optimize=True)
    return written.getvalue()


def clean_html(html: str) -> str:
    """Make HTML that survives on a code host, on one line, since a blank line would end it.

    A code host drops style sheets: what they say of a table's cells goes into the cells.
    """
    soup = BeautifulSoup(html, "html.parser")
    looks = {}
    for sheet in soup.find_all("style"):
        for names, look in re.findall(r"([^{}]+)\{([^}]*)\}", sheet.extract().get_text()):
            looks |= {name.strip(): look for name in names.split(",")}
    for unwanted in soup.find_all("script"):
        unwanted.decompose()
    for cell in soup.find_all(["td", "th"]):
        look = looks.get(f"#{cell.get('id')}", "")
        is_text = not _NUMBER.fullmatch(cell.get_text().strip())
        is_left = "text-align: left" in look or (cell.name == "td" and is_text)
        if "bold" in look and cell.name == "td":
            cell.string = cell.get_text()
            cell.string.wrap(soup.new_tag("b"))
        cell.attrs = {"align": "left" if is_left else "right"} | _keep(cell, "colspan")
    for table in soup.find_all("table"):
        _align_headers(table)
    for tag in soup.find_all(["table", "tr", "thead", "tbody"]):
        tag.attrs = {}
    for text in soup.find_all(string=re.compile(r"\n")):
        is_kept = any("pre-wrap" in (parent.get("style") or "") for parent in text.parents)
        parts = escape(text).split("\n")
        new = "<br>".join(parts) if is_kept else " ".join(part.strip() for part in parts)
        text.replace_with(BeautifulSoup(new, "html.parser"))
    return str(soup).strip()


def _keep(cell: Tag, name: str) -> dict[str, Any]:
    return {name: cell[name]} if cell.has_attr(name) else {}


def _align_headers(table: Tag) -> None:
    """Align each header as the cells below it."""
    rows = table.find_all("tr")
    below = [cell["align"] for cell in rows[-1].find_all(["td", "th"])]
    for header, align in zip(rows[0].find_all("th"), below, strict=False):
        header["align"] = align


def _write_text(text: str) -> Iterator[str]:
    """Write what a cell printed, without what a bar overwrote; a long text is folded."""
    lines = [line.rpartition("\r")[2] for line in re.sub(r"\x1b\[[\d;]*m", "", text).split("\n")]
    printed = "\n".join(lines).strip("\n")
    if len(lines) > _LONG:
        yield f"<details><summary>{len(lines)} printed lines</summary>"
        yield f"<pre>{escape(printed)}</pre>"
        yield "</details>"
    elif printed.strip():
        yield f"```text\n{printed}\n```"


def _fold_code(code: list[str]) -> Iterator[str]:
    """Fold the code that has gathered, and empty the list."""
    if code:
        yield "<details><summary>code</summary>"
        yield "```python\n" + "\n\n".join(code) + "\n```"
        yield "</details>"
    code.clear()


def _fold_header(source: str) -> str:
    """Fold what a notebook's first cell says of files and hardware; its question stays."""
    rest = "\n".join(line for line in source.splitlines()[1:] if not line.startswith(LINKS))
    table = re.search(r"(?:^\|.*\n?)+", rest, re.M)
    if not table:
        return rest.strip()
    before, after = rest[: table.start()].strip(), rest[table.end() :].strip()
    folded = f"<details><summary>what it reads and writes</summary>\n\n{table[0].strip()}"
    return "\n\n".join(filter(None, [before, after, folded, "</details>"]))


def _contents(body: str) -> Iterator[str]:
    outside = re.sub(r"^```.*?^```", "", body, flags=re.M | re.S)
    for title in re.findall(r"^## (.+)", outside, re.M):
        yield f"[{title}](#{make_anchor(title)})"
