"""Documents that are nearly the same count as one, though no cluster id of their own says so."""

import json
from pathlib import Path

import numpy as np
import pytest
from own_tasks import task_yaml, use_tasks, write_tasks

from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.tail_worlds import family_world
from twotower_eval.measure import suites
from twotower_eval.measure.suites.documents import families
from twotower_eval.records import RunManifest
from twotower_eval.resources import data_path
from twotower_eval.rules import joined_lines

STORY = "Anna has {} red apples in her basket and gives {} of them to her brother, how many apples are left in it?"


def test_the_same_text_with_other_numbers_is_one_family() -> None:
    others = [f"{' '.join(f'w{chr(97 + i)}{chr(97 + j)}' for j in range(20))} ?" for i in range(20)]
    texts = [*others, STORY.format(9, 4), STORY.format(12, 7), STORY.format(9, 4).replace("Anna", "Berta")]
    assert families(texts) == [*range(20), 20, 20, 20]
    assert families(texts[:-2]) == list(range(21))


def test_short_texts_of_one_form_are_no_family_and_equal_ones_are() -> None:
    """Made-up items are alike by design."""
    assert families(["add 12 30=", "add 17 44=", "add  12 30=", "sort up 5 1 2", "sort up 9 8 7"]) == [0, 1, 0, 3, 4]


def test_the_form_of_a_task_is_no_sign_of_a_family() -> None:
    form = "Read the passage below with great care and then answer the question in one word only, please: {} {} {}?"
    words = [f"x{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(120)]
    texts = [form.format(*words[3 * i : 3 * i + 3]) for i in range(40)]
    assert families(texts) == list(range(40))


def test_a_passage_with_several_questions_is_one_family() -> None:
    rng = np.random.default_rng(0)
    words = [f"v{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
    passages = [" ".join(rng.choice(words, 80)) for _ in range(12)]
    texts = [f"{passage} {' '.join(rng.choice(words, 8))}?" for passage in passages for _ in range(3)]
    assert families(texts) == [3 * (i // 3) for i in range(36)]


def test_scripts_without_spaces_are_read_by_the_character() -> None:
    story, other = "小明有{}个苹果他给了妹妹{}个还剩下几个苹果", "今天的天气非常好我们一起去公园散步吧"
    assert families([story.format(9, 4), other, story.format(5, 2)]) == [0, 1, 0]


@pytest.mark.parametrize("name", ["arithmetic", "choice", "english", "perplexity", "program", "recall", "sort"])
def test_the_miniatures_documents_stay_apart(name: str) -> None:
    rows = data_path("tasks", "miniature", f"miniature_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row.get("prompt") or row["text"] for row in map(json.loads, rows)]
    assert families(texts) == list(range(len(rows)))


def test_tasks_join_near_duplicates_and_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": STORY.format(i, 3), "answer": "1"} for i in (9, 12)]
    rows += [{"prompt": f"What is the capital of {name}?", "answer": "1"} for name in ("Chad", "Peru")]
    configs = [task_yaml("own", "own", "generate_until", [{"metric": "exact_match"}])]
    write_tasks(tmp_path, configs, {"own": rows})
    use_tasks(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    [built] = suites.resolve_tasks(["own"])
    assert [doc.cluster_id for doc in built.docs] == ["own:0", "own:0", "own:2", "own:3"]
    assert [prompt.cluster_id for prompt in suites.build_requests([built])][:2] == ["own:0", "own:0"]
    fields = dict.fromkeys(RunManifest.__dataclass_fields__)
    manifest = RunManifest(**{**fields, "joined": {"own": len(built.joins)}})  # type: ignore[arg-type]
    assert joined_lines(manifest) == [
        "own: 1 document is nearly the same as others and shares their clusters, in which they count once"
    ]


@pytest.mark.parametrize("found", [False, True])
def test_families_that_are_found_restore_the_coverage(found: bool) -> None:
    """Forty families of five, each right or wrong as one: taken for 200 documents they cover half as often."""
    rng = np.random.default_rng(3)
    names = [" ".join("".join(rng.choice(list("abcdefgh"), 6)) for _ in range(15)) for _ in range(40)]
    texts = [f"{name} has {i} and {i * i} left" for name in names for i in range(5)]
    firsts = families(texts)
    assert firsts == [5 * (i // 5) for i in range(200)]
    world = family_world([str(first) for first in (firsts if found else range(200))])
    num_covered = 0
    for _ in range(150):
        table = world.draw(rng)
        estimate = stats.retention(table, stats.draw_task_means(table, num_resamples=300))
        num_covered += estimate.low <= world.truth <= estimate.high
    assert (num_covered >= 0.91 * 150) if found else (num_covered < 0.85 * 150)
