"""The rows of bench/real beside ours, each against its own formula, written out in loops."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "bench" / "real" / "rows.py"


@pytest.fixture(scope="module")
def rows():
    spec = importlib.util.spec_from_file_location("real_rows", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_rows"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["real_rows"]


def drawn():
    torch.manual_seed(0)
    calls = [(torch.randn(7, 5), torch.randn(7, 5)) for _ in range(3)]
    return torch.randn(4, 5), [torch.randn(5, 6), torch.randn(5, 6)], calls


def by_hand(row, weight, makers, calls, j):
    x = torch.cat([x for x, _ in calls])[:, j]
    w = weight[:, j]
    match row:
        case "magnitude":
            return sum(float(v) ** 2 for v in [*w, *makers[0][j], *makers[1][j]])
        case "norms":
            return float(w.norm() * makers[0][j].norm() * makers[1][j].norm())
        case "wanda-sp":
            return sum(abs(float(v)) * float((x**2).sum()) ** 0.5 for v in w)
        case "flap":
            return float(((x - x.mean()) ** 2).mean()) * sum(float(v) ** 2 for v in w)
        case "taylor":
            return sum(sum(float(a[t, j] * g[t, j]) for t in range(len(a))) ** 2 for a, g in calls)
        case "tok2":
            return sum(float(a[t, j] * g[t, j]) ** 2 for a, g in calls for t in range(len(a)))
        case "energy":
            return float((x**2).mean()) * sum(float(v) ** 2 for v in w)


@pytest.mark.parametrize("row", ["magnitude", "norms", "wanda-sp", "flap", "taylor", "tok2", "energy"])
def test_a_row_is_its_formula(rows, row):
    weight, makers, calls = drawn()
    seen = rows.Seen.of(*calls[0])
    for call in calls[1:]:
        seen.add(rows.Seen.of(*call))
    expected = torch.tensor([by_hand(row, weight, makers, calls, j) for j in range(5)])
    torch.testing.assert_close(rows.worth(row, weight, makers, seen), expected)


def test_flap_compares_layers_and_keeps_the_mean_of_what_goes(rows):
    even = rows.gone_of("norms", [torch.tensor([3.0, 1, 2, 4]), torch.tensor([9.0, 8, 7, 6])], 0.5)
    assert [each.tolist() for each in even] == [[1, 2], [2, 3]]
    uneven = rows.gone_of("flap", [torch.tensor([1.0, 1, 1, 9]), torch.tensor([9.0, 1, 9, 9])], 0.5)
    assert [each.tolist() for each in uneven] == [[0, 1, 2], [1]]
    weight, _, calls = drawn()
    seen = rows.Seen.of(*calls[0])
    gone = torch.tensor([1, 3])
    mean = calls[0][0].mean(0)
    expected = weight[:, 1] * mean[1] + weight[:, 3] * mean[3]
    torch.testing.assert_close(rows.bias_of("flap", weight, seen, gone), expected)
    assert rows.bias_of("tok2", weight, seen, gone) is None


def test_llm_pruner_multiplies_weights_by_their_gradients(rows):
    weight, makers, _ = drawn()
    gradients = [torch.randn(4, 5), torch.randn(5, 6), torch.randn(5, 6)]
    found = rows.worth("llm-pruner", weight, makers, None, gradients=gradients)
    for j in range(5):
        terms = [float(abs(weight[i, j] * gradients[0][i, j])) for i in range(4)]
        terms += [float(abs(m[j, k] * g[j, k])) for m, g in zip(makers, gradients[1:], strict=True) for k in range(6)]
        assert float(found[j]) == pytest.approx(sum(terms), rel=1e-5)


def seen_with_gram(rows, calls):
    seen = rows.Seen.of(*calls[0], gram=True)
    for call in calls[1:]:
        seen.add(rows.Seen.of(*call, gram=True))
    return seen, torch.cat([x for x, _ in calls]).double()


def test_modegpt_keeps_units_of_the_highest_leverage_and_fits_the_rest(rows):
    weight, makers, calls = drawn()
    seen, x = seen_with_gram(rows, calls)
    leverage = [float((x.T @ x @ torch.linalg.inv(x.T @ x + torch.eye(5)))[j, j]) for j in range(5)]
    assert rows.worth("modegpt", weight, makers, seen).tolist() == pytest.approx(leverage, rel=1e-4)
    gone = torch.tensor([1, 3])
    left = x[:, [0, 2, 4]]
    expected = torch.linalg.lstsq(left, x @ weight.double().T).solution.T
    torch.testing.assert_close(rows.fitted_of("modegpt", weight, seen, gone).double(), expected, rtol=1e-4, atol=1e-5)
    assert rows.fitted_of("tok2", weight, seen, gone) is None


def test_slimgpt_removes_what_hurts_least_and_fits_each_time(rows):
    weight, makers, calls = drawn()
    seen, x = seen_with_gram(rows, calls)
    root = (0.01 * (x.T @ x).diagonal().mean()).sqrt()
    ridge = torch.cat([x, root * torch.eye(5, dtype=x.dtype)])  # rows that pull to the weights as they are
    target = ridge @ weight.double().T
    left = list(range(5))
    for _ in range(3):
        hurt = {}
        for j in left:
            others = ridge[:, [k for k in left if k != j]]
            hurt[j] = float((others @ torch.linalg.lstsq(others, target).solution - target).square().sum())
        left.remove(min(hurt, key=hurt.get))
    gone = torch.tensor([j for j in range(5) if j not in left])
    place = rows.worth("slimgpt", weight, makers, seen)
    assert sorted(place.argsort()[:3].tolist()) == gone.tolist()
    expected = torch.linalg.lstsq(ridge[:, left], target).solution.T
    torch.testing.assert_close(rows.fitted_of("slimgpt", weight, seen, gone).double(), expected, rtol=1e-4, atol=1e-5)
