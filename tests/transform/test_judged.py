"""Judged absorption: on positions that were held out nothing is further off than without it, from few rows too."""

import pytest
import torch

from ecospa_fx.passes.transform.absorb import Moments, absorb
from ecospa_fx.passes.transform.judged import ENOUGH, FEW, HeldOut, absorb_judged, ridge_for, weights_of


def moments_of(x):
    return Moments(x.T @ x, x.sum(0), len(x))


def inputs(rows, columns=24, rank=8, noise=0.3, seed=0, large=0):
    """Correlated columns; some positions are a thousand times as large as the rest."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mixed = draw(1000, rank) @ torch.randn(rank, columns, generator=torch.Generator().manual_seed(9)).double()
    x = (mixed + noise * draw(1000, columns))[:rows] * torch.logspace(-2, 2, columns, dtype=torch.float64)
    x[:large] *= 1000
    return x


def off(x, weight, absorption):
    """Squared errors by position, in plain products."""
    exact = x @ weight.T
    made = x[:, absorption.kept] @ absorption.columns(weight)[:, absorption.kept].T
    return (exact - made - absorption.constant @ weight[:, absorption.gone].T).square().sum(-1)


@pytest.mark.parametrize("rows", [3, 12, 40, 400])
@pytest.mark.parametrize("large", [0, 2])
@pytest.mark.parametrize("constant", [False, True])
def test_nothing_is_further_off_where_it_was_not_fitted(rows, large, constant):
    torch.manual_seed(rows)
    weight = torch.randn(5, 24, dtype=torch.float64)
    x, held = inputs(rows, large=large, seed=1), inputs(60, large=large, seed=2)
    kept = torch.arange(0, 24, 2)
    found = absorb_judged(moments_of(x), kept, HeldOut(held, weight), constant=constant)
    plain = held[:, found.gone] @ weight[:, found.gone].T
    errors, removed = off(held, weight, found), plain.square().sum(-1)
    assert float(errors.sum()) <= float(removed.sum()) * (1 + 1e-9)
    weights = weights_of(held @ weight.T)
    assert float((weights * errors).sum()) <= float((weights * removed).sum()) * (1 + 1e-9)
    share = float((weights * errors).sum() / (weights * removed).sum())
    assert share <= found.left * (1 + 1e-9)  # the last fit has seen them too
    others = inputs(500, seed=3)
    assert float(off(others, weight, found).sum()) <= 1.1 * float(
        (others[:, found.gone] @ weight[:, found.gone].T).square().sum()
    )


def test_what_repeats_itself_is_taken_over():
    weight = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, held = (inputs(rows, noise=0.05, seed=rows) for rows in (400, 60))
    found = absorb_judged(moments_of(x), torch.arange(12, 24), HeldOut(held, weight), constant=False)
    assert found.left < 0.1


def test_noise_is_left_as_it_is():
    """Columns that have nothing to do with each other, seen at fewer positions than there are columns."""
    generator = torch.Generator().manual_seed(0)
    x, held = (torch.randn(rows, 24, dtype=torch.float64, generator=generator) for rows in (6, 300))
    weight = torch.randn(5, 24, dtype=torch.float64, generator=generator)
    found = absorb_judged(moments_of(x), torch.arange(12), HeldOut(held, weight), constant=False)
    assert found.left > 0.9 and float(found.share.abs().max()) < 0.3
    fitted = absorb(moments_of(x), torch.arange(12), constant=False, ridge=1e-3)
    assert float(off(held, weight, fitted).sum()) > 1.1 * float((held[:, 12:] @ weight[:, 12:].T).square().sum())


def test_without_positions_to_judge_by_the_ridge_grows_as_rows_are_few():
    assert ridge_for(8 * 12, 12) == ENOUGH < FEW == ridge_for(8 * 12 - 1, 12)
    for rows in (40, 400):
        moments = moments_of(inputs(rows))
        found = absorb_judged(moments, torch.arange(12), None, constant=False)
        expected = absorb(moments, torch.arange(12), constant=False, ridge=FEW if rows == 40 else ENOUGH)
        torch.testing.assert_close(found.share, expected.share)


def test_a_ridge_is_a_share_of_each_columns_own_square():
    """So that the scale of a column does not matter: the columns that stay, a thousand times as large, do the same."""
    x = inputs(100)
    scale = torch.ones(24, dtype=torch.float64)
    scale[5] = 1000
    found = [absorb(moments_of(each), torch.arange(12), constant=False, ridge=0.3) for each in (x, x * scale)]
    torch.testing.assert_close(found[1].share * scale[:12], found[0].share)


def test_positions_count_by_their_outputs_down_from_the_median():
    outputs = torch.tensor([[1.0], [2.0], [3.0], [30.0], [0.0]])
    torch.testing.assert_close(weights_of(outputs), torch.tensor([1.0, 1.0, 4 / 9, 4 / 900, 1.0]))
    assert weights_of(torch.zeros(3, 2)).tolist() == [1.0, 1.0, 1.0]
    assert weights_of(torch.zeros(0, 2)).tolist() == []


def test_moments_that_are_not_finite_serve_for_nothing():
    x = inputs(50)
    x[3, 3] = torch.nan
    held = HeldOut(inputs(20), torch.ones(2, 24, dtype=torch.float64))
    assert absorb_judged(moments_of(x), torch.arange(12), held, constant=False) is None
