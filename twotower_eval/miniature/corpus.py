"""The miniature's corpus: generated tasks whose answers are checked exactly, and templated English."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from random import Random

from twotower_eval.errors import UserError
from twotower_eval.miniature.export import CHARACTERS, SPECIAL_TOKENS, decode, encode, write_tokenizer

NAMES = (
    "Ada", "Ali", "Amy", "Ann", "Ben", "Bob", "Dan", "Eli", "Eva", "Eve", "Gus", "Hal", "Ian", "Ida", "Ira", "Jan",
    "Jim", "Joe", "Kai", "Kim", "Lea", "Leo", "Lou", "Max", "May", "Mia", "Ned", "Noa", "Ola", "Pam", "Pia", "Ray",
    "Rex", "Ron", "Roy", "Sam", "Sue", "Tim", "Tom", "Uma", "Una", "Val", "Vic", "Zoe",
)  # fmt: skip
ANIMALS = (
    "cat", "dog", "cow", "hen", "owl", "fox", "goat", "duck", "frog", "crab", "mule", "swan", "deer", "lamb", "moth",
    "toad",
)  # fmt: skip
PLACES = (
    "park", "barn", "shed", "yard", "lake", "wood", "town", "cave", "camp", "tent", "mill", "dock", "farm", "zoo",
    "pond", "hall",
)  # fmt: skip
COLOURS = ("red", "tan", "blue", "gray", "gold", "pink", "teal", "lime", "navy", "plum", "rust", "jade")
PLURAL_OF_THING = {
    "pen": "pens", "cup": "cups", "hat": "hats", "key": "keys", "map": "maps", "box": "boxes", "bus": "buses",
    "fox": "foxes", "dish": "dishes", "city": "cities", "fly": "flies", "baby": "babies", "leaf": "leaves",
    "wolf": "wolves", "mouse": "mice", "goose": "geese", "foot": "feet", "child": "children", "sheep": "sheep",
}  # fmt: skip
THINGS = tuple(PLURAL_OF_THING)


def portrait(rng: Random) -> tuple[str, str]:
    name, colour, animal, place = map(rng.choice, (NAMES, COLOURS, ANIMALS, PLACES))
    age = rng.randint(2, 99)
    told = f"{name} the {colour} {animal} is {age} years old and lives in the {place}."
    return f"tell {name} {colour} {animal} {age} {place}", told


def comparison(rng: Random) -> tuple[str, str]:
    (name, other), (animal, second) = rng.sample(NAMES, 2), rng.sample(ANIMALS, 2)
    age, other_age = rng.sample(range(2, 100), 2)
    word = rng.choice(("older", "younger"))
    one, two = f"{name} the {animal}", f"{other} the {second}"
    if (age > other_age) != (word == "older"):
        one, two = two, one
    return f"{word} {name} {animal} {age}, {other} {second} {other_age}", f"{one} is {word} than {two}."


def total(rng: Random) -> tuple[str, str]:
    (name, other), thing, place = rng.sample(NAMES, 2), rng.choice(THINGS), rng.choice(PLACES)
    first, second = rng.randint(1, 9), rng.randint(1, 9)
    told = f"{name} and {other} saw {first + second} {PLURAL_OF_THING[thing]} in the {place}."
    return f"total {name} {first}, {other} {second} {thing} {place}", told


def gift(rng: Random) -> tuple[str, str]:
    (name, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    owned, given = rng.randint(5, 18), rng.randint(2, 4)
    told = f"{name} gives {given} {PLURAL_OF_THING[thing]} to {other} and keeps {owned - given}."
    return f"gift {name} {owned} {thing}, {other} gets {given}", told


def order(rng: Random) -> tuple[str, str]:
    names, ages = rng.sample(NAMES, 3), rng.sample(range(2, 100), 3)
    facts = [f"{name} is {age}" for age, name in sorted(zip(ages, names, strict=True))]
    told = f"{facts[0]}, {facts[1]} and {facts[2]} years old."
    return f"order {', '.join(f'{name} {age}' for name, age in zip(names, ages, strict=True))}", told


FORMS: tuple[Callable[[Random], tuple[str, str]], ...] = (portrait, comparison, total, gift, order)


__all__ = [
    "CHARACTERS",
    "EVAL_SEED",
    "KINDS",
    "SHORT",
    "SPECIAL_TOKENS",
    "TRAIN_SEED_BASE",
    "Corpus",
    "Document",
    "decode",
    "documents",
    "encode",
    "evaluation_documents",
    "evaluation_prompts",
    "is_evaluation_prompt",
    "sample",
    "training_documents",
    "write_tokenizer",
]

TRAIN_SEED_BASE = 1_000_000  # training uses TRAIN_SEED_BASE + its own seed, 0 or more
EVAL_SEED = 77  # every evaluation document comes from seeds derived from this one
EVALUATION_DOCUMENTS_PER_KIND = 500  # more than the tasks use, so that tasks can grow without a new training

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One task with its answer. A model is right when its text equals `answer` and ends with EOS."""

    kind: str
    prompt: str
    answer: str


def arithmetic(rng: Random) -> Document:
    """Addition and subtraction of up to five digits, column by column."""
    write = rng.choice((_addition, _subtraction))
    prompt, columns, result = write(rng)
    return Document(kind="arithmetic", prompt=prompt, answer=f"{' '.join(columns)} so {result}")


def _number(rng: Random, fewest_digits: int, most_digits: int) -> int:
    digits = rng.randint(fewest_digits, most_digits)
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _digit_pairs(longer: int, shorter: int) -> list[tuple[int, int]]:
    """The digits of both from the right, the shorter one filled up with zeros."""
    digits = str(longer)
    return [(int(a), int(b)) for a, b in zip(digits[::-1], str(shorter).zfill(len(digits))[::-1], strict=True)]


def _addition(rng: Random) -> tuple[str, list[str], int]:
    first, second = _number(rng, 3, 5), _number(rng, 2, 5)
    carry, columns = 0, []
    for a, b in _digit_pairs(max(first, second), min(first, second)):
        total = a + b + carry
        columns.append(f"{a}+{b}+1={total}" if carry else f"{a}+{b}={total}")
        carry = total // 10
    return f"add {max(first, second)} {min(first, second)}=", columns, first + second


def _subtraction(rng: Random) -> tuple[str, list[str], int]:
    first, second = _number(rng, 3, 5), _number(rng, 2, 5)
    longer, shorter = max(first, second), min(first, second)
    borrow, columns = 0, []
    for digit, b in _digit_pairs(longer, shorter):
        a = digit - borrow
        borrow = int(a < b)
        a += 10 * borrow
        columns.append(f"{a}-{b}={a - b}")
    return f"sub {longer} {shorter}=", columns, longer - shorter


def recall(rng: Random) -> Document:
    """Look up entries by name in a table of made-up names."""
    rows = rng.randint(3, 6)
    names: list[str] = []
    while len(names) < rows:
        name = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
        if name not in names:
            names.append(name)
    numbers, colours = rng.sample(range(100, 1000), rows), rng.sample(COLOURS, rows)
    asked = rng.sample(range(rows), rng.randint(2, 3))
    table = ", ".join(f"{name} {number} {c}" for name, number, c in zip(names, numbers, colours, strict=True))
    facts = [f"{names[i]} has {numbers[i]} {colours[i]}" for i in asked]
    prompt = f"{table}; has {' '.join(names[i] for i in asked)}="
    return Document(kind="recall", prompt=prompt, answer=", ".join(facts))


def sort(rng: Random, fewest: int = 5, most: int = 9) -> Document:
    """Sort two-digit numbers, up or down, then name the extremes."""
    numbers = rng.sample(range(10, 100), rng.randint(fewest, most))
    downwards = rng.random() < 0.5
    ordered = " ".join(map(str, sorted(numbers, reverse=downwards)))
    prompt = f"sort {'down' if downwards else 'up'} {' '.join(map(str, numbers))}="
    return Document(kind="sort", prompt=prompt, answer=f"{ordered} low {min(numbers)} high {max(numbers)}")


def program(rng: Random) -> Document:
    """What a small program prints: a counting loop, string operations, or a filter."""
    prompt, printed = rng.choice((_counter, _string_program, _filter))(rng)
    return Document(kind="program", prompt=f"run {prompt}=", answer=printed)


def _counter(rng: Random) -> tuple[str, str]:
    variable, loops, step = rng.choice(CONSONANTS), rng.randint(3, 5), rng.randint(2, 9)
    start = rng.randint(10, 50)
    if start > step * loops:
        step *= rng.choice((1, -1))
    values = [start + step * (i + 1) for i in range(loops)]
    return f"{variable}={start} loop {loops} {variable}{step:+d}", " ".join(f"{variable}={value}" for value in values)


STRING_OPERATIONS: dict[str, Callable[[str], str]] = {
    "rev": lambda s: s[::-1],
    "rot": lambda s: s[1:] + s[:1],
    "ends": lambda s: s[-1] + s[1:-1] + s[0],
    "cut": lambda s: s[1:],
    "up": str.upper,
    "twice": lambda s: s + s,
}


def _string_program(rng: Random) -> tuple[str, str]:
    text = "".join(rng.choices(CONSONANTS + VOWELS, k=rng.randint(4, 6)))
    names = rng.sample(list(STRING_OPERATIONS), 2)
    prompt, printed = f"{text} {' '.join(names)}", []
    for name in names:
        text = STRING_OPERATIONS[name](text)
        printed.append(text)
    return prompt, f"{' then '.join(printed)} end"


def _filter(rng: Random) -> tuple[str, str]:
    """Keep the numbers that a filter leaves; redrawn until at least three stay, so that no answer is short."""
    while True:
        numbers = rng.sample(range(10, 100), rng.randint(4, 7))
        bound, condition = rng.randint(30, 70), rng.choice(("even", "odd", "over", "under"))
        kept = [n for n in numbers if keeps(condition, n, bound)]
        if len(kept) >= 3:
            shown = f"{condition} {bound}" if condition in ("over", "under") else condition
            return f"keep {shown} of {' '.join(map(str, numbers))}", f"{' '.join(map(str, kept))} end"


def keeps(condition: str, number: int, bound: int) -> bool:
    """Whether the filter keeps a number."""
    if condition in ("over", "under"):
        return number > bound if condition == "over" else number < bound
    return number % 2 == (condition == "odd")


def english(rng: Random) -> Document:
    """Facts in short form, to be written as whole sentences with a small conclusion."""
    prompt, told = rng.choice(FORMS)(rng)
    return Document(kind="english", prompt=f"{prompt}=", answer=told)


KINDS: dict[str, Callable[[Random], Document]] = {
    "arithmetic": arithmetic,
    "recall": recall,
    "sort": sort,
    "program": program,
    "english": english,
}

# Evaluation sorts longer lists than training: the trained lengths are nearly always right.
EVALUATION_KINDS = KINDS | {"sort": partial(sort, fewest=8, most=11)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Kinds of document for training and evaluation, and how many of each are held out.

    The first ``first_watched`` held-out documents of a kind are for tasks, the others for watching a training.
    ``evaluation_seed`` enters the seeds of held-out documents.
    """

    kinds: Mapping[str, Callable[[Random], Document]]
    evaluation_kinds: Mapping[str, Callable[[Random], Document]]
    evaluation_seed: str
    held_out_per_kind: int
    first_watched: int
    max_new_tokens: int


SHORT = Corpus(
    kinds=KINDS,
    evaluation_kinds=EVALUATION_KINDS,
    evaluation_seed=f"{EVAL_SEED}",
    held_out_per_kind=EVALUATION_DOCUMENTS_PER_KIND,
    first_watched=300,
    max_new_tokens=96,  # the longest answer has about 60 tokens with its EOS
)


def sample(kind: str, rng: Random, corpus: Corpus = SHORT) -> Document:
    """One document of a kind. An unknown kind is a UserError."""
    if kind not in corpus.kinds:
        raise UserError(f"unknown kind {kind!r} of miniature document; choose from {', '.join(corpus.kinds)}")
    return corpus.kinds[kind](rng)


def documents(seed: int, kinds: Sequence[str] | None = None, corpus: Corpus = SHORT) -> Iterator[Document]:
    """An endless stream of documents, each kind equally often; the same seed gives the same stream."""
    rng = Random(seed)
    chosen = tuple(kinds or corpus.kinds)
    while True:
        yield sample(rng.choice(chosen), rng, corpus)


def training_documents(seed: int = 0, kinds: Sequence[str] | None = None, corpus: Corpus = SHORT) -> Iterator[Document]:
    """The stream for training: `documents` from a training seed, without the evaluation prompts."""
    assert seed >= 0, "training seeds count from 0"
    stream = documents(TRAIN_SEED_BASE + seed, kinds, corpus)
    return (document for document in stream if not is_evaluation_prompt(document.prompt, corpus))


@cache
def evaluation_documents(kind: str, corpus: Corpus = SHORT) -> tuple[Document, ...]:
    """The held-out documents of one kind, all prompts different, always the same ones."""
    rng = Random(f"{corpus.evaluation_seed} {kind}")
    by_prompt: dict[str, Document] = {}
    while len(by_prompt) < corpus.held_out_per_kind:
        document = corpus.evaluation_kinds[kind](rng)
        by_prompt.setdefault(document.prompt, document)
    return tuple(by_prompt.values())


@cache
def evaluation_prompts(corpus: Corpus = SHORT) -> frozenset[str]:
    """Every held-out prompt, of all kinds."""
    return frozenset(document.prompt for kind in corpus.kinds for document in evaluation_documents(kind, corpus))


def is_evaluation_prompt(prompt: str, corpus: Corpus = SHORT) -> bool:
    """Whether training must leave this prompt out."""
    return prompt in evaluation_prompts(corpus)
