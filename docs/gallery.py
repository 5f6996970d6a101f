"""Write docs/gallery, every notebook with its results: `make gallery`, or `python -m docs.gallery`.

The demo arena always; real battles where DATA names them, or where `ARENA_REAL_DATA` is their
folder (then with PROFILE=pocket: real weights that fit a CPU), or where `artifacts/real` holds a
run. Runs that are up to date are not repeated; their scores go to `benchmarks/results/`. Of real
battles the pages hold numbers and figures only, never a text: `docs.quotes` looks.

A page is stale when its notebook changed, or when the scores of its run are no longer those
recorded in `benchmarks/results/`. The code of the package is not part of that: most changes of it
move no number, and one that does comes with new recorded scores.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from benchmarks.results.record import RESULTS, record_suite, write_readme
from docs.card import draw_card
from docs.pages import LINKS, Page
from docs.quotes import Quotes
from src.utils.battles.readers import load_pairs
from src.utils.config import NOTEBOOKS
from src.utils.paths import REAL_DATA, ROOT, artifacts_dir, find_raw_data, read_remembered
from src.utils.runs import atomic_folder, hash_json, label_member, read_json, write_json
from src.utils.schema import TEXTS
from src.utils.suite.pipeline import STAGES
from src.utils.suite.run import hash_library

GALLERY = ROOT / "docs" / "gallery"
MANIFEST = GALLERY / "manifest.json"
LIMIT_MIB = 8.0  # of the whole gallery
NAMES = [stage.name for stage in STAGES]
REAL_NAMES = NAMES[:5]  # 06 and 07 show nothing more on real battles
# Of a run's figures, the one that stands for its notebook; else the first of its page.
FACES = {"01_eda": "style_effects", "02_baseline": "words", "03_modernbert": "training"}
FACES |= {"04_qwen": "training", "05_ensemble": "reliability"}
FACES |= {"06_kaggle_inference": "probabilities"}
_FACE_PIXELS = 360
REAL_FILES = [REAL_DATA / f"arena_{name}.csv" for name in ("sample", "extra", "more")]
FEW_ROWS = ["01.MIN_BATTLES=15"]  # so that chatbots are ranked, though there are 1,384 battles


@dataclass(frozen=True)
class Source:
    """One run of the suite that pages are made of."""

    kind: str  # demo or real: the folder of its pages
    artifacts: Path
    names: list[str]
    options: list[str]  # for the command line of the suite
    train: tuple[Path, ...] = ()  # files of real battles


def find_sources(data: str, profile: str) -> list[Source]:
    """Find what pages can be made of: the demo arena, and real battles if there are any."""
    artifacts = artifacts_dir()
    is_demo = set(read_remembered(artifacts).values()) <= {"demo"}
    demo = artifacts if is_demo else artifacts / "demo"
    options = ["--data", "demo", "--profile", "demo"]
    sources = [Source("demo", demo, NAMES, options)]
    real, settings = artifacts / "real", []
    at_hand = [path for path in REAL_FILES if path.is_file()]
    if at_hand and not data:
        data, profile = " | ".join(map(str, at_hand)), profile or "pocket"
        tokenizers = ",".join(map(str, sorted((REAL_DATA / "tokenizers").glob("*"))))
        settings = ["--set", *FEW_ROWS, f"01.TOKENIZERS=[{tokenizers}]"]
    if data := data or read_remembered(real).get("DATA", ""):
        options = ["--data", data, *settings, *(["--profile", profile] if profile else [])]
        sources.append(Source("real", real, REAL_NAMES, options, find_raw_data(data).train))
    return sources


def read_texts(sources: list[Source]) -> Iterator[str]:
    """Read every text of the real battles."""
    for path in [path for source in sources for path in source.train]:
        pairs, _ = load_pairs(path)
        for turns in pairs[list(TEXTS)].to_numpy().ravel():
            yield from filter(None, turns)


def run_suite(source: Source) -> None:
    """Run what is not up to date; SystemExit if a notebook fails."""
    command = [sys.executable, "-m", "src.utils.suite.run", "--artifacts", str(source.artifacts)]
    command += ["--only", ",".join(source.names), *source.options]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(code)


def hash_notebook(name: str) -> str:
    """Hash the text and code of a committed notebook."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return hash_json([[cell.cell_type, cell.source] for cell in cells])


def write_pages(source: Source, quotes: Quotes) -> dict[str, Any]:
    """Write the pages of one run; return what the manifest holds of each.

    ValueError if a notebook's code is not that of its run.
    """
    n_pairs = read_json(source.artifacts / "01_eda" / "bias.json")["n_pairs"]
    battles = f"{n_pairs:,} real battles"
    if source.kind == "demo":
        battles = f"demo arena, {n_pairs:,} simulated battles"
    entries = {}
    with atomic_folder(GALLERY / source.kind) as folder:
        for name in source.names:
            title = read_title(name)
            page = Page(folder / f"{name}.md", title, battles, list(_introduce(source, name)))
            page.origin, page.hide = NOTEBOOKS, _places(source)
            page.has_no_texts = source.kind == "real"
            page.is_quoted = lambda text: bool(quotes.find(text))
            findings = page.write(*_read_both(source, name))
            metrics = source.artifacts / name / "metrics.json"  # 01, 06 and 07 have none
            entries[f"{source.kind}/{name}"] = {
                "title": title,
                "notebook": hash_notebook(name),
                "n_pairs": n_pairs,
                "findings": findings,
                "log_loss": read_json(metrics).get("log_loss") if metrics.exists() else None,
                "picture": write_face(source, name, folder),
            }
    return entries


def _read_both(source: Source, name: str) -> list[Any]:
    """Read a notebook and its executed copy, which may differ in prose alone."""
    executed = source.artifacts / "notebooks" / f"{name}.ipynb"
    both = [nbformat.read(path, 4) for path in (NOTEBOOKS / f"{name}.ipynb", executed)]
    code = []
    for notebook in both:
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        injected = "injected-parameters"  # papermill's cell
        own = [cell for cell in cells if injected not in cell.metadata.get("tags", [])]
        code.append([cell.source for cell in own])
    if code[0] != code[1]:
        raise ValueError(f"{executed}: {name} has other code by now; make gallery runs it")
    return both


def read_title(name: str) -> str:
    """Read the title of a notebook: "01 · What moves a human vote"."""
    first = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
    return first.splitlines()[0].lstrip("# ")


def _introduce(source: Source, name: str) -> Iterator[str]:
    """Write what stands under the title: neighbours, whose battles, which model."""
    other = {"demo": "real", "real": "demo"}[source.kind]
    parts = [*list_neighbours(name, source.names, "md"), "[all notebooks](../README.md)"]
    if name in REAL_NAMES:
        label = "on real battles" if other == "real" else "on the demo arena"
        parts.append(f"[{label}](../{other}/{name}.md)")
    yield " · ".join([*parts, f"[the notebook](../../../notebooks/{name}.ipynb)"])
    about = "**Real votes**: battles of the Kaggle competition; numbers and figures, no texts."
    if source.kind == "demo":
        about = "**Simulated**: ten invented chatbots, and votes drawn from known probabilities."
    if name in ("03_modernbert", "04_qwen"):
        about += f" The model here is: {label_member(source.artifacts, name)[3:]}."
    yield f"> {about}"


def list_neighbours(name: str, names: list[str], ending: str) -> list[str]:
    """Link the notebooks before and after one: ["[← 01](01_eda.md)", "[03 →](…)"]."""
    place = names.index(name)
    links = [f"[← {other[:2]}]({other}.{ending})" for other in names[:place][-1:]]
    return links + [f"[{other[:2]} →]({other}.{ending})" for other in names[place + 1 :][:1]]


def _places(source: Source) -> dict[str, str]:
    """List the absolute paths that a run may have printed, and what stands in their place."""
    places = {str(source.artifacts): "artifacts", str(ROOT): ".", str(Path.home()): "~"}
    places |= {str(path.parent): "data" for path in source.train}
    return dict(sorted(places.items(), key=lambda item: -len(item[0])))


def write_face(source: Source, name: str, folder: Path) -> str:
    """Write the small picture of a page; return its path in the gallery, "" if it has none."""
    found = [source.artifacts / name / "figures" / f"{FACES.get(name)}.png"]
    found += sorted((folder / name).glob("*.png"))
    found = [path for path in found if path.exists()]
    if not found:
        return ""
    with Image.open(found[0]) as picture:
        image = picture.convert("RGB")
    image.thumbnail((_FACE_PIXELS, _FACE_PIXELS))
    (folder / name).mkdir(exist_ok=True)
    image.quantize(64, dither=Image.Dither.NONE).save(folder / name / "small.png", optimize=True)
    return f"{source.kind}/{name}/small.png"


def format_notebooks(entries: dict[str, Any], gallery: str) -> str:
    """Format the table of notebooks: a picture, what it finds, and links to read it.

    Args:
        gallery: path of the gallery from the page that shows the table, e.g. "docs/gallery/".
    """
    lines = ["| | what it finds |", "|---|---|"]
    for name in NAMES:
        kinds = [kind for kind in ("real", "demo") if f"{kind}/{name}" in entries]
        if not kinds:
            continue
        entry = entries[f"{kinds[0]}/{name}"]
        links = [f"[{_LINKED[kind]}]({gallery}{kind}/{name}.md)" for kind in kinds]
        small = (
            f'<img src="{gallery}{entry["picture"]}" width="150" alt="">'
            if entry["picture"]
            else ""
        )
        # What 01 finds first is among README's facts already.
        findings = entry["findings"][name == NAMES[0] :] or entry["findings"]
        found = re.split(r"(?<=\.) (?=[A-Z])", findings[0])[0] if findings else ""
        found = re.sub(r", (real battles \([^)]*\)|simulated arena),?", "", found)  # links say it
        text = f"**{entry['title']}**<br>{found}<br>Read it {' or '.join(links)}"
        lines.append(f"| {small} | {text.replace('<br><br>', '<br>')} |")
    return "\n".join(lines)


_LINKED = {"real": "on real battles", "demo": "on the demo arena"}


def format_facts(entries: dict[str, Any]) -> str:
    """Format README's three facts, from the pages and from the recorded results."""
    real = read_json(RESULTS / "real.json")["compared"]
    rungs = {rung["model"]: rung for rung in real["ladder"]}
    best, prior = rungs[real["published"]], rungs["the class prior"]
    (training,) = read_json(RESULTS / "training.json")["runs"].values()
    facts = entries.get("real/01_eda", entries["demo/01_eda"])["findings"][:1]
    facts.append(
        f"On {real['n_pairs']:,} real votes, held out, the best model so far, {best['model']}, "
        f"scores **{best['log_loss']:.3f}** nats per battle ({best['low']:.3f} to "
        f"{best['high']:.3f}); the shares of the votes alone {prior['log_loss']:.3f}."
    )
    speed = training["ways"]["Trainer's default"]["speed_of_ours"]
    facts.append(
        f"Training without padding reads **{speed:.1f} times** as many real battles per second as "
        "Trainer's default, measured on a CPU."
    )
    return "\n".join(f"- {fact}" for fact in facts)


def write_tables(manifest: dict[str, Any]) -> None:
    """Write the gallery's first page, and README's parts that come from the gallery."""
    entries = manifest["pages"]
    text = "# Every notebook with its results\n\nMade by `make gallery`; code is folded."
    text += f"\n\n{format_notebooks(entries, '')}\n"
    (GALLERY / "README.md").write_text(text, encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, part in make_parts(manifest).items():
        before, rest = text.split(f"<!-- {name}: made by make gallery -->\n")
        after = rest.split(f"<!-- end of {name} -->")[1]
        text = f"{before}<!-- {name}: made by make gallery -->\n{part}\n"
        text += f"<!-- end of {name} -->{after}"
    readme.write_text(text, encoding="utf-8")


def make_parts(manifest: dict[str, Any]) -> dict[str, str]:
    """Make the parts of README that come from the gallery: name of its markers -> text."""
    return {
        "facts": format_facts(manifest["pages"]),
        "notebooks": format_notebooks(manifest["pages"], "docs/gallery/"),
    }


def find_stale(entries: dict[str, Any]) -> list[str]:
    """Say which pages no longer show what their notebook, and the recorded scores, would."""
    stale = []
    for page, entry in entries.items():
        kind, name = page.split("/")
        if entry["notebook"] != hash_notebook(name):
            stale.append(f"{page}: the notebook changed since; make gallery")
        recorded = read_json(RESULTS / f"{kind}.json")["runs"].get(name, {})
        now, shown = recorded.get("log_loss"), entry["log_loss"]
        if now is not None and shown is not None and abs(now - shown) > 0.0005:
            stale.append(f"{page}: shows a log loss of {shown:.4f}, recorded is {now:.4f}")
    return stale


def check_gallery(quotes: Quotes) -> None:
    """Refuse a gallery that is too large, or repeats a text of a real battle; ValueError."""
    files = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".png", ".json")]
    size_mib = sum(path.stat().st_size for path in files) / 2**20
    if size_mib > LIMIT_MIB:
        raise ValueError(f"docs: expected {LIMIT_MIB:.0f} MiB at most, got {size_mib:.1f}")
    for path in files:
        if path.suffix != ".png" and (passage := quotes.find(path.read_text(encoding="utf-8"))):
            raise ValueError(f"{path}: repeats a text of a real battle: {passage!r}")
    print(f"docs: {size_mib:.1f} of {LIMIT_MIB:.0f} MiB, no text of a real battle found")


def link_notebooks() -> None:
    """Write the line of links to neighbours and results into each notebook's first cell."""
    for name in NAMES:
        path = NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        lines = [line for line in first.source.splitlines() if not line.startswith(LINKS)]
        rest = "\n".join(lines[1:]).strip("\n")
        first.source = f"{lines[0]}\n\n{make_links(name)}\n\n{rest}"
        nbformat.write(notebook, path)


def make_links(name: str) -> str:
    """Make the line of links of a notebook's first cell."""
    parts = list_neighbours(name, NAMES, "ipynb")
    kinds = ["real", "demo"] if name in REAL_NAMES else ["demo"]
    parts += [f"[results {_LINKED[kind]}](../docs/gallery/{kind}/{name}.md)" for kind in kinds]
    return f"{LINKS} {' · '.join(parts)}"


def main() -> None:
    """Make the gallery from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--links", action="store_true", help="only the links in the notebooks")
    parser.add_argument("--as-is", action="store_true", help="take finished runs, also outdated")
    options = parser.parse_args()
    link_notebooks()
    if options.links:
        return
    sources = find_sources(os.environ.get("DATA", ""), os.environ.get("PROFILE", ""))
    quotes = Quotes(read_texts(sources))
    entries = read_json(MANIFEST)["pages"] if MANIFEST.exists() else {}
    for source in sources:
        if not options.as_is:
            run_suite(source)
        old = [page for page in entries if page.startswith(f"{source.kind}/")]
        entries = {page: entry for page, entry in entries.items() if page not in old}
        entries |= write_pages(source, quotes)
        record_suite(source.kind, source.artifacts)
    manifest = {"package": hash_library(), "pages": entries}
    write_json(MANIFEST, manifest)
    write_tables(manifest)
    write_readme()
    draw_card()
    check_gallery(quotes)


if __name__ == "__main__":
    main()
