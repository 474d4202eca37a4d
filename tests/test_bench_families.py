"""The bench of families runs, and compares loops that commit the same tokens."""

import pytest
import torch
from bench import families

from twotower_eval.engine.families.backbone import Past
from twotower_eval.engine.models import load_model
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.pieces import ScoreRequest


def test_both_loops_commit_the_same_tokens_and_each_has_a_row(monkeypatch):
    monkeypatch.setattr(families, "SMALL", {"prompt": 16, "answer": 16})
    monkeypatch.setitem(families.SIZES, "hidden_size", 32)
    monkeypatch.setitem(families.SIZES, "head_dim", 8)
    monkeypatch.setitem(families.SIZES, "num_attention_heads", 4)
    findings = families.run(rounds=1, full=False, say=lambda text: None)
    assert [row[:2] for row in findings.rows] == [("llada", "1"), ("llada", "4"), ("sdar", "1"), ("sdar", "4")]
    monkeypatch.setattr(families, "plain_llada", lambda inner, ids, num: torch.zeros(len(ids), num, dtype=torch.int64))
    with pytest.raises(ValueError, match="llada: the loops commit other tokens"):
        families.run(rounds=1, full=False, say=lambda text: None)


def test_all_rows_of_a_past_are_no_copy():
    past = Past((torch.arange(8.0).view(2, 1, 2, 2),), (torch.zeros(2, 1, 2, 2),))
    assert past.select([0, 1]) is past
    assert past.select([1, 0]).keys[0].tolist() == past.keys[0].flip(0).tolist()


@pytest.mark.parametrize("kind", ["bound", "denoiser_left_to_right"])
def test_likelihoods_of_one_network_do_not_hang_on_what_is_scored_beside_them(kind, tmp_path, monkeypatch):
    """A canvas holds its prompt: rows of unequal length are read beside each other as they are alone."""
    monkeypatch.setitem(families.SIZES, "num_hidden_layers", 1)
    for write in (families.write_llada, families.write_sdar):
        model = load_model(write(tmp_path / write.__name__), device="cpu", dtype="float32")
        scorer = make_scorer(model, kind, block_size=4, num_draws=3)
        pairs = [((1, 2, 3), (4, 5, 6, 7, 8, 9)), ((1, 2), (3, 4)), ((7,), (8,))]
        asked = [ScoreRequest(context_ids=before, continuation_ids=after, seed=5) for before, after in pairs]
        together = scorer.score(asked)
        alone = [scorer.score([one])[0] for one in asked]
        assert [one.logprob_nats for one in together] == pytest.approx([one.logprob_nats for one in alone], rel=1e-5)
        assert all(one.kind == kind and one.logprob_nats < 0 for one in together)
