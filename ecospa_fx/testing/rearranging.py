"""Rearranging moves: the same entries in other dims, parts of a dim, several values end to end."""

from __future__ import annotations

from .moves import alike, move
from .programs import Dead, Value, Writer


@move(2.5, "view")
def cut_dim(w: Writer) -> None:
    """Split a dim into two."""
    x = w.pick(1, 4)
    dim = x.ndim - 1 if w.chance(0.7) else w.rng.randrange(x.ndim)
    inner = [d for d in range(1, x.shape[dim] + 1) if x.shape[dim] % d == 0]
    if len(inner) < 3 and w.chance(0.8):
        raise Dead("a prime")
    n = w.rng.choice(inner)
    m = x.shape[dim] // n
    if w.chance(0.5):
        w.put(f"{x}.unflatten({dim}, ({m}, {n}))")
    else:
        sizes = (*x.shape[:dim], m, w.rng.choice((n, -1)), *x.shape[dim + 1 :])
        w.put(f"{x}.reshape({', '.join(map(str, sizes))})")


@move(2.5, "view")
def merge_dims(w: Writer) -> None:
    """Merge two neighbouring dims."""
    x = w.pick(2)
    dim = x.ndim - 2 if w.chance(0.6) else w.rng.randrange(x.ndim - 1)
    if w.chance(0.5):
        w.put(f"{x}.flatten({dim}, {dim + 1})")
    else:
        sizes = (*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])
        w.put(f"{x}.reshape({', '.join(map(str, sizes))})")


@move(0.7, "view")
def regroup(w: Writer) -> None:
    """Reshape all dims but the first."""
    x = w.pick(2, 4)
    rest = 1
    for d in x.shape[1:]:
        rest *= d
    divisors = [d for d in range(1, rest + 1) if rest % d == 0]
    w.put(f"{x}.reshape({x.shape[0]}, {w.rng.choice(divisors)}, -1)")


@move(2.5, "view")
def permuted(w: Writer) -> None:
    """Permute the dims."""
    x = w.pick(2)
    order = list(range(x.ndim))
    w.rng.shuffle(order)
    a, b = order[:2]
    w.put(
        w.rng.choice(
            (
                f"{x}.permute({', '.join(map(str, order))})",
                f"{x}.transpose({a}, {b})",
                f"{x}.transpose(-1, -2)",
                f"{x}.movedim({a}, {b})",
            )
        )
    )


@move(1, "view")
def unit_dims(w: Writer) -> None:
    """Add, drop or expand a dim of one entry."""
    x = w.pick(1, 5)
    dim = w.rng.randrange(x.ndim + 1)
    units = [d for d, n in enumerate(x.shape) if n == 1]
    if units and w.chance(0.6):
        w.put(f"{x}.squeeze({w.rng.choice(units)})")
    elif w.chance(0.5):
        w.put(f"{x}.unsqueeze({dim})")
    else:
        w.put(f"{x}.unsqueeze({dim}).expand({', '.join(map(str, (*x.shape[:dim], w.size(), *x.shape[dim:])))})")


@move(2, "view")
def parts(w: Writer) -> None:
    """Divide a dim into pieces, and use some or all of them."""
    x = w.pick(1, 6, lambda v: max(v.shape) > 1)
    dim = x.ndim - 1 if w.chance(0.7) and x.shape[-1] > 1 else w.rng.choice([d for d, n in enumerate(x.shape) if n > 1])
    n = x.shape[dim]
    first = w.rng.randint(1, n - 1)
    match w.rng.randrange(5):
        case 0:
            w.put_all(f"{x}.split([{first}, {n - first}], {dim})", 2)
        case 1:
            count = -(-n // -(-n // 2))
            w.put_all(f"{x}.chunk(2, {dim})", count)
        case 2:
            w.put(f"{x}.narrow({dim}, {w.rng.randint(0, n - first)}, {first})")
        case 3:
            w.put_all(f"{x}.unbind({dim})", n)
        case _:
            w.put(f"{x}.select({dim}, {w.rng.randrange(n)})")


@move(1.5, "view")
def sliced(w: Writer) -> None:
    """Take a part of the last dim, or every second entry."""
    x = w.pick()
    where = "..., " if x.ndim > 1 else ""
    n = x.shape[-1]
    start, step = w.rng.randrange(n), w.rng.choice((2, 2, 3))
    code = w.rng.choice((f"{start}:", f":{-start or None}", f"{start}::{step}", f"::{step}", f"{start}:{n - 1}:{step}"))
    w.put(f"{x}[{where}{code}]")


@move(2, "view")
def together(w: Writer) -> None:
    """Concatenate or stack values."""
    x = w.pick(1, 5)
    dim = x.ndim - 1 if w.chance(0.7) else w.rng.randrange(x.ndim)
    if w.chance(0.4):
        w.put(f"torch.stack([{x}, {alike(w, x)}], {w.rng.randrange(x.ndim + 1)})")
        return

    def fits(v: Value) -> bool:
        return v.ndim == x.ndim and all(
            a == b for d, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)) if d != dim
        )

    y = w.pick(x.ndim, x.ndim, fits)
    others = [str(y), str(x)] if w.chance(0.5) else [str(x), str(y), str(x)][: w.rng.randint(2, 3)]
    w.put(f"torch.cat([{', '.join(others)}], {dim})")


@move(1, "view")
def repeated(w: Writer) -> None:
    """Repeat a value along its dims."""
    x = w.pick(1, 4)
    times = [w.rng.choice((1, 1, 2, 3)) for _ in x.shape]
    dim = w.rng.randrange(x.ndim)
    w.put(
        w.rng.choice(
            (
                f"{x}.repeat({', '.join(map(str, times))})",
                f"{x}.repeat_interleave({w.rng.choice((2, 3))}, {dim})",
            )
        )
    )


@move(0.7, "view")
def moved(w: Writer) -> None:
    """Move entries along a dim."""
    x = w.pick()
    dim = w.rng.randrange(x.ndim)
    order = list(range(x.shape[dim]))
    w.rng.shuffle(order)
    w.put(
        w.rng.choice(
            (
                f"{x}.roll(1, {dim})",
                f"{x}.flip({dim})",
                f"{x}.index_select({dim}, torch.tensor({order}))",
                f"{x}.index_select({dim}, torch.tensor({order[:1] * 2}))",
                f"F.pad({x}, (1, {w.rng.choice((0, 2, -1))}))",
                f"{x}.cumsum({dim})",
            )
        )
    )
