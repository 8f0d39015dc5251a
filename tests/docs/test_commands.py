"""Every command that the documentation shows can be given so: its subcommands, options, targets and modules exist."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from loraplex_service.cli import main
from tests.docs.pages import PAGES, ROOT

STARTS = r"(?:\.venv/bin/)?(loraplex|make|python) "


def commands(page: Path) -> Iterator[str]:
    """Each command of a page: in a line of code, after a prompt, variables or a loop's head, or between backticks."""
    text = page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if found := re.match(rf"(?: {{4}})?(?:\$ )?(?:for [^;]*; do )?(?:\w+=\S+ )*({STARTS}.*)", line):
            yield found[1]
    yield from (found[1] for found in re.finditer(rf"`({STARTS}[^`]*)`", text))


def words(command: str) -> list[str]:
    """A command's words, up to whatever the shell would keep for itself."""
    found = shlex.split(re.split(r" [#>|]|;", command)[0], comments=True)
    return [Path(found[0]).name, *found[1:]]


def check_loraplex(arguments: list[str]) -> None:
    """Fail unless the command line has these subcommands and options."""
    command: click.Command = main
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"there is no {name!r} in {command.name!r}"
        command = found
    try:
        command.make_parser(click.Context(command)).parse_args(arguments)
    except click.NoSuchOption as error:
        raise AssertionError(error.format_message()) from error


def check_make(arguments: list[str]) -> None:
    """Fail unless the Makefile has these targets."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in arguments if "=" not in word} <= set(targets)


def check_python(arguments: list[str]) -> None:
    """Fail unless a module of the project is there and knows the options."""
    if arguments[:1] != ["-m"] or arguments[1] == "pytest":
        return
    found = importlib.util.find_spec(arguments[1])
    assert found is not None, f"there is no {arguments[1]}"
    assert found.origin is not None, f"{arguments[1]} is no module"
    source = Path(found.origin).read_text()
    for option in arguments[2:]:
        if option.startswith("--"):
            assert f'"{option}"' in source, f"{arguments[1]} has no {option}"


CHECKS = {"loraplex": check_loraplex, "make": check_make, "python": check_python}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_given_as_they_are_shown(page: Path) -> None:
    for command in commands(page):
        program, *arguments = words(command)
        CHECKS[program](arguments)


def test_the_page_of_the_command_line_lists_every_command_once() -> None:
    listed = re.findall(r"^\| `([a-z]+)` \|", (ROOT / "docs/commands.md").read_text().split("\n## ")[0], re.MULTILINE)
    assert sorted(listed) == sorted(main.list_commands(click.Context(main)))


def test_commands_are_found_at_all() -> None:
    programs = [words(command)[0] for page in PAGES for command in commands(page)]
    assert programs.count("loraplex") > 25
    assert programs.count("make") > 5
    assert programs.count("python") > 10
