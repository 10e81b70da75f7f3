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
