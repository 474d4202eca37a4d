"""Signatures say what goes in and out: ``Any`` is rare in them, and no public function has one.

Counted over parameters and results of every function, inside generics too (``dict[str, Any]``). Public is what has no
underscore in front: the function, its class and its module; what is defined inside a function is nobody's.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import twotower_eval

PACKAGE = Path(twotower_eval.__file__).parent
MOST = 40  # of the whole package; what is left passes on whatever it is given, or reads foreign objects

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A function whose signature says Any so many times."""

    place: str
    is_public: bool
    num: int


CELLS_OF_FRAMES = {"rendering.py"}  # a frame's row: pandas gives its cells no type either


def signatures_of(source: str, module: str) -> Iterator[Found]:
    """Every function of a module that says Any."""
    is_public = not any(part.startswith("_") for part in module.split("/") if part != "__init__.py")
    yield from _within(ast.parse(source), module, is_public)


def _within(node: ast.AST, module: str, is_public: bool) -> Iterator[Found]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, Function | ast.ClassDef)
        inside = is_public and not (named and child.name.startswith("_"))
        if isinstance(child, Function) and (num := _num_any(child)):
            yield Found(f"{module}:{child.lineno} {child.name}", inside, num)
        yield from _within(child, module, inside and not isinstance(child, Function))


def _num_any(function: Function) -> int:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    hints = [function.returns, *(argument.annotation for argument in every if argument is not None)]
    return sum(_num_in(hint) for hint in hints if hint is not None)


def _num_in(hint: ast.expr) -> int:
    """Times that a hint says Any, quoted parts read as well."""
    num = 0
    for part in ast.walk(hint):
        num += isinstance(part, ast.Name) and part.id == "Any"
        num += isinstance(part, ast.Attribute) and part.attr == "Any"
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            with suppress(SyntaxError):  # a help text, not a type
                num += _num_in(ast.parse(part.value, mode="eval").body)
    return num


@pytest.fixture(scope="module")
def found() -> list[Found]:
    """Of the whole package."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    return [one for file in files for one in signatures_of(file.read_text(), file.relative_to(PACKAGE).as_posix())]


def test_any_is_rare_in_signatures(found: list[Found]) -> None:
    total = sum(one.num for one in found)
    if total > MOST:
        pytest.fail(
            f"{total} times Any in signatures, at most {MOST} are allowed; most in {_most(found)}", pytrace=False
        )


def test_no_public_function_says_any(found: list[Found]) -> None:
    public = [one.place for one in found if one.is_public]
    if public:
        pytest.fail("public functions say Any: " + ", ".join(public), pytrace=False)


def test_no_name_stands_for_any() -> None:
    """An alias with Any in it would hide it from the count."""
    hidden = [
        f"{file.relative_to(PACKAGE).as_posix()}:{node.lineno}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_alias(node) and file.name not in CELLS_OF_FRAMES
    ]
    if hidden:
        pytest.fail("names that stand for a type with Any: " + ", ".join(hidden), pytrace=False)


def _is_alias(node: ast.Assign | ast.AnnAssign) -> bool:
    """Whether a name in CapWords is given a type that says Any."""
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    is_type = isinstance(target, ast.Name) and target.id != target.id.upper() and target.id[:1].isupper()
    return (
        is_type
        and node.value is not None
        and isinstance(node.value, ast.Name | ast.Subscript)
        and _num_in(node.value) > 0
    )


def _most(found: list[Found]) -> str:
    """The modules that say it most, in words."""
    by_module: Counter[str] = Counter()
    for one in found:
        by_module[one.place.partition(":")[0]] += one.num
    return ", ".join(f"{module} ({num})" for module, num in by_module.most_common(8))


SAMPLE = """
def plain(x: int) -> Any: ...
def _own(*given: Any, **named: "dict[str, Any]") -> None: ...
class Open:
    def method(self, x: typing.Any) -> int:
        def inside(y: Any) -> None: ...
    def __init__(self, x: Callable[..., Any]) -> None: ...
class _Closed:
    def method(self, x: Any) -> int: ...
def without(x: object) -> list[int]: ...
"""


def test_the_count_looks_into_generics_quotes_and_classes() -> None:
    named = [(one.place.split()[1], one.is_public, one.num) for one in signatures_of(SAMPLE, "room/file.py")]
    assert named == [
        ("plain", True, 1),
        ("_own", False, 2),
        ("method", True, 1),
        ("inside", False, 1),
        ("__init__", False, 1),
        ("method", False, 1),
    ]
    assert not any(one.is_public for one in signatures_of(SAMPLE, "_own/file.py"))
