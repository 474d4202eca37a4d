"""The bench of families runs, and compares loops that commit the same tokens."""

import pytest
import torch
from bench import families

from twotower_eval.engine.families.backbone import Past


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
