"""Make a site of README and docs: `python -m docs.site build/site`. Needs markdown-it-py alone."""

import argparse
import html
import itertools
import os
import re
import shutil
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 920px; margin: auto;
  padding: 0 16px 64px; overflow-wrap: break-word; }}
h1, h2 {{ line-height: 1.25; border-bottom: 1px solid #ddd; padding-bottom: 6px; }}
h2 {{ margin-top: 40px; }}
a {{ color: #0060a0; text-decoration: none; }}
a:hover {{ text-decoration: underline; }}
img {{ max-width: 100%; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; margin: 12px 0;
  overflow-wrap: normal; }}
th, td {{ border: 1px solid #ddd; padding: 4px 10px; font-size: 15px; }}
td img {{ min-width: 110px; }}
code {{ font-size: 88%; background: #f4f4f4; padding: 1px 4px; }}
pre {{ background: #f4f4f4; padding: 10px; overflow-x: auto; }}
pre code {{ padding: 0; }}
blockquote {{ margin: 0; padding: 0 14px; border-left: 4px solid #009e73; color: #444; }}
summary {{ color: #666; cursor: pointer; font-size: 88%; }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def make_anchor(title: str) -> str:
    """Make the anchor that a code host gives a heading: "Who wins?" -> "who-wins"."""
    title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def make_page(text: str) -> str:
    """Turn a page of Markdown into a page of HTML, with an anchor at each heading."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    title = "LLM Preference Arena"
    for heading, inline in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            heading.attrSet("id", make_anchor(inline.content))
            title = inline.content if heading.tag == "h1" else title
    body = parser.renderer.render(tokens, parser.options, {})
    return _PAGE.format(title=html.escape(title), body=body)


def link_pages(text: str, page: Path, target: Path, repository: str) -> str:
    """Let links to Markdown lead to the site's pages, and those to other files to the repository.

    Args:
        page: the Markdown file; target: its page on the site, relative to the site.
        repository: address of the files, e.g. "https://host/owner/name/blob/main"; may be empty.
    """

    def link(match: re.Match[str]) -> str:
        before, address, anchor = match.groups()
        if re.match(r"[a-z]+:", address) or not address:
            return match[0]
        path = Path(os.path.normpath(page.parent / address))
        if not path.is_relative_to(ROOT):  # a page of the code host, e.g. that of a workflow
            return match[0]
        path = path.relative_to(ROOT)
        if is_shown(path):
            found = os.path.relpath(place_of(path), target.parent)
        elif repository:
            found = f"{repository}/{path}"
        else:
            return match[0]
        return f"{before}{found}{anchor or ''}"

    return re.sub(r"(\]\(|src=\"|href=\")([^\s)#\"]*)(#[^\s)\"]*)?", link, text)


def is_shown(path: Path) -> bool:
    """Whether a file, relative to the repository, is on the site: pages and pictures."""
    is_page = path == Path("README.md") or (path.parts[0] == "docs" and path.suffix == ".md")
    return is_page or path.suffix == ".png"


def place_of(path: Path) -> Path:
    """Where a file of the repository stands on the site; README.md is a folder's first page."""
    if path.suffix != ".md":
        return path
    return path.with_name("index.html") if path.stem == "README" else path.with_suffix(".html")


def make_site(site: Path, repository: str = "") -> list[Path]:
    """Write the site; return its pages."""
    written = []
    for folder in ("docs", "assets"):
        for picture in sorted((ROOT / folder).rglob("*.png")):
            target = site / picture.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        target = place_of(page.relative_to(ROOT))
        text = link_pages(page.read_text(encoding="utf-8"), page, target, repository)
        (site / target).parent.mkdir(parents=True, exist_ok=True)
        (site / target).write_text(make_page(text), encoding="utf-8")
        written.append(site / target)
    return written


def main() -> None:
    """Make the site from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path, help="folder to write")
    parser.add_argument("--repository", default="", help="address of the repository's files")
    options = parser.parse_args()
    pages = make_site(options.site, options.repository)
    print(f"{len(pages)} pages in {options.site}")


if __name__ == "__main__":
    main()
