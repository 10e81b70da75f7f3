"""Judged absorption: the ridge is chosen by positions that the regression has not seen, and so is to do nothing.

Where there are no such positions, the ridge grows as rows are few. Moments of few positions say what repeats itself in
them, not in the data: a trained transformer of 1,536 hidden units lost more with a weak ridge and 2,048 positions than
without any regression (docs/absorption.md has the numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .absorb import Absorption, Moments, Regression, absorb

ROWS_ENOUGH = 8
"""Rows per column that stays above which the weaker of two ridges is taken."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridges to choose from, as shares of each column's own diagonal."""
ENOUGH, FEW = 0.3, 1.0
"""The ridges with enough rows and with few."""
CLOSE = 1.01
"""A larger ridge is preferred whose error is so close to the best one: it stays nearer to the weights that were."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Positions of a weight's input that the regression does not see.

    Attributes:
        rows: `[positions, columns]`.
        matrix: `[outputs, columns]`, the weights that sum over them, one below the other.
    """

    rows: Tensor
    matrix: Tensor

    def errors(self, absorption: Absorption) -> tuple[Tensor, Tensor]:
        """Return the squared error of the outputs at each position with it, and where the columns just go."""
        rows = self.rows.to(absorption.share)
        gone = self.matrix.to(rows)[:, absorption.gone.to(self.matrix.device)]
        removed = rows[:, absorption.gone]
        taken = rows[:, absorption.kept] @ absorption.share.T + absorption.constant
        return ((removed - taken) @ gone.T).square().sum(-1), (removed @ gone.T).square().sum(-1)

    @property
    def weights(self) -> Tensor:
        """Weights of the positions, see `weights_of`."""
        return weights_of(self.rows.double() @ self.matrix.to(self.rows).double().T)


def weights_of(outputs: Tensor) -> Tensor:
    """Weigh positions by 1 / the squared norm of their outputs, those below the median like the median.

    In trained transformers a few positions (the first one, separators) have outputs a hundred times as large as the
    rest. A plain sum of squares is theirs alone, though what follows is normalised position by position. So the
    regression must be good by both.

    Args:
        outputs: `[positions, outputs]`.

    Returns:
        `[positions]`, at most 1.
    """
    squares = outputs.square().sum(-1)
    middle = squares.median() if len(squares) else squares.sum()
    return torch.where(middle > 0, middle / torch.maximum(squares, middle).clamp(min=1e-300), 1.0)


def ridge_for(count: int, kept: int) -> float:
    """Return the ridge for so many positions and columns that stay, where nothing is known of other positions."""
    return ENOUGH if count >= ROWS_ENOUGH * kept else FEW


def absorb_judged(
    moments: Moments,
    kept: Tensor,
    held: HeldOut | None,
    *,
    constant: bool,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Absorption | None:
    """Regress the columns that go on those that stay, as far as that holds at positions that were held out.

    Args:
        moments: moments of the weight's input, without the positions held out.
        kept: sorted LongTensor of the columns that stay.
        held: positions held out; None where there are none.
        constant: see `absorb`.
        total: adds up over processes.

    Returns:
        The absorption, of all positions with the ridge that was best at those held out, and of their outputs the share
        of the squares that was left while they were; or one that takes over nothing, where none was better than that.
        None where the moments hold an inf or a NaN.
    """
    start = ridge_for(moments.count, len(kept))
    if held is None:
        return absorb(moments, kept, constant=constant, ridge=start)
    if held.rows.device.type == "mps":  # it has no float64
        held = HeldOut(held.rows.cpu(), held.matrix.cpu())
    weights, regression = held.weights, Regression.of(moments, kept, constant=constant)

    def judge(ridge: float) -> tuple[float, float] | None:
        if regression is None:
            return None
        with_it, without = held.errors(regression.solved(ridge, left=1.0))
        sums = total(torch.stack([(weights * with_it).sum(), (weights * without).sum(), with_it.sum(), without.sum()]))
        if not bool(sums.isfinite().all()):
            return math.inf, math.inf
        weighted, removed, plain, plainly = sums.tolist()
        return max(_share(weighted, removed), _share(plain, plainly)), _share(weighted, removed)

    found = {start: judge(start)}
    if found[start] is None:
        return None
    for way in (1, -1):
        place = RIDGES.index(start)
        while 0 <= place + way < len(RIDGES):
            ridge, last = RIDGES[place + way], found[RIDGES[place]]
            found[ridge] = now = judge(ridge)
            if now is None or last is None or now[0] >= last[0]:
                break
            place += way
    shares = {ridge: value for ridge, value in found.items() if value is not None}
    least = min(worst for worst, _ in shares.values())
    best = max(ridge for ridge, (worst, _) in shares.items() if worst <= CLOSE * least)
    if shares[best][0] >= 1:
        return nothing_taken(moments, kept)
    regression = None  # its room is needed for that of all positions
    regression = Regression.of(_with(moments, held.rows, total), kept, constant=constant)
    return None if regression is None else regression.solved(best, left=min(1.0, max(0.0, shares[best][1])))


def _with(moments: Moments, rows: Tensor, total: Callable[[Tensor], Tensor]) -> Moments:
    """Add the positions held out, of all processes."""
    rows = rows.to(moments.squares)
    count = total(torch.tensor([len(rows)], dtype=torch.float64, device=rows.device))
    squares, sums = moments.squares + total(rows.T @ rows), moments.sums + total(rows.sum(0))
    return Moments(squares, sums, moments.count + int(count))


def nothing_taken(moments: Moments, kept: Tensor) -> Absorption:
    """Return the absorption that leaves the weights as they are."""
    device = moments.squares.device
    goes = torch.ones(len(moments.sums), dtype=torch.bool, device=device)
    goes[kept.to(device)] = False
    gone = goes.nonzero().flatten()
    share = torch.zeros(len(gone), len(kept), dtype=torch.float64, device=device)
    return Absorption(kept.to(device), gone, share, share.new_zeros(len(gone)), 1.0)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part <= 0 else float("inf"))
