"""Claim files: TOML -> records. An unknown key, a missing key or a wrong type is an error of one line that names the
place.

A file holds ``[[point]]`` (operating points, named once), ``[[claim]]`` (each at one of them) and, for ``audit``,
``[published]`` with the numbers as they were printed (see ``published``).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from twotower_eval.analyse.claims.published import Published, published_from
from twotower_eval.analyse.claims.terms import SPEED_QUANTITIES as SPEED_QUANTITIES
from twotower_eval.analyse.claims.terms import at_least, check_limits, check_margin, tables, texts, value_of, within
from twotower_eval.errors import UserError
from twotower_eval.names import did_you_mean
from twotower_eval.records import Averaging, Claim, DecoderSpec, GateLimits, OperatingPoint, Quantity, Relation
from twotower_eval.resources import data_path, read_toml
from twotower_eval.strict import JsonObject

QUANTITIES, RELATIONS, AVERAGINGS = (typing.get_args(kind) for kind in (Quantity, Relation, Averaging))
RETENTIONS = ("retention", "decoder_exercised_retention")
SCORE_QUANTITIES = ("score", "score_difference")
TASK_QUANTITIES = (*RETENTIONS, *SCORE_QUANTITIES)
SLIP_OF_SUITE, SLIP_OF_TASK = 0.8, 0.91  # how alike a name is to another one that was meant, at least
MOST_LOOKS = 20  # each judged at 99.75 % then
MARGINS = {"retention": 0.005, "decoder_exercised_retention": 0.005} | dict.fromkeys(SPEED_QUANTITIES, 0.05)


@dataclass(frozen=True, kw_only=True)
class ClaimFile:
    """A whole claim file; ``published`` is ``None`` where it lists no published numbers.

    ``config`` names the shipped config of the model's size, for costs on random weights.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    published: Published | None
    config: str | None = None


def load_claims(name: str | Path) -> ClaimFile:
    """Read a claim file by its path or, for shipped ones, by its name. Every fault is a UserError of one line."""
    path = _find(name)
    values = read_toml(path, "claims")
    try:
        return claims_from(path.stem, values)
    except UserError as error:
        raise UserError(f"claims {path}: {error}") from error


def _find(name: str | Path) -> Path:
    if Path(name).is_file():
        return Path(name)
    folder = data_path("tasks", "claims")
    shipped = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    raise UserError(f"{str(name)!r} is neither a file nor a shipped claim file{did_you_mean(str(name), shipped)}")


def select(claims: Sequence[Claim], names: Sequence[str]) -> tuple[Claim, ...]:
    """The named claims, or all without names, in the file's order. An unknown name is a UserError with a hint."""
    known = [claim.name for claim in claims]
    for name in names:
        if name not in known:
            raise UserError(f"no claim {name!r} in this file{did_you_mean(name, known)}")
    return tuple(claim for claim in claims if not names or claim.name in names)


def claims_from(name: str, values: JsonObject) -> ClaimFile:
    """A claim file from plain values, as TOML holds them."""
    within("the file", values, ("title", "config", "point", "claim", "published"))
    points = [_point(table) for table in tables("the file", values, "point")]
    by_name = {point.name: point for point in points}
    claims = tuple(_claim(table, by_name) for table in tables("the file", values, "claim"))
    if not claims and "published" not in values:
        raise UserError("it has neither a [[claim]] nor [published] numbers")
    for what, names in (("point", [point.name for point in points]), ("claim", [claim.name for claim in claims])):
        twice = sorted({one for one in names if names.count(one) > 1})
        if twice:
            raise UserError(f"{what} {twice[0]!r} is defined twice")
    for claim in claims:
        _check_parts(claim, claims)
    return ClaimFile(
        name=name,
        title=value_of("the file", values, "title", str),
        claims=claims,
        published=published_from(values["published"]) if "published" in values else None,
        config=value_of("the file", values, "config", str, None),
    )


def _point(table: JsonObject) -> OperatingPoint:
    where = f"point {table.get('name', '?')!r}"
    within(where, table, [field.name for field in dataclasses.fields(OperatingPoint)])
    decoder = value_of(where, table, "decoder", dict)
    params = {key: value for key, value in decoder.items() if key not in ("kind", "set")}
    further = value_of(where, decoder, "set", dict, {})
    if twice := sorted(params.keys() & further.keys()):
        raise UserError(f"{where}: decoder sets {twice[0]} twice, inside and outside of set")
    params |= further
    if params.get("steps_per_block") == "auto":
        params["steps_per_block"] = value_of(where, params, "block_size", int)
    workload = value_of(where, table, "workload", str, None)
    if workload is not None and workload not in ("fixed", "answer"):
        raise UserError(f"{where}: workload must be fixed or answer, not {workload!r}")
    point = OperatingPoint(
        name=value_of(where, table, "name", str),
        decoder=DecoderSpec(kind=value_of(where, decoder, "kind", str), params=params),
        batch_size=value_of(where, table, "batch_size", int, None),
        num_devices=value_of(where, table, "num_devices", int, None),
        workload=cast("Literal['fixed', 'answer'] | None", workload),
        dtype=value_of(where, table, "dtype", str, None),
        hardware=value_of(where, table, "hardware", str, None),
        timed_tasks=texts(where, table, "timed_tasks"),
        **_requests(where, table),
    )
    at_least(where, 1, point, "batch_size", "num_devices")
    return point


def _requests(where: str, table: JsonObject) -> dict[str, Any]:
    """How servers are sent requests: a rate, at random moments unless ``requests`` says otherwise, or a closed loop."""
    rate = value_of(where, table, "request_rate", float, None)
    kind = value_of(where, table, "requests", str, None if rate is None else "poisson")
    kinds = ("closed",) if rate is None else ("poisson", "constant")
    if kind is not None and kind not in kinds:
        raise UserError(f"{where}: requests must be {' or '.join(kinds)} {'with' if rate else 'without'} request_rate")
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"{where}: request_rate must be above 0, not {rate:g}")
    if rate is not None and "batch_size" in table:
        raise UserError(f"{where}: batch_size and request_rate are two ways to load a server: drop one")
    if kind is not None and "num_devices" in table:
        raise UserError(f"{where}: nobody counts the devices behind a server: drop num_devices")
    return {"requests": kind, "request_rate": rate}


def _claim(table: JsonObject, points: Mapping[str, OperatingPoint]) -> Claim:
    where = f"claim {table.get('name', '?')!r}"
    within(where, table, [field.name for field in dataclasses.fields(Claim)])
    quantity = cast(Quantity, _choice(where, table, "quantity", QUANTITIES))
    point = value_of(where, table, "point", str)
    if point not in points:
        raise UserError(f"{where}: no [[point]] is named {point!r}{did_you_mean(point, points)}")
    numbers = {key: value_of(where, table, key, float, None) for key in ("expected", "margin")}
    if numbers["margin"] is None and numbers["expected"] is not None:
        numbers["margin"] = MARGINS.get(quantity)
    claim = Claim(
        name=value_of(where, table, "name", str),
        quantity=quantity,
        subject=value_of(where, table, "subject", str),
        baseline=value_of(where, table, "baseline", str, ""),
        point=points[point],
        source=value_of(where, table, "source", str),
        scope=_scope(where, quantity, texts(where, table, "scope")),
        averaging=cast(Averaging, _choice(where, table, "averaging", AVERAGINGS, "ratio_of_means")),
        relation=cast(Relation, _choice(where, table, "relation", RELATIONS, "at_least")),
        parts=texts(where, table, "parts"),
        limits=_limits(where, value_of(where, table, "limits", dict, {})),
        metric=value_of(where, table, "metric", str, None),
        looks=_looks(where, table),
        **numbers,
    )
    _check_claim(where, claim, table)
    return claim


def _scope(where: str, quantity: Quantity, names: Sequence[str]) -> tuple[str, ...]:
    """The tasks of a scope. A suite stands for its tasks; for a retention, for those that are part of one.

    lm-eval has many tasks with similar names, so only a name close to a suite's is refused.
    """
    suites = _suites() if names else {}
    tasks = _tasks_of(suites)
    found: list[str] = []
    for name in names:
        if name in suites and name not in tasks:
            found += [str(t["name"]) for t in suites[name] if t.get("headline", True) or quantity in SCORE_QUANTITIES]
            continue
        near = difflib.get_close_matches(name, suites, n=1, cutoff=SLIP_OF_SUITE)
        if name not in tasks and near:
            raise UserError(f"{where}: scope: no suite is named {name!r} (did you mean {near[0]!r}?)")
        found.append(name)
    return tuple(dict.fromkeys(found))


def meant_tasks(scope: Sequence[str]) -> dict[str, str]:
    """Tasks of a scope that no suite has, with the task of a suite that has nearly the same name."""
    tasks = _tasks_of(_suites())
    near = {name: difflib.get_close_matches(name, sorted(tasks), n=1, cutoff=SLIP_OF_TASK) for name in scope}
    return {name: found[0] for name, found in near.items() if name not in tasks and found}


def _suites() -> dict[str, list[JsonObject]]:
    """The tasks of every shipped suite."""
    return {path.stem: tables(path.stem, read_toml(path, "suite"), "task") for path in suite_paths()}


def _tasks_of(suites: Mapping[str, Sequence[JsonObject]]) -> set[str]:
    return {str(task["name"]) for members in suites.values() for task in members}


def suite_paths() -> list[Path]:
    """The files of the shipped suites."""
    return sorted(data_path("tasks", "suites").glob("*.toml"))


def _choice(where: str, table: JsonObject, key: str, known: Sequence[str], default: str | None = None) -> str:
    found = value_of(where, table, key, str) if default is None else value_of(where, table, key, str, default)
    if found not in known:
        raise UserError(f"{where}: unknown {key} {found!r}{did_you_mean(found, known)}")
    return found


def _limits(where: str, table: JsonObject) -> GateLimits:
    names = [field.name for field in dataclasses.fields(GateLimits)]
    within(f"{where}, limits", table, names)
    limits = GateLimits(**{key: value_of(f"{where}, limits", table, key, float) for key in table})
    check_limits(f"{where}, limits", limits, table)
    return limits


def _looks(where: str, table: JsonObject) -> int:
    looks = value_of(where, table, "looks", int, 1)
    if not 1 <= looks <= MOST_LOOKS:
        raise UserError(f"{where}: looks must be between 1 and {MOST_LOOKS}, not {looks}")
    return looks


def _check_claim(where: str, claim: Claim, table: JsonObject) -> None:
    """UserError for keys without effect on this quantity, and for missing ones."""
    joint = claim.quantity == "joint"
    if joint != bool(claim.parts):
        raise UserError(f"{where}: a joint claim names its parts, other claims have none")
    if joint:
        ignored = [
            key
            for key in ("expected", "margin", "relation", "averaging", "scope", "limits", "metric", "looks")
            if key in table
        ]
        if ignored:
            raise UserError(f"{where}: {ignored[0]} belongs to the parts of a joint claim: drop it here")
        return
    for key in ("expected", "margin"):
        value = getattr(claim, key)
        if value is None:
            raise UserError(f"{where}: {key} is missing")
        # Scores below 0 are rare, but there are some: correlations.
        if value < 0 and (key == "margin" or claim.quantity not in SCORE_QUANTITIES):
            raise UserError(f"{where}: {key} must be 0 or more, not {value:g}")
    check_margin(where, claim)
    if claim.metric is not None and (claim.quantity not in SCORE_QUANTITIES or len(claim.scope) != 1):
        raise UserError(f"{where}: metric is for score and score_difference of one task: drop it")
    if claim.quantity in TASK_QUANTITIES and not claim.scope:
        raise UserError(f"{where}: scope is missing: name the tasks of the {claim.quantity}")
    if claim.quantity in SPEED_QUANTITIES:
        _check_speed(where, claim, table)
    elif claim.quantity not in RETENTIONS and "averaging" in table:
        raise UserError(f"{where}: averaging has no effect on {claim.quantity}: drop it")


def _check_speed(where: str, claim: Claim, table: JsonObject) -> None:
    for key in ("scope", "averaging"):
        if key in table:
            raise UserError(f"{where}: {key} has no effect on a speedup: drop it")
    if claim.expected == 0:
        raise UserError(f"{where}: a speedup of 0 cannot be claimed")
    needed = ["batch_size"] if claim.point.request_rate is None else []
    needed += ["num_devices"] if claim.point.requests is None else []
    for key in (*needed, "workload"):
        if getattr(claim.point, key) is None:
            raise UserError(f"{where}: point {claim.point.name!r} lacks {key}, which a speedup needs")
    if claim.quantity != "speedup_time" and claim.point.request_rate is not None:
        raise UserError(f"{where}: at a request_rate a speedup is one of latencies: claim speedup_time")
    if claim.quantity == "speedup_throughput" and claim.point.workload == "fixed":
        raise UserError(f"{where}: on the fixed workload both arms make equally many tokens: claim speedup_time")


def _check_parts(claim: Claim, claims: Sequence[Claim]) -> None:
    where = f"claim {claim.name!r}"
    by_name = {one.name: one for one in claims if one.quantity != "joint"}
    for name in claim.parts:
        if name not in by_name:
            raise UserError(f"{where}: no claim is named {name!r}, its part{did_you_mean(name, by_name)}")
        for key in ("subject", "baseline", "point"):
            if getattr(by_name[name], key) != getattr(claim, key):
                raise UserError(f"{where}: part {name!r} has another {key}: a joint claim holds at one point")
    quantities = {by_name[name].quantity for name in claim.parts}
    if claim.point.workload == "fixed" and quantities & {*TASK_QUANTITIES} and quantities & {*SPEED_QUANTITIES}:
        raise UserError(
            f"{where}: the fixed workload decodes past the end of answers: join its quality with a speedup on workload "
            '"answer", or make two claims'
        )
