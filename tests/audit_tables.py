"""Published tables of known truth: real counts and rates, rounded as papers round them, and summaries of what was not
rounded. Or with one summary moved to where no value of the figures puts it.

``python tests/audit_tables.py`` writes the committed set again.
"""

from __future__ import annotations

import random
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data" / "audits"
SIZES = (164, 257, 500, 1172, 1267, 1319, 3003, 14042)
MOVED = ("retention", "candidate", "baseline", "difference", "speedup")
Table = dict[str, Any]


def rounded(value: Fraction, decimals: int, rounding: str) -> str:
    """As printed."""
    exact = Decimal(value.numerator) / Decimal(value.denominator)
    return str(exact.quantize(Decimal(1).scaleb(-decimals), rounding=rounding))


def honest(seed: int) -> Table:
    """A table as a paper that makes no mistake prints it."""
    rng = random.Random(seed)
    rounding = rng.choice((ROUND_HALF_EVEN, ROUND_HALF_UP))
    columns = {"baseline": rng.choice((1, 1, 2)), "candidate": rng.choice((1, 1, 2))}
    tasks, exact = [], []
    for number in range(rng.randint(2, 11)):
        n = rng.choice(SIZES)
        right = rng.randint(n // 5, n - 1)
        counts = {"baseline": right, "candidate": min(n, max(0, right + rng.randint(-n // 10, n // 25)))}
        exact.append((n, {arm: Fraction(100 * k, n) for arm, k in counts.items()}))
        figures = {arm: rounded(exact[-1][1][arm], columns[arm], rounding) for arm in columns}
        kinds = [rng.choice(("generative", "multiple_choice"))]
        tasks.append(
            {"name": f"task {number}", "shots": 0, "metric": "acc", "kinds": kinds, "num_documents": n, **figures}
        )
    decimals = rng.choice((1, 2))
    by_documents = rng.random() < 0.5
    weights = [Fraction(n) if by_documents else Fraction(1) for n, _ in exact]
    means = {arm: _mean([own[arm] for _, own in exact], weights) for arm in columns}
    ratios = [100 * own["candidate"] / own["baseline"] for _, own in exact]
    stated = {
        "retention": 100 * means["candidate"] / means["baseline"] if seed % 2 else _mean(ratios, weights),
        **means,
        "difference": means["candidate"] - means["baseline"],
    }
    aggregates = [
        {"name": f"{of} in short", "of": of, "percent": rounded(value, decimals, rounding)}
        for of, value in stated.items()
    ]
    return {"task": tasks, "aggregate": aggregates, **_speeds(rng, rounding)}


def _mean(values: list[Fraction], weights: list[Fraction]) -> Fraction:
    return sum((w * v for w, v in zip(weights, values, strict=True)), Fraction(0)) / sum(weights)


def _speeds(rng: random.Random, rounding: str) -> Table:
    rates = [Fraction(rng.randint(20_000, 90_000), 1000), Fraction(rng.randint(90_000, 400_000), 1000)]
    decimals = [rng.choice((0, 1, 2)) for _ in rates]
    names = ("autoregressive", "blocks of 16")
    shown = [
        {"name": name, "tokens_per_s": rounded(rate, places, rounding)}
        for name, rate, places in zip(names, rates, decimals, strict=True)
    ]
    factor = rounded(rates[1] / rates[0], rng.choice((1, 2)), rounding)
    return {"rate": shown, "speedup": [{"name": "headline", "factor": factor, "of": list(reversed(names))}]}


def moved(seed: int, which: str | None = None) -> Table:
    """The same with one summary just outside everything that its figures allow, under every usual reading."""
    table, rng = honest(seed), random.Random(-1 - seed)
    which = which or rng.choice(MOVED)
    if which == "speedup":
        row, key, ends = table["speedup"][0], "factor", _ends_of_rates(table)
    else:
        row = next(one for one in table["aggregate"] if one["of"] == which)
        key, ends = "percent", _ends(table, which)
    decimals = len(row[key].partition(".")[2])
    unit = Fraction(1, 10**decimals)
    # The first that no interval of half a unit joins to the end.
    outside = [ends[1] + unit / 2, ends[0] - unit / 2]
    steps = [outside[0] // unit + 1, -((-outside[1]) // unit) - 1]
    up = rng.random() < 0.5 or (which in ("baseline", "candidate") and steps[1] < 0)
    up = up and not (which in ("baseline", "candidate") and steps[0] * unit > 100)
    value, ways = steps[0 if up else 1] * unit, _of_rounded(table, which)
    while any(abs(way - value) <= unit / 2 for way in ways):
        value += unit if up else -unit
    row[key] = rounded(value, decimals, ROUND_HALF_EVEN)
    return table


def _of_rounded(table: Table, of: str) -> list[Fraction]:
    """What a summary is of means, or of rates, that were rounded first: every number they may round to is tried."""
    if of == "speedup":
        places = min(len(rate["tokens_per_s"].partition(".")[2]) for rate in table["rate"])
        slow, fast = (_all_rounded((Fraction(rate["tokens_per_s"]),) * 2, places) for rate in table["rate"])
        return [one / other for one, other in product(fast, slow)]
    if of not in ("retention", "difference"):
        return []
    found = []
    stated = {one["of"]: Fraction(one["percent"]) for one in table["aggregate"]}
    for by_documents in (False, True):
        weights = [Fraction(task["num_documents"]) if by_documents else Fraction(1) for task in table["task"]]
        ends = {}
        for arm in ("candidate", "baseline"):
            columns = zip(*(_interval(task[arm]) for task in table["task"]), strict=True)
            ends[arm] = tuple(_mean(list(column), weights) for column in columns)
        texts = {one["of"]: one["percent"] for one in table["aggregate"]}
        spans = {arm: _interval(texts[arm]) for arm in ends}
        if all(spans[arm][0] <= ends[arm][1] and ends[arm][0] <= spans[arm][1] for arm in ends):
            pairs = [(stated["candidate"], stated["baseline"])]  # those that a table states are those that it divides
        else:
            places = [len(table["task"][0][arm].partition(".")[2]) for arm in ends]
            ways = {tuple(places), (places[0],) * 2, (places[1],) * 2}
            pairs = [
                pair
                for one, other in ways
                for pair in product(_all_rounded(ends["candidate"], one), _all_rounded(ends["baseline"], other))
            ]
        found += [100 * c / b if of == "retention" else c - b for c, b in pairs]
    return found


def _all_rounded(ends: tuple[Fraction, Fraction], decimals: int) -> list[Fraction]:
    unit = Fraction(1, 10**decimals)
    numbers = (n * unit for n in range(int(ends[0] / unit) - 1, int(ends[1] / unit) + 3))
    return [one for one in numbers if one - unit / 2 <= ends[1] and one + unit / 2 >= ends[0]]


def _interval(text: str) -> tuple[Fraction, Fraction]:
    half = Fraction(1, 2 * 10 ** len(text.partition(".")[2]))
    return Fraction(text) - half, Fraction(text) + half


def _ends_of_rates(table: Table) -> tuple[Fraction, Fraction]:
    slow, fast = (_interval(rate["tokens_per_s"]) for rate in table["rate"])
    return fast[0] / slow[1], fast[1] / slow[0]


def _ends(table: Table, of: str) -> tuple[Fraction, Fraction]:
    """Of all readings together, from every corner of every task: the slow way, on its own."""
    found = []
    for by_documents in (False, True):
        weights = [Fraction(task["num_documents"]) if by_documents else Fraction(1) for task in table["task"]]
        for corner in product((0, 1), repeat=2):  # each formula rises or falls in a whole column alike
            columns = []
            for arm, end in zip(("candidate", "baseline"), corner, strict=True):
                ends = [_interval(task[arm])[end] for task in table["task"]]
                columns.append([min(max(value, Fraction(0)), Fraction(100)) for value in ends])
            means = [_mean(column, weights) for column in columns]
            ratios = [100 * c / b for c, b in zip(*columns, strict=True)]
            found += {
                "retention": [100 * means[0] / means[1], _mean(ratios, weights)],
                "candidate": [means[0]],
                "baseline": [means[1]],
                "difference": [means[0] - means[1]],
            }[of]
    return min(found), max(found)


def toml(title: str, table: Table) -> str:
    """As a claim file."""
    lines = [f'title = "{title}"', "", "[published]"]
    for kind, rows in table.items():
        for row in rows:
            lines += ["", f"[[published.{kind}]]", *(f"{key} = {_value(value)}" for key, value in row.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return str(value) if isinstance(value, int) else f'"{value}"'


def public_case() -> Table:
    """Rates and a speedup that were printed beside each other and do not belong together."""
    rates = [{"name": "ours", "tokens_per_s": "183.33"}, {"name": "theirs", "tokens_per_s": "50.36"}]
    return {"rate": rates, "speedup": [{"name": "headline", "factor": "3.47", "of": ["ours", "theirs"]}]}


def committed() -> dict[str, str]:
    """File name -> text: ten honest tables and ten that contradict themselves."""
    files = {f"honest_{seed:02}.toml": toml(f"no mistake, seed {seed}", honest(seed)) for seed in range(1, 11)}
    for seed in range(1, 10):
        which = MOVED[seed % len(MOVED)]
        files[f"contradictory_{seed:02}.toml"] = toml(f"{which} moved, seed {seed}", moved(seed, which))
    return files | {"contradictory_10.toml": toml("a speedup beside rates that give another", public_case())}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in committed().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
