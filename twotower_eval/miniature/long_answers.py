"""A corpus of long answers: the kinds of :mod:`corpus` with answers of 60 to 150 characters.

The longer an answer, the smaller the share of its time that the prompt takes, and the more a parallel decoder can show.
Worked steps stand between words that repeat them or lead up to them, as in text. Training and evaluation use the same
lengths. Arithmetic is the hard kind for a parallel decoder: each column needs the carry of the last.
"""

from collections.abc import Callable
from random import Random

from twotower_eval.miniature.corpus import (
    COLOURS,
    CONSONANTS,
    EVAL_SEED,
    FORMS,
    NAMES,
    PLURAL_OF_THING,
    STRING_OPERATIONS,
    VOWELS,
    Corpus,
    Document,
    keeps,
)

LONGEST = 150  # characters of an answer; the shortest have 60
HELD_OUT, FIRST_WATCHED = 1200, 1000
MAX_NEW_TOKENS = 160
PLURALS = tuple(PLURAL_OF_THING.values())


def arithmetic(rng: Random) -> Document:
    """Column by column from the right: a sum of two or three numbers, a difference, a number times a digit."""
    prompt, columns, result = rng.choice((_sum, _difference, _product))(rng)
    return Document(kind="arithmetic", prompt=f"{prompt}=", answer=f"{', '.join(columns)}, so {result}")


def _number(rng: Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _carried(terms: list[str], totals: list[int]) -> list[str]:
    """One clause for each column: the sum without the carry, the digit kept and the carry."""
    carry, columns = 0, []
    for term, total in zip(terms, totals, strict=True):
        whole = total + carry
        columns.append(f"{term}+{carry}={whole:02d} keep {whole % 10} carry {whole // 10}")
        carry = whole // 10
    return columns


def _sum(rng: Random) -> tuple[str, list[str], int]:
    numbers = [_number(rng, rng.randint(3, 5)) for _ in range(rng.randint(2, 3))]
    width = max(len(str(number)) for number in numbers)
    rows = [f"{number:0{width}d}"[::-1] for number in numbers]
    terms = ["+".join(digits) for digits in zip(*rows, strict=True)]
    totals = [sum(map(int, digits)) for digits in zip(*rows, strict=True)]
    return f"add {' '.join(map(str, numbers))}", _carried(terms, totals), sum(numbers)


def _difference(rng: Random) -> tuple[str, list[str], int]:
    low, high = sorted(_number(rng, rng.randint(4, 6)) for _ in range(2))
    borrow, columns = 0, []
    for a, b in zip(str(high)[::-1], str(low).zfill(len(str(high)))[::-1], strict=True):
        difference = int(a) - int(b) - borrow
        columns.append(f"{a}-{b}-{borrow}={difference % 10} borrow {int(difference < 0)}")
        borrow = int(difference < 0)
    return f"sub {high} {low}", columns, high - low


def _product(rng: Random) -> tuple[str, list[str], int]:
    number, digit = _number(rng, rng.randint(3, 5)), rng.randint(2, 9)
    digits = str(number)[::-1]
    columns = _carried([f"{d}*{digit}" for d in digits], [int(d) * digit for d in digits])
    return f"mul {number} {digit}", columns, number * digit


def recall(rng: Random) -> Document:
    """Look-ups by name in a table of made-up names: a number, a colour and a thing."""
    rows = rng.randint(4, 7)
    names: list[str] = []
    while len(names) < rows:
        name = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
        if name not in names:
            names.append(name)
    values = [(rng.randrange(10, 100), rng.choice(COLOURS), rng.choice(PLURALS)) for _ in names]
    asked = rng.sample(range(rows), rng.randint(3, 4))
    table = ", ".join(f"{name} {' '.join(map(str, value))}" for name, value in zip(names, values, strict=True))
    facts = [f"{names[i]} has {' '.join(map(str, values[i]))}" for i in asked]
    prompt = f"{table}; has {' '.join(names[i] for i in asked)}="
    return Document(kind="recall", prompt=prompt, answer=", ".join(facts))


def sort(rng: Random) -> Document:
    """People by their ages, up or down, then the two ends."""
    names, ages = (rng.sample(choice, rows) for rows in (rng.randint(6, 11),) for choice in (NAMES, range(10, 100)))
    downwards = rng.random() < 0.5
    people = [f"{name} {age}" for name, age in zip(names, ages, strict=True)]
    ordered = sorted(people, key=lambda person: int(person.split()[1]), reverse=downwards)
    prompt = f"sort {'down' if downwards else 'up'} {', '.join(people)}="
    return Document(kind="sort", prompt=prompt, answer=f"{', '.join(ordered)}; first {ordered[0]}, last {ordered[-1]}")


def program(rng: Random) -> Document:
    """What a small program prints: a counting loop with its line numbers, string operations, or a partition."""
    prompt, printed = rng.choice((_counter, _string_program, _partition))(rng)
    return Document(kind="program", prompt=f"run {prompt}=", answer=printed)


def _counter(rng: Random) -> tuple[str, str]:
    variable, loops, step = rng.choice(CONSONANTS), rng.randint(6, 11), rng.randint(2, 49)
    start = rng.randint(100, 400)
    if start > step * loops + 99:
        step *= rng.choice((1, -1))
    values = [start + step * (i + 1) for i in range(loops)]
    lines = [f"{i} {variable}={value}" for i, value in enumerate(values, 1)]
    return f"{variable}={start} loop {loops} {variable}{step:+d}", f"{', '.join(lines)}, end {variable}={values[-1]}"


def _string_program(rng: Random) -> tuple[str, str]:
    """Five operations; doubling at most once, and not as the last."""
    text = "".join(rng.choices(CONSONANTS + VOWELS, k=rng.randint(6, 8)))
    prompt, printed = text, [f"start {text}"]
    names = rng.sample([name for name in STRING_OPERATIONS if name != "twice"], 5)
    if rng.random() < 0.3:
        names[rng.randrange(4)] = "twice"
    for name in names:
        text = STRING_OPERATIONS[name](text)
        printed.append(f"{name} {text}")
    return f"{prompt} {' '.join(names)}", f"{', '.join(printed)}, end"


def _partition(rng: Random) -> tuple[str, str]:
    """A partition by a condition, redrawn until both sides have numbers."""
    while True:
        numbers = rng.sample(range(10, 100), rng.randint(14, 20))
        bound, condition = rng.randint(25, 75), rng.choice(("even", "odd", "over", "under"))
        kept = [n for n in numbers if keeps(condition, n, bound)]
        dropped = [n for n in numbers if n not in kept]
        if min(len(kept), len(dropped)) >= 3:
            shown = f"{condition} {bound}" if condition in ("over", "under") else condition
            told = f"keep {' '.join(map(str, kept))}, drop {' '.join(map(str, dropped))}, {len(kept)} of {len(numbers)}"
            return f"keep {shown} of {' '.join(map(str, numbers))}", told


def english(rng: Random) -> Document:
    """Two or three facts in short form, to be written as whole sentences with small conclusions."""
    facts = [form(rng) for form in rng.sample(FORMS, 3)]
    while len(" ".join(told for _, told in facts)) > LONGEST:
        facts.pop()
    answer = " ".join(told for _, told in facts)
    return Document(kind="english", prompt=f"{'; '.join(prompt for prompt, _ in facts)}=", answer=answer)


LONG_KINDS: dict[str, Callable[[Random], Document]] = {
    "arithmetic": arithmetic,
    "recall": recall,
    "sort": sort,
    "program": program,
    "english": english,
}
LONG = Corpus(
    kinds=LONG_KINDS,
    evaluation_kinds=LONG_KINDS,
    evaluation_seed=f"{EVAL_SEED} long",
    held_out_per_kind=HELD_OUT,
    first_watched=FIRST_WATCHED,
    max_new_tokens=MAX_NEW_TOKENS,
)
