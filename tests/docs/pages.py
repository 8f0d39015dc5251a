"""The documentation as its readers have it: pages, their links, code blocks and tables."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    "",
    "docs",
    "docs/decisions",
    "demo",
    "examples",
    "proto",
    "helm/loraplex",
    "compose",
    "benchmarks",
    "benchmarks/results",
)
PAGES = tuple(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int  # of its opening fence, from 1
    language: str  # "": none is named
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Every block of these languages on any page."""
    return [block for page in PAGES for block in _blocks(page) if block.language in languages]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What can stand behind '#' in a link to a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page: Path, heading: str) -> str:
    """What stands below a heading, up to the next one of the same or a higher level."""
    marks = heading.partition(" ")[0]
    end = rf"(?=^#{{1,{len(marks)}}} |\Z)"
    found = re.search(rf"^{re.escape(heading)}\n(.*?){end}", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page.name} has no heading {heading!r}"
    return found[1]


def table_rows(text: str) -> Iterator[list[str]]:
    """The cells of each row of each table, headings and rulers left out."""
    is_first = True
    for line in text.splitlines():
        if not line.startswith("|"):
            is_first = True
            continue
        if not is_first and not re.fullmatch(r"[|\- :]+", line):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]
        is_first = False


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
