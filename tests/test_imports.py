"""Who may import whom: read off the source, so that the walls of the design stay up."""

import ast
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

import twotower_eval

PACKAGE = Path(twotower_eval.__file__).parent
# Rooms that only hold rooms: engine and measure write runs, analyse reads them. A room is called by its own name below.
HALVES = {"engine", "measure", "analyse"}
ENGINE = {"models", "decoders"}

# Everyone may import these: they know nothing of the rest.
COMMON = {"version", "errors", "records", "names", "strict", "resources", "sources", "plugin_calls"}
# Room -> further rooms of this package that it may import, directly and anywhere in its files.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"models", "decoders", "scorers", "moved", "api", "plan"},
    "moved": set(),
    "errors": set(),
    "version": set(),
    "records": set(),
    "usual": set(),
    "names": set(),
    "strict": set(),
    "progress": set(),
    "resources": set(),
    "hub": set(),
    "sources": {"hub"},
    "rules": set(),
    "decoder_settings": {"decoders"},
    "task_options": set(),
    "plan_fields": {"decoder_settings", "task_options"},
    "plan_baselines": {"plan_fields"},
    "plan_chat": {"task_options"},
    "plan_speed": {"plan_baselines", "plan_fields"},
    "plan": {"decoder_settings", "plan_baselines", "plan_chat", "plan_fields", "plan_speed", "task_options"},
    "plan_files": {"decoder_settings", "plan", "plan_baselines", "plan_fields"},
    "plan_sources": {"plan", "plan_baselines"},
    "store": set(),
    "plugin_calls": set(),
    # engine
    "ops": set(),
    "plugin_source": set(),
    "schedules": set(),
    "models": {"ops", "plugin_source"},
    "families": {"models", "schedules"},
    "decoders": {"models", "plugin_source", "schedules", "usual"},
    "scorers": {"models", "decoders", "schedules"},
    "endpoints": {"models", "decoders", "scorers"},
    # measure
    "suites": {"task_options"},
    "chosen": {"plan", "plan_baselines", "plan_sources", "decoder_settings", "usual", "models"},
    "harness": {"plan", "plan_chat", "plan_files", "plan_sources", "task_options", "chosen", "decoder_settings"}
    | {"rules", "store", "progress", "suites", "scorers", "usual", *ENGINE},
    "speed": {"plan", "plan_chat", "plan_sources", "task_options", "chosen", "decoder_settings", "rules", "store"}
    | {"plan_speed", "progress", "endpoints", *ENGINE},
    "sizing": {"plan", "chosen", "rules", "store", "progress", "speed", "models"},
    "verify": {"plan", "plan_sources", "chosen", "rules", "store", "ops", "schedules", "families", "scorers"}
    | {*ENGINE},
    # analyse
    "stats": set(),
    "calibration": {"stats", "progress"},
    "compare": {"rules", "store", "stats"},
    "words": {"rules", "stats", "compare"},
    "claims": {"plan", "rules", "decoder_settings", "store", "stats", "compare", "words"},
    "report": {"rules", "store", "stats", "compare", "claims", "words", "plan"}
    | {"decoder_settings", "plan_baselines", "plan_files", "task_options", "usual"},
    # what sees both arms
    "miniature": {"store", "ops", "models", "families", "decoders"},
    "api": {
        "usual",
        "plan",
        "plan_files",
        "plan_sources",
        "plan_fields",
        "decoder_settings",
        "rules",
        "progress",
        "store",
        "harness",
        "speed",
        "sizing",
        "verify",
        "suites",
        "models",
        "stats",
        "calibration",
    }
    | {"compare", "claims", "words", "report", "miniature", "lm_eval"},
    "lm_eval": {"plan", "plan_chat", "decoder_settings", "chosen", "harness", "suites", "usual", *ENGINE},
    "cli": {"plan", "plan_baselines", "plan_fields", "plan_files", "decoder_settings", "task_options", "store", "api"},
}
# Packages that cost or weigh something -> the only rooms that may import them, anywhere in their files.
HEAVY = {
    "torch": {"ops", "schedules", "models", "families", "decoders", "scorers"}
    | {"speed", "sizing", "miniature", "verify"},
    "transformers": {"models", "families"},
    "huggingface_hub": {"hub", "models", "report"},
    "httpx2": {"endpoints", "hub"},
    "safetensors": {"models", "miniature", "verify"},
    "tokenizers": {"models", "endpoints"},
    "lm_eval": {"harness", "suites", "lm_eval"},
    "datasets": {"suites"},
    "pandas": {"report", "api"},
    "matplotlib": {"report"},
    "scipy": {"stats", "compare"},
    "markdown_it": {"report"},
    "typer": {"cli"},
    "rich": {"progress", "cli"},
}
# Names of numbers that agree by chance and mean another thing in each file.
BY_CHANCE = {"CLOSE", "MAX_ROWS", "MAX_SHOWN", "SEED", "SHOWN"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name not in HALVES or path.stem != "__init__")
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES
}


def room_of(path: Path) -> str:
    return room(path.relative_to(PACKAGE).with_suffix("").parts)


def room(parts: Sequence[str]) -> str:
    """The room of a path or dotted name below the package."""
    return parts[1] if parts[0] in HALVES and len(parts) > 1 else parts[0]


@cache
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
    return {room(part[1:]) for part in parts if part[0] == "twotower_eval" and len(part) > 1} - HALVES


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, at once or late, or names as a text ("package.module:attribute")."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in MODULES else node.module for whole in wholes}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            found.add(node.value.split(":")[0])
    return found & set(MODULES)


def used_rooms(room: str) -> set[str]:
    """Rooms that any file of a room imports, its own and COMMON ones too."""
    return {name for path in FILES if room_of(path) == room for name in own_rooms(imported_names(path))}


def circles(imports: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, each sorted; a module that imports itself is one."""
    reached = {module: _reached_from(module, imports) for module in imports}
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in imports}
    return sorted(sorted(group) for group in groups if group)


def _reached_from(start: str, imports: Mapping[str, Collection[str]]) -> set[str]:
    found: set[str] = set()
    ahead = list(imports.get(start, ()))
    while ahead:
        module = ahead.pop()
        if module not in found:
            found.add(module)
            ahead += imports.get(module, ())
    return found


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


@pytest.mark.parametrize("room", ALLOWED)
def test_no_allowance_is_left_that_nothing_uses(room: str) -> None:
    assert room in {room_of(path) for path in FILES}, f"there is no room {room} any more"
    assert ALLOWED[room] <= used_rooms(room), f"{room} imports none of {sorted(ALLOWED[room] - used_rooms(room))}"


@pytest.mark.parametrize("package", HEAVY)
def test_no_heavy_package_is_allowed_where_nothing_imports_it(package: str) -> None:
    using = {room_of(path) for path in FILES if package in {name.split(".")[0] for name in imported_names(path)}}
    assert using == HEAVY[package]


@pytest.mark.parametrize("common", sorted(COMMON))
def test_what_everyone_may_import_is_imported_by_many(common: str) -> None:
    using = {room for room in ALLOWED if room != common and common in used_rooms(room)}
    assert len(using) >= 3, f"only {sorted(using)} import {common}: say so in the table"


def test_no_modules_import_each_other() -> None:
    """Neither at once nor late, in a function: that a circle can be imported in some order makes it none the less."""
    found = circles({module: imported_modules(path) for module, path in MODULES.items()})
    assert not found, f"circles: {found}"


def test_circles_are_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": []}) == []
    assert circles({"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": ["e"], "e": ["d"]}) == [["a", "b", "c"], ["d", "e"]]
    assert circles({"a": ["a"]}) == [["a"]]


def constants(path: Path) -> dict[str, object]:
    """Plain values that a file's module gives names in capitals."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in (target for target in targets if isinstance(target, ast.Name) and target.id.isupper()):
            with suppress(ValueError):
                found[target.id] = ast.literal_eval(node.value)
    return found


def test_no_rule_is_written_down_twice() -> None:
    """Equal values under one name, or equal lists of words, are one rule: a change to one would leave the other."""
    seen: dict[str, str] = {}
    for module, path in MODULES.items():
        for name, value in constants(path).items():
            if name in BY_CHANCE:
                continue
            words = isinstance(value, (tuple, dict)) and len(value) > 1 and any(isinstance(item, str) for item in value)
            for key in (f"{name} = {value!r}", *([repr(value)] if words else [])):
                assert seen.setdefault(key, module) == module, f"{seen[key]} and {module} both have {key}"


def modules_after(code: str) -> set[str]:
    code += "; import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not modules_after("import twotower_eval") & {*HEAVY, "numpy"}


@pytest.mark.parametrize("name", ["store", "plan", "records", "strict", "names", "store.environment", "progress"])
def test_light_rooms_stay_light(name: str) -> None:
    assert not modules_after(f"import twotower_eval.{name}") & {*HEAVY, "numpy"}


def test_the_reading_arm_needs_neither_torch_nor_lm_eval() -> None:
    loaded = modules_after("import twotower_eval.analyse.report, twotower_eval.analyse.stats")
    assert not loaded & {"torch", "lm_eval", "transformers"}


def test_all_is_exactly_what_is_exported() -> None:
    assert sorted(twotower_eval.__all__) == twotower_eval.__all__
    assert set(twotower_eval.__all__) == {*twotower_eval._HOMES, "__version__"}
    for name in twotower_eval.__all__:
        assert getattr(twotower_eval, name) is not None
        assert name in dir(twotower_eval)
    tree = ast.parse(Path(twotower_eval.__file__).read_text(encoding="utf-8"))
    typed = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(twotower_eval.__all__) == (typed - {"TYPE_CHECKING", "ModuleType", "MovedFinder", "Room"}) | {
        "__version__"
    }


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        _ = twotower_eval.load_modell
