"""Strategies of hypothesis for random modules, for property tests of code that takes a module.

>>> from hypothesis import given
>>> from ecospa_fx.testing.strategies import programs
>>> @given(programs("attention", "norm"))
... def test_mine(program):
...     model, args = program.build()

hypothesis prints a program that fails as runnable code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise ImportError("ecospa_fx.testing.strategies needs hypothesis: pip install hypothesis") from error

from .programs import RandomProgram
from .random_program import INPUTS, KINDS, random_program


def programs(*kinds: str, most: int = 10, inputs: Sequence[str] = tuple(INPUTS)) -> SearchStrategy[RandomProgram]:
    """Draw random modules as code: `program.build()` makes the module and the arguments of a call, `print` shows it.

    Args:
        kinds: kinds of steps, of `KINDS` (`"attention"`, `"glu"`, `"conv"`, `"view"`, ...); by default all.
        most: largest number of steps; a block such as an attention is one.
        inputs: possible inputs: `"tokens"` `[b, s, d]`, `"words"` (whole numbers `[b, s]`, embedded), `"rows"`
            `[b, d]`, `"images"` `[b, c, h, w]`, `"two"` (tokens of two lengths).

    Raises:
        ValueError: there is no such kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"there is no kind of step `{unknown[0]}`; the kinds are {', '.join(KINDS)}")
    return st.builds(
        random_program, st.randoms(use_true_random=False), st.just(kinds), st.just(most), st.just(tuple(inputs))
    )


def modules(*kinds: str, most: int = 10) -> SearchStrategy[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Draw random modules in float64 and eval mode, with the arguments of a call; see `programs`."""
    return programs(*kinds, most=most).map(RandomProgram.build)
