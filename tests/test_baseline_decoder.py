"""``--baseline-decoder`` and ``--baseline-set``: the baseline's decoder is chosen as the candidate's is."""

from pathlib import Path

import pytest

from twotower_eval import cli, store
from twotower_eval.api.given import plan_of
from twotower_eval.decoder_settings import baseline_spec
from twotower_eval.engine.decoders import decoder_spec
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.plan_files import load_plan, merge, plan_from_json
from twotower_eval.records import to_json

KIND = "tests.two_parameters:Impatient"
TASK = "miniature_sort"
BASELINE = ["--baseline-decoder", KIND, "--baseline-set", "patience=2", "--baseline-set", "choice=second"]


def test_a_plan_that_names_none_is_as_before() -> None:
    """One token at a time, at the plan's temperature, and nothing of it in what is stored."""
    for plan in (RunPlan(), SpeedPlan(), RunPlan(baseline_decoder="autoregressive"), RunPlan(baseline_set={})):
        assert baseline_spec(plan) == decoder_spec("autoregressive", temperature=0.0)
    assert baseline_spec(RunPlan(temperature=0.5)) == decoder_spec("autoregressive", temperature=0.5)
    assert not {"baseline_decoder", "baseline_set"} & to_json(RunPlan()).keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--baseline-decoder", "autoregresive"], "did you mean autoregressive?"),
        (["--baseline-set", "patience=2"], "decoder 'autoregressive' has no parameter 'patience' to set"),
        ([*BASELINE[:2], "--baseline-set", "patience=soon"], "--baseline-set patience must be a whole number"),
        ([*BASELINE[:2], "--baseline-set", "patience=1,2"], "baseline_set.patience names 1, 2: a baseline has one"),
        ([*BASELINE[:2], "--temperature", "0.5", "--tasks", TASK], "has no temperature"),
        (["--baseline-set", "temperature=0.5"], "give --temperature, not baseline_set"),
        ([*BASELINE[:2], "--baseline-set", "patience=-1", "--tasks", TASK], "patience must be 0 or more"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "speed"])
def test_a_slip_is_one_line_before_weights_are_loaded(
    verb: str, given: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("twotower_eval.engine.models.arms.load_arms", loaded)
    decoder = ["--decoder", KIND] if "--temperature" not in given else []
    assert cli.main([verb, *decoder, *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_plan_file_and_python_say_it_too(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f'baseline_decoder = "{KIND}"\n[baseline_set]\npatience = 2\nchoice = "first"\n')
    plan = merge(load_plan(path, RunPlan), {"baseline_set": {"choice": ("second",)}})
    assert plan == plan_of(RunPlan, None, None, {"baseline_decoder": KIND, "baseline_set": dict(WANTED)})
    assert plan_from_json(RunPlan, to_json(plan)) == plan
    assert dict(baseline_spec(plan).params) == WANTED
    with pytest.raises(UserError, match="baseline_set must be a table"):
        RunPlan(baseline_set="patience=2")  # type: ignore[arg-type]


WANTED = {"patience": 2, "choice": "second"}


def test_run_and_speed_decode_the_baseline_with_it(tmp_path: Path) -> None:
    common = ["--model", "miniature", "--decoder", "autoregressive", "--tasks", TASK, "--out", str(tmp_path)]
    quick = ["--num-prompts", "1", "--min-rounds", "2", "--warmup-rounds", "0", "--probes", "0", "--no-costs"]
    assert cli.main(["run", *common, *BASELINE, "--limit", "2", "--trace", "0"]) == 0
    assert cli.main(["speed", *common, *BASELINE, *quick, "--threads", "1"]) == 0
    assert cli.main(["run", *common, "--limit", "2", "--trace", "0", "--baseline", "context-tower"]) == 0
    runs = [store.load(path) for path in sorted(tmp_path.iterdir())]
    for run in runs[:2]:
        [baseline] = [cell for cell in run.manifest.cells if cell.arm == "baseline"]
        assert (baseline.decoder.kind, dict(baseline.decoder.params)) == (KIND, WANTED)
    of_baseline = {cell.id for cell in runs[0].manifest.cells if cell.arm == "baseline"}
    lengths = {len(row.generation.token_ids) for row in runs[0].generations if row.cell in of_baseline}
    assert max(lengths) <= 2
    own, plain = ([c.id for c in run.manifest.cells if c.arm == "candidate"] for run in (runs[0], runs[2]))
    assert own == plain, "the candidate's cells do not depend on the baseline's decoder"
