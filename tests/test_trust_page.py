"""The decoder that docs/trust.md shows is the one that is tested here, and it runs under ``run`` and ``speed``."""

from pathlib import Path

import pytest

from tests import cheating_decoders, example_decoder
from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.engine.decoders.reported import ReportError
from twotower_eval.measure import harness, speed, suites
from twotower_eval.plan import RunPlan, SpeedPlan

PAGE = Path(__file__).parent.parent / "docs" / "trust.md"
TASK, KIND = "miniature_sort", "tests.example_decoder:Greedy"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_the_page_shows_the_example_word_for_word() -> None:
    code = Path(example_decoder.__file__).read_text(encoding="utf-8").partition('"""\n\n')[2]
    assert f"```python\n{code}```" in PAGE.read_text(encoding="utf-8")


def test_the_example_is_scored_as_the_baselines_own_decoder_is(pair: Path, tmp_path: Path) -> None:
    answers = []
    for kind in (KIND, "autoregressive"):
        plan = RunPlan(model=str(pair), tasks=(TASK,), decoder=kind, limit=3, max_new_tokens=6, batch_size=2)
        run = store.load(harness.run(plan, root=tmp_path))
        assert run.complete
        answers.append({(row.task, row.doc_id): row.generation.token_ids for row in run.generations})
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3


def test_the_example_is_timed(pair: Path, tmp_path: Path) -> None:
    plan = SpeedPlan(
        model=str(pair), tasks=(TASK,), decoder=KIND, batch_sizes=(2,), num_prompts=2, new_tokens=6, min_rounds=1,
        warmup_rounds=0, costs=False, threads=1,
    )  # fmt: skip
    assert store.load(speed.run(plan, suites.build_requests(suites.resolve_tasks((TASK,)), 4), root=tmp_path)).complete


def test_a_wrong_count_is_told_what_to_do(pair: Path, tmp_path: Path) -> None:
    """It said that a row counts in every model call, and not what a plug-in has to write."""
    kind = f"{cheating_decoders.MODULE}:Understates"
    plan = RunPlan(model=str(pair), tasks=(TASK,), decoder=kind, limit=1, max_new_tokens=6, batch_size=1)
    with pytest.raises(
        ReportError, match=r"CountingModel\(model, len\(prompts\)\) .* or add up the rows of each call yourself"
    ):
        harness.run(plan, root=tmp_path)
