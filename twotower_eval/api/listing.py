"""What there is to name: tasks, suites, decoders, families, claims and sections, shipped, installed or one's own.

Nothing here loads torch: a decoder's parameters are read off its source.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean, registered
from twotower_eval.resources import data_path

if TYPE_CHECKING:
    from twotower_eval.measure.suites.published import Benchmark

What = Literal["tasks", "suites", "decoders", "families", "claims", "sections"]
SHIPPED = "shipped"
# What each shipped name stands for. Nothing is loaded to list it.
DECODER_SENTENCES = {
    "autoregressive": "One token at a time, by a causal model: the baseline.",
    "prompt_lookup": "Speculative: drafts are looked up in prompt and answer, and verified in one pass.",
    "draft": "Speculative: a smaller model of the same tokenizer drafts, one pass verifies.",
    "static_cache": "One token at a time over a static cache, with compile for torch.compile.",
    "mock_ar": "The denoiser of a two-tower model, used one token at a time.",
    "block_diffusion": "Two-tower block diffusion with confidence unmasking.",
    "ancestral": "MDLM's samplers: ancestral, with kept predictions, or analytic.",
    "low_confidence": "LLaDA's sampler: the most confident masks first, by quota, threshold or factor.",
    "dream": "Dream's sampler: a schedule in time, confidence by probability, margin or entropy.",
    "bd3lm": "BD3-LM's sampler: block after block, first hitting or through time.",
    "e2d2": "E2D2's samplers: block after block, masked again by confidence or drawn through time.",
    "entropy_bound": "DiffusionGemma's sampler: what is certain enough stays, the rest is renoised.",
    "radd": "RADD's samplers: Tweedie, Euler, or one mask after the other.",
    "sdar": "SDAR's sampler: block after block behind an exact cache, static, dynamic or sequential.",
    "llada2": "LLaDA2's sampler: block after block, by threshold or quota.",
    "fast_dllm_v1": "Fast-dLLM v1: LLaDA's sampler with approximate prefix or dual caches.",
    "fast_dllm_v2": "Fast-dLLM v2: blocks behind a cache, each in sub-blocks.",
    "reference": "Slow and simple, everything recomputed: to check the others.",
    "endpoint": "Whatever decodes behind a server.",
}
FAMILY_SENTENCES = {
    "a2d_bd3lm": "A Qwen3 made a diffusion model, tokens seeing their block and earlier ones.",
    "a2d_mdlm": "A Qwen3 made a diffusion model, all tokens seeing each other.",
    "bd3lm": "BD3-LM: a diffusion transformer over blocks, behind a cache.",
    "diffusion_gemma": "DiffusionGemma, by transformers' own class.",
    "dream": "Dream: a Qwen2 whose tokens all see each other.",
    "e2d2": "E2D2: an encoder of clean tokens and a decoder of noisy ones.",
    "fast_dllm_v2": "Fast-dLLM v2: a Qwen2 over blocks, behind a cache.",
    "llada": "LLaDA: a Llama whose tokens all see each other.",
    "llada2_moe": "LLaDA2: a mixture of experts over blocks, behind a cache.",
    "mdlm": "MDLM: a diffusion transformer that reads the whole canvas.",
    "nemotron_h": "Two-tower models on Nemotron-H, and its towers alone.",
    "openai": "A model behind an OpenAI-compatible server.",
    "radd": "RADD: a diffusion transformer that is told no time.",
    "sdar": "SDAR: a Qwen3 over blocks, behind a cache.",
    "transformers": "Any causal language model of Hugging Face.",
}
INDEX_NOTE = "reading lm-eval's index of tasks, which takes some 10 seconds …"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Something that can be named. ``source`` says where it comes from, ``facts`` what else is to be known of it."""

    name: str
    source: str
    facts: Mapping[str, object] = field(default_factory=dict)


def listed(
    what: str,
    pattern: str | None = None,
    *,
    include_path: Sequence[str] = (),
    data_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Listed]:
    """Everything of one kind that can be named, by name; UserError for another kind, and where nothing matches.

    ``pattern`` is a wildcard (``arc_*``) or a part of the name. ``include_path`` are folders of tasks, ``data_dir`` is
    where benchmark files were prepared. ``say`` receives a line before something slow is read.
    """
    kinds: dict[str, Callable[[], Iterable[Listed]]] = {
        "tasks": lambda: _tasks(include_path, None if data_dir is None else Path(data_dir), say),
        "suites": _suites,
        "decoders": _decoders,
        "families": _families,
        "claims": _claims,
        "sections": _sections,
    }
    if what not in kinds:
        raise UserError(f"there is no list of {what!r}{did_you_mean(what, get_args(What))}")
    found = sorted(kinds[what](), key=lambda one: one.name)
    if pattern is None:
        return found
    matches = _matching(pattern, [one.name for one in found])
    if not matches:
        raise UserError(f"none of the {what} matches {pattern!r}{did_you_mean(pattern, [one.name for one in found])}")
    return [one for one in found if one.name in matches]


def benchmarks() -> tuple[Benchmark, ...]:
    """The benchmarks that ``data prepare`` reads: where they are published, under which licence, and their files."""
    from twotower_eval.measure.suites.published import PUBLISHED

    return tuple(PUBLISHED.values())


def _matching(pattern: str, names: Sequence[str]) -> set[str]:
    from twotower_eval.measure.suites.included import is_pattern, matching

    return set(matching(pattern if is_pattern(pattern) else f"*{pattern}*", names))


def _suites() -> Iterator[Listed]:
    from twotower_eval.measure.suites.groups import load_suite, suite_names

    for name in suite_names():
        suite = load_suite(name)
        tasks = [task.name for task in suite.tasks]
        yield Listed(name=name, source=SHIPPED, facts={"tasks": tasks, "description": suite.description})


def _claims() -> Iterator[Listed]:
    from twotower_eval.analyse.claims import load_claims

    for path in data_path("tasks", "claims").glob("*.toml"):
        file = load_claims(path.stem)
        yield Listed(name=path.stem, source=SHIPPED, facts={"claims": len(file.claims), "title": file.title})


def _sections() -> Iterator[Listed]:
    from twotower_eval.analyse.report import SEAM

    yield from _places(SEAM.shipped, SEAM.registered())


def _families() -> Iterator[Listed]:
    from twotower_eval.engine.models import SEAM

    for one in _places(SEAM.shipped, SEAM.registered()):
        own = FAMILY_SENTENCES.get(one.name, "") if one.source == SHIPPED else ""
        yield dataclasses.replace(one, facts={**one.facts, "description": own})


def _decoders() -> Iterator[Listed]:
    shipped = _assigned(_source("twotower_eval.engine.decoders"), "DECODERS")
    others = registered("decoder")
    for one in _places({str(name): str(place) for name, place in shipped.items()}, others):
        own = DECODER_SENTENCES.get(one.name, "") if one.source == SHIPPED else ""
        facts = {"parameters": parameters(str(one.facts["place"])), "description": own}
        yield Listed(name=one.name, source=one.source, facts=facts)


def _places(shipped: Mapping[str, str], others: Mapping[str, str]) -> Iterator[Listed]:
    for places, source in ((shipped, SHIPPED), (others, "installed package")):
        for name, place in places.items():
            yield Listed(name=name, source=source, facts={"place": place})


def parameters(place: str) -> dict[str, object]:
    """A decoder's parameters with their defaults, read off the source of ``package.module:Class``; a default that is no
    plain value is the text of its source. Empty where the source is not at hand."""
    module, _, name = place.partition(":")
    tree = _source(module)
    own = _class(tree, name)
    while own is not None:
        if (params := _params_of(tree, own)) is not None:
            return params
        own = next((one for base in own.bases if (one := _class(tree, ast.unparse(base).split("[")[0]))), None)
    return {}


def _params_of(tree: ast.Module, decoder: ast.ClassDef) -> dict[str, object] | None:
    """The fields of a class's ``Params``: a class inside it, or one of its module that it names."""
    for statement in decoder.body:
        if isinstance(statement, ast.ClassDef) and statement.name == "Params":
            return _fields(tree, statement)
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "Params":
            named = _class(tree, _alias(tree, ast.unparse(statement.value)))
            return {} if named is None else _fields(tree, named)
    return None


def _fields(tree: ast.Module, params: ast.ClassDef) -> dict[str, object]:
    found: dict[str, object] = {}
    for base in params.bases:
        inherited = _class(tree, ast.unparse(base))
        found |= {} if inherited is None else _fields(tree, inherited)
    for one in params.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and "ClassVar" not in _text(one):
            found[one.target.id] = "required" if one.value is None else _plain(one.value)
    return found


def _text(statement: ast.AnnAssign) -> str:
    return ast.unparse(statement.annotation)


def _plain(value: ast.expr) -> object:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    """A class of a module, or of the module that it imports it from, as ``Name`` or as ``module.Name``."""
    module, _, inside = name.rpartition(".")
    for statement in tree.body:
        if module and isinstance(statement, ast.ImportFrom) and not statement.level:
            imported = [alias.name for alias in statement.names if (alias.asname or alias.name) == module]
            if imported:
                return _class(_source(f"{statement.module}.{imported[0]}"), inside)
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _class(_source(statement.module), alias.name)
    return None


def _alias(tree: ast.Module, name: str) -> str:
    """What a module's own name stands for, as in ``_Params = Params``."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.unparse(statement.value)
    return name


def _assigned(tree: ast.Module, name: str) -> dict[object, object]:
    """The literal that a module assigns to a name."""
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if any(ast.unparse(target) == name for target in targets) and isinstance(statement, ast.Assign):
            return dict(ast.literal_eval(statement.value))
    return {}


def _source(module: str) -> ast.Module:
    """The parsed source of a module, found without importing it; empty where it is not at hand."""
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # that of a module inside would import the packages around it
    except ValueError:
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [Path(folder, *below) for folder in folders] if below or folders else []
    candidates = [path for file in files for path in (file.with_suffix(".py"), file / "__init__.py")]
    candidates += [Path(spec.origin)] if spec and spec.origin and not below else []
    file = next((path for path in candidates if path.is_file()), None)
    return ast.parse(file.read_text(encoding="utf-8") if file else "")


def _tasks(include_path: Sequence[str], data_dir: Path | None, say: Callable[[str], None]) -> Iterator[Listed]:
    from twotower_eval.measure.suites import lm_tasks, read_included
    from twotower_eval.measure.suites.local_data import where_data_is

    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder; `twotower-eval data prepare` makes one")
    included = read_included(include_path)
    say(INDEX_NOTE)
    seen: set[str] = set()
    for index in (*included.indexes, lm_tasks.local_index(), lm_tasks.stock_index()):
        for name, entry in index.items():
            if name in seen:
                continue
            seen.add(name)
            origin = lm_tasks.origin_of(name, included.indexes)
            kind = entry.kind.name.lower().removeprefix("py_")
            data = where_data_is(name, entry, data_dir, origin) if kind == "task" else ""
            source = {"own": "include path", "shipped": SHIPPED}.get(origin, origin)
            yield Listed(name=name, source=source, facts={"kind": kind, "data": data})
