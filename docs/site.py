"""MkDocs hooks: pages and pictures that lie outside docs/, and formulas as MathML.

README.md is the site's first page, and results/ has its pictures. Links are rewritten, so that they work on the site
and in the repository. Browsers render MathML themselves: no page loads a script from elsewhere.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages and pictures from outside docs/."""
    for name, uri in PAGES.items():
        text = LINK.sub(_in_docs, (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, uri, content=text))
    for picture in sorted((ROOT / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """In the repository results/ is beside docs/, on the site below it."""
    return re.sub(r"\]\(\.\./results/([^)]+\.png)\)", r"](results/\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas that the Markdown extension arithmatex has marked."""
    return FORMULA.sub(_as_mathml, content)


def _as_mathml(match: re.Match[str]) -> str:
    tag, opening, formula = match.groups()
    mathml = convert(html.unescape(formula), display="inline" if opening == "(" else "block")
    # TeX has a thin space between the name of a function and its argument.
    mathml = re.sub(r"(<mi>(?:log|exp|tanh)</mi>)(?=<m(?:i|sub|sup)\b)", r'\1<mspace width="0.17em" />', mathml)
    return f'<{tag} class="formula">{mathml}</{tag}>'


def _in_docs(match: re.Match[str]) -> str:
    """A link of a page at the root, from docs/; of a file that is not on the site only the text is left."""
    image, text, target, anchor = match.groups()
    target = PAGES.get(target, target.removeprefix("docs/"))
    on_site = target in PAGES.values() or target.startswith("results/") or (ROOT / "docs" / target).is_file()
    return f"{image}[{text}]({target}{anchor or ''})" if on_site else text
