"""What Python declares of the compiled functions is what api.cpp exports: ctypes itself would not notice."""

import re
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest

from loraplex_kernels.cpu import library

SOURCES = Path(library.__file__).parent
KINDS = {c_int: "int", c_int64: "int64_t", c_float: "float", c_void_p: "pointer", None: "void"}
EXPORTED = re.compile(r"^EXPORT ([\w* ]+?)\bloraplex_(\w+)\(([^()]*)\)", re.MULTILINE)
# Asked of a library before its functions are declared, to find out whether it is the right one.
ASKED_FIRST: dict[str, tuple[str, list[str]]] = {"version": ("int", []), "best_isa": ("int", [])}


def kind(declaration: str) -> str:
    """The kind of "const float* weight", "int64_t rows" or, of a result, "AnyLora*"."""
    if "*" in declaration:
        return "pointer"
    return declaration.removeprefix("const ").split()[0]


def exported() -> dict[str, tuple[str, list[str]]]:
    """The kinds of result and arguments of each exported function, without their prefix."""
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cpp")))
    found = EXPORTED.findall(text)
    assert len(found) == len(re.findall("^EXPORT ", text, re.MULTILINE))
    return {
        name: (kind(result), [kind(argument) for argument in arguments.split(",") if argument])
        for result, name, arguments in found
    }


def declared() -> dict[str, tuple[str, list[str]]]:
    return ASKED_FIRST | {
        name: (KINDS[result], [KINDS[argument] for argument in arguments])
        for name, (result, arguments) in library.SIGNATURES.items()
    }


def test_python_declares_the_functions_that_are_exported() -> None:
    assert declared().keys() == exported().keys()


@pytest.mark.parametrize("name", sorted(exported()))
def test_a_function_is_declared_with_the_result_and_arguments_that_it_has(name: str) -> None:
    assert declared()[name] == exported()[name]
