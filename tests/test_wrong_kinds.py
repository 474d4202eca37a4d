"""What is no path, no claim, no decoder or no verify is told in one line by the functions that get it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made

import twotower_eval as tt
from twotower_eval.errors import UserError

WRONG: dict[str, Callable[[Any], object]] = {
    "is no claim: give a claim file": tt.judge,
    "is no claim file: give its path": tt.audit,
    "names are those of claims": lambda wrong: tt.judge("twotower", names=wrong),
    "is no checkpoint folder: give its path": tt.load_model,
    "a decoder is chosen by its name or as package": lambda wrong: tt.make_decoder(None, wrong),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("words", WRONG)
def test_a_value_of_a_wrong_kind_is_one_line(words: str) -> None:
    with pytest.raises(UserError, match=words):
        WRONG[words](3)


def test_no_claims_are_refused_before_any_run_is_looked_for() -> None:
    with pytest.raises(UserError, match="the list of claims is empty"):
        tt.judge([])


def test_only_a_verify_has_check_lines(tmp_path: Path) -> None:
    run = tt.load_run(made.quality_run(tmp_path, num_docs=5))
    with pytest.raises(UserError, match="has no checks: only twotower-eval verify makes some"):
        _ = run.check_lines
