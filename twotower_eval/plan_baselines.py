"""Several baselines of one plan: as repeated options or tables, told apart by names, and each as a plan of its own.

A table's key ``dtype`` is what the field ``baseline_dtype`` says of all baselines, ``model`` what ``baseline`` says. So
whatever a plan can say of its one baseline, a table can say of one of several.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.plan_fields import list_fields
from twotower_eval.records import AUTO
from twotower_eval.sources import ENDPOINT
from twotower_eval.strict import JsonObject, plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    P = TypeVar("P", bound=DataclassInstance)

Table = Mapping[str, object]
ONE, PREFIX, SEVERAL = (
    "baseline",
    "baseline_",
    "baselines",
)  # fields of plans: the one's model, what else it is, several
MODEL, NAME = "model", "name"  # keys of a table
SPLIT = ("baseline_decoder",)  # texts that may name several, as no single one has a comma
UNSAID = {"decoder": "autoregressive"}
MOST_LETTERS = 80
CONTEXT_TOWER = "context-tower"


def keys_of(cls: type) -> dict[str, str]:
    """The keys of a table, each with the field of a plan that says the same of one baseline."""
    fields = [field.name for field in dataclasses.fields(cls) if field.name.startswith(PREFIX)]
    return {MODEL: ONE, **{name.removeprefix(PREFIX): name for name in fields}}


def with_baselines(cls: type, values: JsonObject) -> dict[str, object]:
    """A plan's values in which lists of baselines, and of what else one is, are crossed to tables.

    A list of one is a single value. UserError for lists beside tables.
    """
    found = dict(values)
    if SEVERAL not in {field.name for field in dataclasses.fields(cls)}:
        return found
    lists: dict[str, Sequence[object]] = {}
    for key, field in keys_of(cls).items():
        value = plain(found.get(field))
        if field in SPLIT and isinstance(value, str) and "," in value:
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        if isinstance(value, tuple) and field not in list_fields(cls):
            if not value:
                raise UserError(f"{field} is empty: name at least one")
            if twice := sorted({str(one) for one in value if value.count(one) > 1}):
                raise UserError(f"{field} names {', '.join(twice)} twice")
            lists[key] = value
            found.pop(field)
    for key, value in lists.items():
        if len(value) == 1:
            found[keys_of(cls)[key]] = value[0]
    crossed = {key: value for key, value in lists.items() if len(value) > 1}
    if crossed and found.get(SEVERAL):
        field = keys_of(cls)[next(iter(crossed))]
        raise UserError(f"several in {field} and tables [[{SEVERAL}]] are two ways to say the same: take one")
    if "decoder" in crossed and found.get(PREFIX + "set"):
        own = f"{SEVERAL} '{{decoder = \"…\", set = {{…}}}}'"
        raise UserError(f"{PREFIX}set does not say which of several decoders it is for: give each a table, --{own}")
    if crossed:
        found[SEVERAL] = tuple(dict(zip(crossed, one, strict=True)) for one in product(*crossed.values()))
    return found


def overridden(cls: type, tables: Sequence[Table] | None, given: JsonObject) -> tuple[Table, ...] | None:
    """The tables of a plan without what an override says of all baselines; those that are then the same, once."""
    kept: list[Table] = []
    for table in tables or ():
        left = {key: value for key, value in table.items() if key == NAME or keys_of(cls).get(key) not in given}
        if not any(_nameless(left) == _nameless(other) for other in kept):
            kept.append(left)
    return tuple(kept) or None


def _nameless(table: Table) -> Table:
    return {key: value for key, value in table.items() if key != NAME}


def hold_baselines(plan: DataclassInstance) -> None:
    """Check a plan's tables, and put a single one without a name in the fields of one baseline."""
    tables: Sequence[Table] | None = getattr(plan, SEVERAL)
    if tables is None:
        return
    if isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables):
        raise UserError(f"{SEVERAL} are tables: in TOML [[{SEVERAL}]], in Python a list of dictionaries")
    keys = keys_of(type(plan))
    for table in tables:
        for key in table:
            if key not in keys and key != NAME:
                raise UserError(f"unknown key {key!r} in [[{SEVERAL}]]{did_you_mean(str(key), [*keys, NAME])}")
    held: tuple[Table, ...] | None = tuple(dict(table) for table in tables)
    if held is not None and len(held) == 1 and NAME not in held[0]:
        for key, value in held[0].items():
            object.__setattr__(plan, keys[key], value)
        held = None
    object.__setattr__(plan, SEVERAL, held or None)


def each_baseline(plan: P) -> tuple[P, ...]:
    """The plan once for each of its baselines, with that one alone: itself where it has no tables.

    UserError, which names the table, for what a plan of that baseline alone would refuse.
    """
    return tuple(single for _, single in named_baselines(plan))


def named_baselines(plan: P) -> tuple[tuple[str | None, P], ...]:
    """Every baseline's name, and the plan with that baseline alone; ``None`` for a plan without tables.

    A table without a name is called by what tells it from the others. UserError for two that are the same or have the
    same name.
    """
    tables: Sequence[Table] | None = getattr(plan, SEVERAL, None)
    if not tables:
        return ((None, plan),)
    singles = [_single(plan, number, table) for number, table in enumerate(tables, start=1)]
    names = [str(table.get(NAME) or made) for table, made in zip(tables, _made_names(plan, singles), strict=True)]
    for at, (name, single) in enumerate(zip(names, singles, strict=True)):
        if single in singles[:at]:
            raise UserError(f"baselines {singles.index(single) + 1} and {at + 1} are the same: drop one")
        if name in names[:at]:
            raise UserError(f"two baselines are called {name!r}: give each its own name in [[{SEVERAL}]]")
        if len(name) > MOST_LETTERS or not re.fullmatch(r"\S(?:[^\n\r\t`|]*\S)?", name):
            raise UserError(f"{name!r} is no name of a baseline: take one line of at most {MOST_LETTERS} letters")
    return tuple(zip(names, singles, strict=True))


def _single(plan: P, number: int, table: Table) -> P:
    keys = keys_of(type(plan))
    own = {keys[key]: value for key, value in table.items() if key != NAME}
    if "decoder" in table and "set" in keys:
        own.setdefault(keys["set"], None)  # parameters given for all are those of the decoder given for all
    lists = list_fields(type(plan))
    own = {name: (value,) if name in lists and isinstance(value, str) else value for name, value in own.items()}
    try:
        return dataclasses.replace(plan, **{**own, SEVERAL: None})
    except UserError as error:
        raise UserError(f"baseline {table.get(NAME) or number}: {error}") from error


def _made_names(plan: DataclassInstance, singles: Sequence[DataclassInstance]) -> Iterator[str]:
    """A name for each of the plans of one baseline: its values where these differ."""
    shown: dict[str, list[str]] = {}
    for key, field in keys_of(type(plan)).items():
        values = [getattr(single, field) for single in singles]
        if any(value != values[0] for value in values):
            shown[key] = _short([str(value) for value in values]) if key == MODEL else [
                _value_text(plan, key, value) for value in values
            ]  # fmt: skip
    for at in range(len(singles)):
        parts = [texts[at] for key, texts in shown.items() if texts[at]]
        yield ", ".join(parts) or str(at + 1)


def _short(models: Sequence[str]) -> list[str]:
    """The last parts of models' names or folders, where these tell them apart."""
    last = [Path(model).name or model for model in models]
    return last if len(set(last)) == len(set(models)) else list(models)


def _value_text(plan: DataclassInstance, key: str, value: object) -> str:
    """A value as names have it; where a baseline says nothing, what then holds."""
    if value is None:
        value = UNSAID.get(key, getattr(plan, key, None))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_value_text(plan, '', inner)}" for name, inner in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def table_of(text: str) -> Table:
    """A table as the command line has it, an inline table of TOML.

    >>> table_of('{model = "gpt2", decoder = "prompt_lookup"}')
    {'model': 'gpt2', 'decoder': 'prompt_lookup'}
    """
    try:
        found = tomllib.loads(f"table = {text}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise UserError(f'--{SEVERAL} takes a table such as {{model = "gpt2"}}, not {text!r}: {error}') from error
    if not isinstance(found, dict):
        raise UserError(f'--{SEVERAL} takes a table such as {{model = "gpt2"}}, not {text!r}')
    return found


def table_text(value: object) -> str:
    """What :func:`table_of` reads back; texts, numbers, lists and tables."""
    if isinstance(value, Mapping):
        inside = (f"{_key_text(str(key))} = {table_text(inner)}" for key, inner in value.items() if inner is not None)
        return f"{{{', '.join(inside)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(table_text, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _key_text(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


class OfTwoArms:
    """A plan with a baseline and a candidate."""

    model: str | None
    baseline: str
    decoder: str
    request_timeout: float | None

    @property
    def serves_baseline(self) -> bool:
        """Whether the baseline is behind a server."""
        return baseline_name(self).startswith(ENDPOINT)


def baseline_name(plan: OfTwoArms) -> str:
    """How a plan's baseline is named; the candidate's own tower like the candidate."""
    return (plan.model or "") if plan.baseline == CONTEXT_TOWER else plan.baseline


def check_endpoints(plan: OfTwoArms) -> None:
    """Endpoints have their own decoder; UserError for what no endpoint does."""
    model = plan.model or ""
    if plan.request_timeout is not None and not plan.request_timeout > 0:
        raise UserError(f"request_timeout must be above 0 seconds, not {plan.request_timeout}")
    if model.startswith(ENDPOINT) and plan.decoder == AUTO:
        object.__setattr__(plan, "decoder", "endpoint")
    served = model.startswith(ENDPOINT) or plan.serves_baseline
    if served and getattr(plan, "workload", None) == "fixed":
        raise UserError("no server makes an exact number of tokens: time an endpoint on the answer workload")
