"""A hook of the site's builder: files of the checkout that a page links to get pages of their own.

On a host of repositories ``docs/kernels.md`` links to ``../kernels/conv.py``. A site has only what lies in ``docs/``, so each
such file becomes a page under ``source/``, Markdown as it is and all else as one block of code, and the link leads there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml"}


def origin(page: str) -> str:
    """The file of the checkout that a page of the site shows."""
    path = page.removeprefix("source/")
    if path == page:
        return f"docs/{page}"
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def page_of(path: str) -> str | None:
    """The page, or picture, of the site that shows a file of the checkout; None if there is no such file."""
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    if not (ROOT / path).is_file():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def target(page: str, link: str) -> str | None:
    """The page of the site that a link leads to, if it leads to a file of the checkout."""
    return page_of(posixpath.normpath(posixpath.join(posixpath.dirname(origin(page)), link)))


def text_of(page: str) -> str:
    """The Markdown of a page under ``source/``."""
    path = origin(page)
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    longest = max((len(match[1]) for match in FENCE.finditer(text)), default=0)
    fence = "`" * max(4, longest + 1)
    return f"# {path}\n\n{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}{fence}\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the files that are linked to, and of those that these link to."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for match in LINK.finditer(text):
            name = target(page, match[2])
            if name and name.startswith("source/") and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=text_of(name)))
                if origin(name).endswith(".md"):
                    waiting.append((name, text_of(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files of the checkout to their pages."""
    here = page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        name = target(here, match[2])
        if name is None:
            return match[0]
        return match[1] + posixpath.relpath(name, posixpath.dirname(here) or ".") + (match[3] or "") + match[4]

    return LINK.sub(lead, markdown)
