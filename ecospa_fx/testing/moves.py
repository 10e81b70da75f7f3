"""Moves: single steps of a random program. Each takes earlier values and writes a statement or two.

A move raises `Dead` if no value fits it; `random_program` then draws another move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .programs import Dead, Value, Writer

Move = Callable[[Writer], Any]
MOVES: list[tuple[Move, float, str]] = []  # a step, its weight in the draw, and its kind

# All of these map zero to zero, so they keep the removed entries of a masked model at zero.
QUIET = ("F.relu({})", "F.gelu({})", "F.silu({})", "torch.tanh({})", "{} * {}.sigmoid()", "F.leaky_relu({}, 0.1)",
         "F.hardswish({})", "F.elu({})", "torch.sin({})", "F.relu({}).square()", "torch.erf({})",
         "F.softplus({}) - 0.6931471805599453", "{}.clamp(-0.5, 0.7)", "F.mish({})")  # fmt: skip
LOUD = ("torch.sigmoid({})", "torch.cos({})", "torch.exp(-{}.square())", "1 + {}", "F.elu({}) + 1.2", "F.softplus({})",
        "({}.square() + 1).rsqrt()", "torch.where({} > 0, {}, 0.5)", "{}.clamp(min=0.1)", "1 - {}")  # fmt: skip


def move(weight: float, kind: str) -> Callable[[Move], Move]:
    """Register a step, with its weight in the draw and its kind."""

    def register(step: Move) -> Move:
        MOVES.append((step, weight, kind))
        return step

    return register


def activate(w: Writer, x: Value, loud: float = 0.3) -> Value:
    """Apply a nonlinearity, entry by entry."""
    code = w.rng.choice(LOUD if w.chance(loud) else QUIET)
    return w.put(code.replace("{}", str(x)))


def project(w: Writer, x: Value, width: int) -> Value:
    """Multiply by a weight along the last dim, in one of the ways in which people write that."""
    n = x.shape[-1]
    match w.rng.randrange(9):
        case 0 if x.ndim > 1:
            return w.put(f"{x} @ {w.parameter(n, width)}")
        case 1:
            return w.put(f"{x} @ {w.parameter(width, n)}.T")
        case 2:
            return w.put(f"torch.einsum('{'abcdf'[: x.ndim - 1]}k,nk->{'abcdf'[: x.ndim - 1]}n', {x}, "
                         f"{w.parameter(width, n)})")  # fmt: skip
        case 3 if x.ndim > 1:
            rows = f"{x}.reshape(-1, {n})"
            flat = f"torch.addmm({w.parameter(width)}, {rows}, {w.parameter(n, width)})"
            return w.put(f"{flat}.view({', '.join(map(str, x.shape[:-1]))}, {width})")
        case 4:
            more = w.size()
            return w.put(f"F.linear({x}, {w.parameter(width + more, n)}[:{width}])")
        case _:
            return w.put(f"{w.hold(f'nn.Linear({n}, {width})')}({x})")


def alike(w: Writer, x: Value) -> Value:
    """Return another value of the shape of `x`: an earlier one, or a projection of one that differs in the last dim."""
    same = [v for v in w.values if v.floating and v.shape == x.shape and v is not x]
    if same and w.chance(0.6):
        return w.rng.choice(same)
    source = w.pick(max(1, x.ndim), x.ndim, lambda v: v.shape[:-1] == x.shape[:-1])
    return project(w, source, x.shape[-1])


# Weights


@move(7, "linear")
def linear(w: Writer) -> None:
    """Multiply by a weight along the last dim."""
    project(w, w.pick(), w.size())


@move(1.5, "tied")
def linear_again(w: Writer) -> None:
    """Use a layer a second time, or another layer that shares its weight."""
    x = w.pick()
    layers = [name for name, code in w.linears() if code.startswith(f"nn.Linear({x.shape[-1]},")]
    if not layers:
        raise Dead("no layer fits")
    name = f"self.{w.rng.choice(layers)}"
    if w.chance(0.4):
        other = w.hold(dict(w.linears())[name.removeprefix("self.")])
        w.tie(other, name)
        name = other
    w.put(f"{name}({x})")


@move(0.7, "tied")
def linear_back(w: Writer) -> None:
    """Use the weight of a layer transposed, like a tied head."""
    x = w.pick()
    layers = [name for name, code in w.linears() if code.endswith(f", {x.shape[-1]})")]
    if not layers:
        raise Dead("no layer fits")
    w.put(f"F.linear({x}, self.{w.rng.choice(layers)}.weight.t())")


@move(0.7, "linear")
def joined_weights(w: Writer) -> None:
    """Combine two weights into one: end to end, added, or multiplied; or make one of entries or rows of another."""
    x, a, b = w.pick(), w.size(), w.size()
    n = x.shape[-1]

    def by_rows() -> str:
        name = w.parameter(a, n)
        return w.rng.choice((f"{name} - {name}.mean(1, True)", f"{name} / (1 + {name}.square().sum(1, True))"))

    weight = w.rng.choice(
        (
            lambda: f"torch.cat([{w.parameter(a, n)}, {w.parameter(b, n)}])",
            lambda: f"{w.parameter(a, n)} + {w.parameter(a, n)}",
            lambda: f"{w.parameter(a, n)} * {w.parameter(a, 1)}",
            lambda: f"{w.parameter(a, b)} @ {w.parameter(b, n)}",
            lambda: f"{w.parameter(n, a)}.t().contiguous()",
            lambda: f"{w.parameter(a * b, n)}.view({a}, {b}, {n}).transpose(0, 1).reshape({a * b}, {n})",
            lambda: f"{w.parameter(a, b, n)}.flatten(0, 1)",
            lambda: f"{w.parameter(a, n)} + {w.parameter(a, b)} @ {w.parameter(b, n)}",
            lambda: f"{w.parameter(a, n)} * torch.tanh({w.parameter(a, n)})",
            by_rows,
        )
    )()
    w.put(f"F.linear({x}, {weight})")


@move(1, "linear")
def heads_weight(w: Writer) -> None:
    """Multiply by a weight of three dims."""
    x = w.pick(2, 4)
    lead, h, e = "abcf"[: x.ndim - 1], w.size(), w.size()
    if w.chance(0.5):
        w.put(f"torch.einsum('{lead}d,hed->{lead}he', {x}, {w.parameter(h, e, x.shape[-1])})")
    else:
        y = w.pick(3, 5)
        lead = "abcf"[: y.ndim - 2]
        w.put(f"torch.einsum('{lead}he,hed->{lead}d', {y}, {w.parameter(*y.shape[-2:], h)})")


@move(0.7, "linear")
def batched_weight(w: Writer) -> None:
    """Multiply by a weight per entry of the first dim."""
    x = w.pick(3, 3)
    w.put(f"torch.bmm({x}, {w.parameter(x.shape[0], x.shape[-1], w.size())})")


@move(1.5, "linear")
def vector(w: Writer) -> None:
    """Add or multiply a parameter along some dims."""
    x = w.pick()
    dims = x.shape[-w.rng.randint(1, x.ndim) :]
    dims = tuple(1 if w.chance(0.2) else d for d in dims)
    w.put(f"{x} {w.rng.choice('+*-')} {w.parameter(*dims)}")


# Entry by entry


@move(5, "pointwise")
def activation(w: Writer) -> None:
    """Apply a nonlinearity."""
    activate(w, w.pick())


@move(4, "pointwise")
def binary(w: Writer) -> None:
    """Combine two values of one shape."""
    x = w.pick()
    y = alike(w, x)
    code = w.rng.choice(
        ("{} + {}", "{} * {}", "{} - {}", "{} + 0.5 * {}", "torch.maximum({}, {})", "torch.lerp({}, {}, 0.3)",
         "{} / ({}.square() + 1)", "torch.addcmul({}, {}, {})", "{} + {}", "{} * {}")
    )  # fmt: skip
    if w.chance(0.5):
        x, y = y, x
    w.put(code.replace("{}", str(x), 1).replace("{}", str(y)))


@move(1, "pointwise")
def broadcast(w: Writer) -> None:
    """Combine two values, of which one is broadcast."""
    x = w.pick(2)

    def fits(v: Value) -> bool:
        return v is not x and all(a == b or 1 in (a, b) for a, b in zip(v.shape[::-1], x.shape[::-1], strict=False))

    w.put(f"{x} {w.rng.choice('+*')} {w.pick(1, 6, fits)}")


@move(0.7, "pointwise")
def masked(w: Writer) -> None:
    """Mask entries by position, or by value."""
    x = w.pick(2)
    a, b = x.shape[-2:]
    w.put(
        w.rng.choice(
            (
                f"{x}.masked_fill(~torch.ones({a}, {b}, dtype=torch.bool).tril(), 0.0)",
                f"{x} * torch.linspace(0.5, 1.5, {b}, dtype={x}.dtype)",
                f"{x} + torch.arange({a}, dtype={x}.dtype).mul(0.1)[:, None]",
                f"{x}.masked_fill({x} < -0.3, 0.0)",
                f"{x}.tril()",
            )
        )
    )


@move(1, "in_place")
def in_place(w: Writer) -> None:
    """Write into a copy in place."""
    x = w.pick()
    y = alike(w, x)
    k = max(1, x.shape[-1] // 2)
    copied = w.put(f"{x}.clone()")
    w.put(
        w.rng.choice(
            (
                f"{copied}.add_({y})",
                f"{copied}.mul_({y})",
                f"{copied}.narrow(-1,0,{k}).copy_({y}.narrow(-1, 0, {k}))",
                f"{copied}.relu_()",
                f"torch.zeros_like({x}).copy_({y})",
            )
        )
    )
