"""Build the documentation as a site: `make docs`, into build/site.

The pages stay where they are and keep their links: pages and what they link to are copied side by side, in the layout
of the repository, and a reference of the contract is written from the comments in its protos beside them.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    *(".", "docs", "docs/decisions", "demo", "examples", "proto", "helm/loraplex", "compose", "benchmarks"),
    "benchmarks/results",
)
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)")
REFERENCE = "docs/reference.md"


def pages() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).glob("*.md"))


def stage(target: Path) -> None:
    """Copy all pages, and every file that one of them links to, below `target`."""
    found = list(pages())
    linked = {(page.parent / link).resolve() for page in found for link in LINK.findall(page.read_text())}
    for file in {*found, *(path for path in linked if path.is_file())}:
        copy = target / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (target / REFERENCE).write_text(reference(ROOT / "proto" / "loraplex" / "v1"))


def reference(protos: Path) -> str:
    """The contract as a page: every service, message and enumeration with its comments."""
    lines = ["# Reference of the API", "", "Written from the comments in the protos."]
    for file in sorted(protos.glob("*.proto")):
        lines += ["", f"## {file.name}", ""]
        for comment, declared in declarations(file.read_text()):
            depth = (len(declared) - len(declared.lstrip())) // 2
            said = declared.strip().rstrip("{").rstrip()
            indent = "    " * depth
            lines += [f"{indent}- `{said}`<br>", *(f"{indent}    {line}".rstrip() for line in comment), ""]
    return "\n".join(lines) + "\n"


def declarations(text: str) -> Iterator[tuple[list[str], str]]:
    """Each line of a proto that has a comment above it, with that comment."""
    comment: list[str] = []
    for line in text.splitlines():
        if line.strip().startswith("//"):
            comment.append(line.strip().removeprefix("//").strip().replace("<", "&lt;").replace("[", "\\["))
            continue
        if comment and line.strip():
            yield comment, line
        comment = []


def main() -> None:
    stage_folder = ROOT / "build" / "pages"
    shutil.rmtree(stage_folder, ignore_errors=True)
    stage(stage_folder)
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--config-file",
        ROOT / "docs/mkdocs.yml",
    ]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
