"""What a plan says of tasks beside their names, as lm_eval spells it: generation settings, and several seeds."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from twotower_eval.errors import UserError
from twotower_eval.strict import check_number, parse_json, plain, walk

GenKwargs = Mapping[str, object]
GivenArguments = Mapping[str, object]  # of a chat template
GivenSeed = int | tuple[int | None, ...]
# lm_eval's own for python and numpy, few-shot examples included, so that seed 0 gives the documents that lm_eval gives.
PYTHON_SEED, OTHER_SEED = 0, 1234
SEED_NAMES = ("python", "numpy", "torch", "fewshot")
BUDGET_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts
BRACKETS = {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The seeds of a plan. ``run`` is that of sampled answers and of the order of timed calls, lm_eval's torch seed;
    ``python`` and ``numpy`` are those of code in tasks, ``fewshot`` of drawn examples."""

    run: int
    python: int
    numpy: int
    fewshot: int


def seeds_of(given: GivenSeed) -> Seeds:
    """The seeds that a plan's ``seed`` stands for.

    A single number is all of them, as in lm_eval; but 0, the default, stands for lm_eval's own defaults. A list is
    lm_eval's: python, numpy, torch, fewshot. Those that it leaves out, or names None, are lm_eval's defaults, for a run
    has to be repeatable.

    >>> seeds_of(42).fewshot, seeds_of(0).fewshot
    (42, 1234)
    >>> seeds_of((7, None, 8))
    Seeds(run=8, python=7, numpy=1234, fewshot=1234)
    """
    if isinstance(given, int):
        other = given or OTHER_SEED
        return Seeds(run=given, python=given or PYTHON_SEED, numpy=other, fewshot=other)
    default = (PYTHON_SEED, OTHER_SEED, OTHER_SEED, OTHER_SEED)
    named = (*given, *(None for _ in default))
    python, numpy, torch, fewshot = (
        own if one is None else one for one, own in zip(named[: len(default)], default, strict=True)
    )
    return Seeds(run=torch, python=python, numpy=numpy, fewshot=fewshot)


def run_seed(given: GivenSeed) -> int:
    """The seed of sampled answers and of the order of timed calls."""
    return seeds_of(given).run


def recorded_seeds(given: GivenSeed) -> dict[str, int]:
    """The seeds as a run's manifest holds them; those of tasks' own code only where they were named."""
    seeds = seeds_of(given)
    named = {} if isinstance(given, int) else {"python": seeds.python, "numpy": seeds.numpy}
    return {"run": seeds.run, **named, "fewshot": seeds.fewshot}


def read_seed(given: object) -> GivenSeed:
    """A plan's ``seed`` from a number, a text such as ``"0,None,8,52"`` or a list; UserError for anything else.

    >>> read_seed("0,None,8,52")
    (0, None, 8, 52)
    """
    items = [part.strip() for part in given.split(",")] if isinstance(given, str) else plain(given)
    several: Sequence[object] = items if isinstance(items, (list, tuple)) else (items,)
    seeds = tuple(_one_seed(one) for one in several)
    if not seeds or len(seeds) > len(SEED_NAMES):
        raise UserError(
            f"seed takes one whole number, or up to {len(SEED_NAMES)}: of {', '.join(SEED_NAMES)}, not {given!r}"
        )
    if len(seeds) > 1:
        return seeds
    if seeds[0] is None:
        raise UserError("seed must be a whole number, not None: a run has to be repeatable")
    return seeds[0]


def _one_seed(given: object) -> int | None:
    if given is None or (isinstance(given, str) and given.strip().lower() == "none"):
        return None
    try:
        seed = None if isinstance(given, (bool, float)) else int(given)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        seed = None
    if seed is None:
        raise UserError(f"seed must be a whole number, or several (or None) separated by commas, not {given!r}")
    check_number("seed", seed)
    if seed < 0:
        raise UserError(f"seed must be 0 or more, not {seed}")
    return int(seed)


def read_gen_kwargs(given: object) -> GenKwargs | None:
    """Generation settings from ``"temperature=0,max_gen_toks=64"``, from JSON, or from a table; None if there are none.

    Values are read as lm_eval reads them: true and false, numbers, Python literals such as ``["\\n\\n"]``, else texts.

    >>> read_gen_kwargs('temperature=0.7, until=["Q:", "a,b"]')
    {'temperature': 0.7, 'until': ['Q:', 'a,b']}
    """
    return _read_table(given, "gen_kwargs")


def read_template_args(given: object) -> GivenArguments | None:
    """What a chat template is told beside the messages, written as generation settings are.

    >>> read_template_args('{"enable_thinking": false}')
    {'enable_thinking': False}
    """
    return _read_table(given, "chat_template_args")


def _read_table(given: object, what: str) -> dict[str, object] | None:
    if isinstance(given, str):
        text = given.strip()
        found: object = parse_json(text, what) if text.startswith("{") else dict(_pairs(text, what))
    else:
        found = given
    if found is None or found == {}:
        return None
    if not isinstance(found, Mapping):
        raise UserError(f"{what} must be a table, or key=value with commas between, not {given!r}")
    settings = {str(key): _as_json(value) for key, value in found.items()}
    for path, value in walk(settings):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{what}: {path} must be a finite number, not {value!r}")
        check_number(f"{what}: {path}", value)
    try:
        json.dumps(settings)
    except TypeError as error:
        raise UserError(f"{what}: {error}: JSON has no such value") from error
    return settings


def gen_kwargs_text(settings: GenKwargs) -> str:
    """Settings as ``--gen-kwargs`` takes them, whatever they hold."""
    return json.dumps(dict(settings), ensure_ascii=False)


def _as_json(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    held = plain(value)
    return [_as_json(inner) for inner in held] if isinstance(held, tuple) else held


def _pairs(text: str, what: str) -> Iterator[tuple[str, object]]:
    names: set[str] = set()
    for item in _parts(text):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals):
            raise UserError(f"{what} takes key=value with commas between, or JSON, not {item.strip()!r}")
        if name in names:
            raise UserError(f"{what} names {name} twice")
        names.add(name)
        yield name, _value(value)


def _parts(text: str) -> Iterator[str]:
    """The text cut at commas that are neither in quotes nor in brackets."""
    depth, quote, begun = 0, "", 0
    for place, sign in enumerate(text):
        if quote or sign in "\"'":
            quote = "" if sign == quote else quote or sign
        elif sign == "," and not depth:
            yield text[begun:place]
            begun = place + 1
        else:
            depth = max(depth + BRACKETS.get(sign, 0), 0)
    if text[begun:].strip():
        yield text[begun:]


def _value(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
