"""Noise schedules, and the bounds whose papers give numbers only, by what must hold of them."""

import pytest
import torch

from twotower_eval.engine.schedules import LogLinear, Masking, time_grid
from twotower_eval.engine.scorers import discrete
from twotower_eval.errors import UserError


@pytest.mark.parametrize("name", ["linear", "cosine", "poly2", "poly0.5"])
def test_a_schedule_and_its_derivatives(name: str) -> None:
    schedule, t = Masking(name), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    step = 1e-6
    slope = (schedule.alpha(t + step) - schedule.alpha(t - step)) / (2 * step)
    assert torch.allclose(schedule.dalpha(t), slope, atol=1e-6)
    assert torch.allclose(schedule.weight(t), slope / (1 - schedule.alpha(t)), rtol=1e-5)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([1 - 1e-4, 1e-4])


def test_the_log_linear_schedule() -> None:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    slope = (LogLinear().sigma(t + 1e-6) - LogLinear().sigma(t - 1e-6)) / 2e-6
    assert torch.allclose(LogLinear().rate(t), slope)
    assert torch.allclose(LogLinear().weight(t), 1 / t)


def test_grids_end_at_time_0_and_unmask_all_that_is_left() -> None:
    for cosine in (False, True):
        s, t = time_grid(10, cosine=cosine)
        assert torch.allclose(s[:-1], t[1:])
        assert (float(t[0]), float(s[-1])) == (1.0, 0.0)
        assert Masking("poly0.5").unmasked(s, t).isfinite().all()


def test_an_unknown_schedule_is_said() -> None:
    with pytest.raises(UserError, match="schedule must be linear, cosine or poly"):
        Masking("poly-1")


def test_many_steps_are_nearly_continuous() -> None:
    logits, ids = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 5).long()
    masked, t = torch.tensor([[True, False, True, True, False]] * 2), torch.tensor([0.3, 0.8])
    schedule = Masking("cosine")
    whole = discrete.md4_diffusion(logits, ids, masked, t, schedule)
    steps = discrete.md4_diffusion(logits, ids, masked, t, schedule, num_steps=1000)
    assert torch.allclose(whole, steps, rtol=1e-2)


def test_a_step_of_d3pm_is_the_linear_weight() -> None:
    """A mask's term is the token's surprise over the steps so far, if the network never says mask."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = -1e9
    ids, noisy = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 1, 5, 5])
    surprise = -logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0] * (noisy == 5)
    for start in (1, 4, 6):
        divergence, _ = discrete.d3pm_terms(logits, ids, noisy, start, 1, 8, 5)
        assert torch.allclose(divergence, surprise / (start + 1), atol=1e-5)
    _, entropy = discrete.d3pm_terms(logits, ids, noisy, 0, 1, 8, 5)
    assert torch.allclose(entropy, surprise, atol=1e-5)
