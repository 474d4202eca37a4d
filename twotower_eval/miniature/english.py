"""Templated English: facts in short form, to be told in whole sentences with a small conclusion."""

from collections.abc import Callable
from random import Random

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
