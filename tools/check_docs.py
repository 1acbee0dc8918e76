"""Checks the Markdown files: relative links and anchors lead somewhere, and Python code blocks parse.

python tools/check_docs.py [FILE ...]      (default: *.md and docs/**/*.md)
"""

from __future__ import annotations

import ast
import doctest
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^\s*(```+|~~~+)\s*([\w+-]*)")
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)")
REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*\s*$")
ANCHOR = re.compile(r"<a\s+(?:id|name)=[\"']([^\"']+)[\"']")


def split(text: str) -> tuple[list[tuple[int, str]], list[tuple[int, str, str]]]:
    """Splits Markdown into its prose lines and its code blocks, as ``(line, text)`` and ``(line, language, code)``."""
    prose: list[tuple[int, str]] = []
    blocks: list[tuple[int, str, str]] = []
    fence, language, start, code = "", "", 0, [""]
    for number, line in enumerate(text.splitlines(), 1):
        found = FENCE.match(line)
        if not fence and found:
            fence, language, start, code = found[1], found[2].lower(), number, []
        elif fence and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            blocks.append((start, language, "\n".join(code)))
            fence = ""
        elif fence:
            code.append(line)
        else:
            prose.append((number, line))
    if fence:
        blocks.append((start, "unclosed", ""))
    return prose, blocks


def slug(heading: str) -> str:
    """The anchor a Markdown host makes of a heading: lower case, words joined by hyphens, punctuation dropped."""
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """Every anchor of a Markdown file."""
    names: set[str] = set()
    for _, line in split(path.read_text(encoding="utf-8"))[0]:
        names.update(ANCHOR.findall(line))
        if heading := HEADING.match(line):
            name, count = slug(heading[1]), 0
            while (unique := f"{name}-{count}" if count else name) in names:
                count += 1
            names.add(unique)
    return names


def check_link(source: Path, target: str) -> str | None:
    """Says what is wrong with a link, if anything is. Links to other hosts are not followed."""
    if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
        return None
    name, _, anchor = target.partition("#")
    path = (source.parent / name).resolve() if name else source
    if not path.is_relative_to(ROOT):
        return f"link leaves the repository: {target}"
    if not path.exists():
        return f"no such file: {target}"
    if anchor and path.suffix == ".md" and anchor not in anchors(path):
        return f"no such heading: {target}"
    return None


def check_code(language: str, code: str) -> str | None:
    """Says why a code block is not valid, if it is one of Python."""
    if language == "unclosed":
        return "code block is never closed"
    if language not in ("python", "py", "pycon"):
        return None
    code = textwrap.dedent(code)
    try:
        if code.lstrip().startswith(">>>"):
            code = "".join(example.source for example in doctest.DocTestParser().get_examples(code))
        ast.parse(code)
    except (SyntaxError, ValueError) as error:
        return f"Python code does not parse: {error}"
    return None


def problems(path: Path) -> Iterator[tuple[int, str]]:
    """Yields ``(line, message)`` for everything wrong in one file."""
    prose, blocks = split(path.read_text(encoding="utf-8"))
    for number, line in prose:
        line = re.sub(r"`[^`]*`", "``", line)
        for target in LINK.findall(line) + REFERENCE.findall(line):
            if message := check_link(path, target):
                yield number, message
    for number, language, code in blocks:
        if message := check_code(language, code):
            yield number, message


def main(names: list[str]) -> int:
    """Prints the problems as ``file:line: message``; returns the exit status."""
    files = [Path(name).resolve() for name in names] or sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    found = [f"{path.relative_to(ROOT)}:{line}: {message}" for path in files for line, message in problems(path)]
    print("\n".join(found) if found else f"docs: {len(files)} files, links and code blocks are fine")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
