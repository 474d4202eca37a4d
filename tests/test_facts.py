"""Facts are fields: no code of the package looks into a text that was made for people."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import twotower_eval
from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.simulate import Tally
from twotower_eval.analyse.calibration.tables import remark, rows
from twotower_eval.analyse.compare.fairness import NullFault
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.gate_facts import Null, QualityFloor
from twotower_eval.analyse.compare.points import TaskQuality
from twotower_eval.analyse.compare.warned import LengthsDiffer, VoidCalls
from twotower_eval.analyse.report.page import page
from twotower_eval.analyse.report.rendering import table
from twotower_eval.analyse.report.text import ratio, times
from twotower_eval.analyse.words import fact_text, finding_text
from twotower_eval.analyse.words.facts import method_text
from twotower_eval.records import Estimate, Fact, Finding, Method, MethodKind, WarningKind


def test_a_table_of_texts_is_told_by_its_mark_and_not_by_its_header() -> None:
    rows_of = [["1", "a", "b"]]
    marked = page("# t\n\n" + table(["document", "one", "other"], rows_of, verbatim=True), {})
    assert '<div class="table texts"' in marked
    assert "verbatim" not in marked
    headed = page("# t\n\n" + table(["document", "what the clock says", "n"], rows_of), {})
    assert '<div class="table"' in headed


def test_no_text_of_a_model_can_mark_a_table() -> None:
    made = page("# t\n\n&lt;!-- verbatim --&gt;\n\n| a |\n|---|\n| b |\n", {})
    assert '<div class="table"' in made


def _estimate(method: Method | str) -> Estimate:
    return Estimate(value=0.98, low=0.9, high=1.06, level=0.9, n=100, method=method)


def test_only_an_exact_bound_of_clusters_none_of_which_differs_shrinks_with_their_number() -> None:
    def needed(method: Method | str) -> int | None:
        found = stats.still_needed(_estimate(method), relation="at_least", expected=1.0, margin=0.05)
        return found.total

    by_root = needed(Method(kind="paired_bootstrap", num_resamples=10))
    assert needed(Method(kind="exact_bound", num_differing=0)) < by_root
    assert needed(Method(kind="exact_bound", num_differing=3)) == by_root
    # A text is nothing to go by, whatever it says.
    assert needed("exact binomial bound, 0 of 100 clusters discordant") == by_root


def test_an_estimate_of_others_keeps_the_name_of_its_method() -> None:
    found = _estimate("my own")
    assert method_text(found) == "my own"
    assert found.method_kind is None
    assert not stats.is_exact(dataclasses.replace(found, method="an exact one"))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method(kind="exact_bound", num_differing=2), "exact binomial bound, 2 of 100 clusters discordant"),
        (
            Method(kind="clustered_bootstrap", num_resamples=10_000, num_tasks=3),
            "mean over 3 tasks, clustered bootstrap, 10,000 resamples, or linearised t interval where wider",
        ),
        (
            Method(kind="function_bootstrap", function="f1", num_resamples=50, num_tasks=2),
            "mean over 2 tasks, each by a clustered bootstrap through f1, 50 resamples",
        ),
        (
            Method(kind="crossed_bootstrap", num_resamples=9, drawn="rounds", num_drawn=4, num_calls=3, devices=(1, 2)),
            "crossed paired bootstrap of 4 rounds x 3 calls, 9 resamples, t interval on the log, corrected for skewness"
            ", times 1 / 2 devices",
        ),
        (
            Method(kind="paired_bootstrap", num_resamples=8, num_scoring=1),
            "paired clustered bootstrap, 8 resamples, or linearised t interval where wider, exact bound where the "
            "candidate scores in 1 of 100 clusters",
        ),
    ],
)
def test_methods_in_words(method: Method, words: str) -> None:
    assert method_text(_estimate(method)) == words


def test_every_kind_of_method_has_words() -> None:
    for kind in MethodKind.__args__:
        assert method_text(_estimate(Method(kind=kind, num_resamples=7, num_differing=1)))


def test_a_world_that_is_called_a_miss_has_missed_nothing() -> None:
    tally = Tally(
        name="MISSED", size="9", num=600, num_found=600, num_covered=570, num_supported=20, num_refuted=20, num_exact=0
    )
    [row] = rows([tally])
    assert (row.missed, remark(row)) == (None, "")


# Gates and warnings


def _kinds_of(cls: type[Fact]) -> list[type[Fact]]:
    return [one for own in cls.__subclasses__() for one in (own, *_kinds_of(own))]


def test_every_kind_of_fact_has_words() -> None:
    kinds = [kind for kind in _kinds_of(Fact) if kind.__module__.startswith("twotower_eval.")]
    assert len(kinds) > 30
    assert [kind.__name__ for kind in kinds if kind not in fact_text.registry] == []


def _warning(facts: Fact, kind: WarningKind = "void_calls") -> Finding:
    return Finding(kind=kind, severity="note", facts=facts)


def test_facts_that_differ_in_numbers_alone_are_told_once() -> None:
    one = VoidCalls(num_timed=80, faults=("negative",) * 3)
    assert one.alike == VoidCalls(num_timed=90, faults=("negative",)).alike
    assert one.alike != VoidCalls(num_timed=80, faults=("no time",) * 3).alike
    few = stats.TooFew(of="rounds", num=4)
    assert few.alike == stats.TooFew(of="rounds", num=3).alike
    assert few.alike != stats.TooFew(of="calls", num=4).alike
    # Their sentences differ in digits alone, and would have been told as one.
    assert QualityFloor(floor=0.5, reason="no run of 3").alike != QualityFloor(floor=0.5, reason="no run of 4").alike


def test_what_makes_a_speedup_invalid_says_so_by_its_severity_and_not_by_how_it_begins() -> None:
    fault = NullFault(kind="off", offset=0.02)
    found = Finding(kind="aa_null", severity="invalid", facts=Null(null=None, fault=fault))
    off = "the baseline timed against itself is off by more than 2 %"
    assert finding_text(found) == f"INVALID: A/A null: {off}"
    assert finding_text(dataclasses.replace(found, severity="warning")) == off
    assert finding_text(_warning(LengthsDiffer(), "lengths_differ")).startswith("the arms' outputs differ in length")


def test_a_task_of_two_kinds_is_exercised_where_one_of_them_is() -> None:
    def of(*ways: str) -> bool:
        task = object.__new__(TaskQuality)
        object.__setattr__(task, "scored_by", ways)
        return task.exercises_decoder

    assert of("generation")
    assert of("context_tower", "generation")
    # Their names, joined for people, were none of the two, and the task counted as answered by the decoder.
    assert not of("context_tower", "exact")


def test_a_ratio_is_shown_without_a_unit() -> None:
    found = Measured(estimate=Estimate(value=1.5, low=1.2, high=1.8, level=0.95, n=9, method="x"))
    assert (ratio(found), times(found)) == ("1.50 [1.20, 1.80]", "1.50x [1.20, 1.80]")


# The whole package

PACKAGE = Path(twotower_eval.__file__).parent
LOOKS = {
    *("startswith", "endswith", "split", "rsplit", "splitlines", "partition", "rpartition", "removeprefix"),
    *("removesuffix", "find", "rfind", "index", "rindex", "count", "replace", "translate"),
}
PATTERNS = {"search", "match", "fullmatch", "sub", "subn", "split", "findall", "finditer"}
# What holds sentences, or names for people, wherever it is an attribute or a variable of that name.
SENTENCES = {"reason", "remark", "warning", "message", "method", "detail", "label", "text", "sentence"}
SENTENCES |= {"reasons", "remarks", "warnings", "messages", "said", "told", "words", "why", "title", "header"}
# What looks into a text -> why that is no sentence of our own. Modules may be joined, so files are not named.
ALLOWED = {
    "text.removeprefix(ENDPOINT)": "what a user typed",
    "text.startswith(ENDPOINT)": "what a user typed",
    "baseline_name(self).startswith(ENDPOINT)": "what a user typed",
    "text.partition('@')": "what a user typed",
    "text.partition('#')": "what a user typed",
    "text.startswith(('http://', 'https://'))": "what a user typed",
    "text.partition(':')": "what a user typed",
    "text.startswith('{')": "what a user typed",
    "text.split(one, 1)": "a model's answer",
    "text.removeprefix(codec.decode_with_special([bos]))": "a prompt",
    "text.startswith(before)": "a prompt",
    "quantised.method.partition('_')": "a library's name in a config.json",
    "re.findall('\\\\w+', str(error))": "lm-eval's own error, which has no field",
    "str(error).startswith(('Include cycle', 'Expected YAML dict'))": "lm-eval's own error, which has no field",
    "_WORDS.findall(text)": "a model's answer",
    "NEXT_ITEM.search(text)": "a model's answer",
    "_SPACES.sub(' ', text)": "a model's answer",
    "'\\n' in made.title": "a plug-in's title, refused where it is no line",
    "HOME.sub('~', text)": "a word of a command line",
    "text.split('`')": "commands stand between backticks, as in Markdown",
    "text.split(',')": "what a user typed",
    "text.split(stop, 1)": "a model's answer",
    "text.startswith(known)": "a model's answer",
    "text.startswith(mark)": "a prompt",
    "text.replace(spaced, tight)": "a model's answer",
    "text.startswith(BOM)": "the text of a file",
    "text.partition(f'[{group}]')": "the text of a package's entry points",
    "_VALUE.match(text, place)": "what a user typed",
    "text.replace('\"', '\"\"')": "what a user would type",
    "'\\\\u' in text": "the text of a file",
    "_HALF_PAIR.search(text)": "the text of a file",
    "UNDER_OPTIONS.findall(text)": "a task's prompt",
    "FIRST_LISTED.search(text)": "a task's prompt",
    "_text(path).replace('\\r', '\\n')": "the text of a file",
    "_TOKEN.findall(text)": "what is tokenized",
    "term.pattern.search(text)": "a report or a verdict, for the terms that are explained behind it",
}


def _is_sentence(node: ast.expr) -> bool:
    """Whether an expression is a text for people, or was made one: ``gate_text(gate)``, ``str(error)``."""
    if isinstance(node, ast.Attribute):
        return node.attr in SENTENCES
    if isinstance(node, ast.Name):
        return node.id in SENTENCES
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        shown = called in ("times", "percent", "retention") or called.endswith(("_text", "_words", "_line", "_name"))
        of_error = called == "str" and bool(node.args) and getattr(node.args[0], "id", "") == "error"
        return (shown and called != "read_text") or of_error
    return False


def _looks_into(node: ast.AST) -> bool:
    """Whether this takes a text apart, or decides by what stands in it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in LOOKS and node.args and _is_sentence(node.func.value):  # without: blanks are made one
            return True
        return node.func.attr in PATTERNS and any(map(_is_sentence, node.args))
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if isinstance(node.ops[0], (ast.In, ast.NotIn)):  # "a phrase" in text, where text is no collection of kinds
            phrase = isinstance(node.left, (ast.Constant, ast.JoinedStr)) and isinstance(node.ops[0], ast.In)
            return phrase and _is_sentence(node.comparators[0])
        prose = any(isinstance(one, ast.Constant) and isinstance(one.value, str) and " " in one.value for one in sides)
        return prose and any(map(_is_sentence, sides))
    return False


def looked_into(source: str) -> list[str]:
    """What in a module looks into a text for people."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if _looks_into(node)]


@pytest.mark.parametrize(
    "line",
    [
        'bad = warning.startswith("INVALID")',
        'exact = "exact" in found.method',
        'missed = row.remark.startswith("MISSED")',
        'kind = "texts" if tokens[i].text.endswith("says") else None',
        'rest = label.partition(", ")[2]',
        'key = re.sub(r"[0-9]+", "#", gate.detail)',
        'key = FIGURE.sub("#", warning)',
        'number = times(value).replace("x", "")',
        'known = estimate.method == "equal by construction"',
        'slow = "is slower" in gate_text(gate)',
        'digits = "integer string conversion" in str(error)',
        'rest = short_name(decoder).partition(", ")[2]',
    ],
)
def test_the_scan_finds_what_reads_a_text_back(line: str) -> None:
    assert looked_into(line)


@pytest.mark.parametrize(
    "line",
    [
        'exact = found.method.kind == "exact_bound"',
        'name = f"{detail}: {reason}"',
        'parts = path.split("/")',
        'if gate.kind in ("residual", "probes"): pass',
        "unknown = one.reason is None",
    ],
)
def test_the_scan_leaves_fields_alone(line: str) -> None:
    assert not looked_into(line)


def test_no_text_for_people_is_read_back() -> None:
    found = {
        one: path.name
        for path in sorted(PACKAGE.rglob("*.py"))
        for one in looked_into(path.read_text(encoding="utf-8"))
    }
    assert {one: name for one, name in found.items() if one not in ALLOWED} == {}, "what is decided by is a field"
    assert sorted(set(ALLOWED) - set(found)) == [], "nothing uses these allowances any more"
