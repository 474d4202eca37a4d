"""Who may import whom: read off the source, so that the walls of the design stay up."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import twotower_eval

PACKAGE = Path(twotower_eval.__file__).parent
PRODUCING = {"models", "decoders", "ops"}

# Everyone may import these: they know nothing of the rest.
COMMON = {"records", "names", "json_text"}
# Room -> further rooms of this package that it may import, directly and anywhere in its files.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"models", "decoders"},
    "records": set(),
    "names": set(),
    "json_text": set(),
    "strict": set(),
    "journal": set(),
    "progress": set(),
    "shortfalls": set(),
    "ways": set(),
    "times": set(),
    "environment": {"journal"},
    "plan": {"decoders", "plan_fields"},
    "plan_fields": set(),
    "comparability": {"environment"},
    "closing": {"journal", "strict"},
    "store": {"journal", "comparability", "closing", "strict"},
    "ops": set(),
    "plugin_source": set(),
    "models": {"ops", "plugin_source"},
    "decoders": {"models", "plugin_source"},
    "suites": {"datafiles", "plan", "strict"},
    "datafiles": {"plan"},
    "harness": {"plan", "shortfalls", "ways", "store", "journal", "environment", "progress", "suites", *PRODUCING},
    "speed": {"plan", "shortfalls", "ways", "times", "store", "journal", "environment", "progress", *PRODUCING},
    "verify": {"plan", "ways", "store", "environment", *PRODUCING},
    "miniature": {"plan", "progress", "journal", "environment", *PRODUCING},
    "stats": {"store"},
    "calibration": {"stats", "progress"},
    "evidence": {"shortfalls", "ways", "strict", "times", "closing", "store", "stats"},
    "claims": {"shortfalls", "ways", "times", "plan", "store", "stats", "evidence"},
    "report": {"shortfalls", "ways", "times", "store", "closing", "journal", "stats", "evidence", "claims", "plan"},
    "cli": {"plan", "store", "progress", "suites", "harness", "speed", "claims", "report", "miniature", "datafiles"}
    | {"verify", "calibration", "stats"},
}
# Packages that cost or weigh something -> the only rooms that may import them, anywhere in their files.
HEAVY = {
    "torch": {"ops", "models", "decoders", "speed", "harness", "miniature", "verify"},
    "transformers": {"models", "miniature"},
    "safetensors": {"models", "miniature", "verify"},
    "tokenizers": {"models", "miniature"},
    "lm_eval": {"harness", "suites"},
    "datasets": {"harness", "suites"},
    "pandas": {"stats", "report"},
    "matplotlib": {"report", "miniature"},
    "scipy": {"stats", "claims", "report"},
    "markdown_it": {"report"},
    "typer": {"cli"},
    "rich": {"cli", "progress"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Full dotted names a file imports, wherever in the file; ``from a import b`` gives ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_rooms(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "twotower_eval" and len(part) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_file_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"{room} is a new room: say in this table what it may import"
    known = {room_of(file) for file in FILES}
    rooms = {name for name in own_rooms(imported_names(path)) if name in known} - {room} - COMMON
    assert rooms <= ALLOWED[room], f"{path.name} imports {sorted(rooms - ALLOWED[room])}"
    tops = {name.split(".")[0] for name in imported_names(path)}
    for package, rooms_allowed in HEAVY.items():
        assert package not in tops or room in rooms_allowed, f"{path.name} imports {package}"


def test_the_table_names_no_room_twice_over() -> None:
    """A table that allowed a circle would wall off nothing."""
    order = list(ALLOWED)
    done: set[str] = {"__init__"}
    while len(done) < len(order):
        ready = {room for room in order if room not in done and ALLOWED[room] <= done}
        assert ready, f"circle among {sorted(set(order) - done)}"
        done |= ready


def test_no_file_of_evidence_hides_a_circle_in_a_function() -> None:
    for path in (PACKAGE / "evidence").glob("*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        inner = {node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)}
        assert not any((node.module or "").startswith("twotower_eval") for node in inner), path.name


def modules_after(code: str) -> set[str]:
    code += "; import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not modules_after("import twotower_eval") & {*HEAVY, "numpy"}


@pytest.mark.parametrize("name", ["store", "plan", "records", "strict", "names", "environment", "progress"])
def test_light_rooms_stay_light(name: str) -> None:
    assert not modules_after(f"import twotower_eval.{name}") & {*HEAVY, "numpy"}


def test_the_reading_arm_needs_neither_torch_nor_lm_eval() -> None:
    assert not modules_after("import twotower_eval.report, twotower_eval.stats") & {"torch", "lm_eval", "transformers"}


def test_all_is_exactly_what_is_exported() -> None:
    assert sorted(twotower_eval.__all__) == twotower_eval.__all__
    assert set(twotower_eval.__all__) == {*twotower_eval._HOMES, "__version__"}
    for name in twotower_eval.__all__:
        assert getattr(twotower_eval, name) is not None
        assert name in dir(twotower_eval)
    tree = ast.parse(Path(twotower_eval.__file__).read_text(encoding="utf-8"))
    typed = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(twotower_eval.__all__) == (typed - {"TYPE_CHECKING", "Any"}) | {"__version__"}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        _ = twotower_eval.load_modell
