"""Build the documentation as a site: `make docs`, into build/site.

The pages stay where they are and keep their links: pages and what they link to are copied side by side, in the layout
of the repository. A reference of the contract is written from the comments in its protos beside them, and one of the
Python client from its docstrings.
"""

import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import loraplex

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    *(".", "docs", "docs/decisions", "demo", "examples", "proto", "helm/loraplex", "compose", "benchmarks"),
    "benchmarks/results",
)
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)")
REFERENCE = "docs/reference.md"
CLIENT_REFERENCE = "docs/client-reference.md"
MARKUP = re.compile(r"(`[^`]*`)|[<\[]")
ARGUMENT = re.compile(r"    (\w+): (.*)")


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
    (target / CLIENT_REFERENCE).write_text(client_reference())


def client_reference() -> str:
    """The client library as a page: all that it exports, with the docstrings. Methods of the asynchronous clients are
    those of the others, with `await`.
    """
    lines = ["# Reference of the Python client", "", *markdown(inspect.getdoc(loraplex) or "")]
    for name in loraplex.__all__:
        exported = getattr(loraplex, name)
        lines += ["", f"## {name}", "", *markdown(inspect.getdoc(exported) or "")]
        if inspect.isclass(exported) and not name.startswith("Async"):
            for method, function in inspect.getmembers(exported, inspect.isfunction):
                if not method.startswith("_") and function.__module__.startswith("loraplex"):
                    lines += ["", f"### {name}.{method}", "", *markdown(inspect.getdoc(function) or "")]
    return "\n".join(lines) + "\n"


def markdown(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: its arguments and what it raises as lists."""
    listed = False
    for line in docstring.splitlines():
        if line in ("Args:", "Raises:", "Returns:"):
            listed = True
            yield from (f"**{line}**", "")
        elif listed and (found := ARGUMENT.fullmatch(line)):
            yield f"- `{found[1]}`: {plain(found[2])}"
        elif listed and line.startswith("    "):
            yield f"  {plain(line.strip())}"
        else:
            listed = listed and not line
            yield line if line.startswith("    ") else plain(line)  # indented: code


def plain(text: str) -> str:
    """The text with nothing in it, outside of code, that Markdown takes for HTML or a link."""
    return MARKUP.sub(lambda found: found[1] or f"\\{found[0]}", text)


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
    configuration = str(ROOT / "docs/mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", configuration]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
