"""Mixing moves, in which entries of one value are combined: sums, statistics, products, convolutions."""

from __future__ import annotations

from .moves import move
from .programs import Dead, Writer


def divisors(n: int) -> list[int]:
    """Return the numbers of equal groups that `n` entries fall into."""
    return [g for g in range(1, n + 1) if n % g == 0]


@move(1.2, "reduction")
def reduced(w: Writer) -> None:
    """Sum over a dim, average it, or reduce it nonlinearly."""
    x = w.pick(2)
    dim, keep = w.rng.randrange(x.ndim), w.chance(0.5)
    how = w.rng.choice(("sum", "sum", "mean", "mean", "amax", "var", "logsumexp", "norm", "prod", "median", "max"))
    if how == "var" and x.shape[dim] == 1:
        raise Dead("no variance of one")
    if how == "norm":
        order = w.rng.choice(("1", "2", "3", "torch.inf"))
        w.put(f"torch.linalg.vector_norm({x} + 3, {order}, {dim}, {keep})")
    else:
        w.put(f"{x}.{how}({dim}, keepdim={keep}){'.values' if how in ('median', 'max') else ''}")


@move(2, "norm")
def normed(w: Writer) -> None:
    """Normalise by statistics over a dim."""
    x = w.pick()
    n, dim = x.shape[-1], w.rng.randrange(x.ndim)
    if n == 1:
        raise Dead("a norm of one entry")
    w.put(
        w.rng.choice(
            (
                lambda: f"{w.hold(f'nn.LayerNorm({n})')}({x})",
                lambda: f"{w.hold(f'nn.RMSNorm({n}, eps=1e-3)')}({x})",
                lambda: f"{x}.softmax({dim})",
                lambda: f"{x}.log_softmax({dim})",
                lambda: (
                    f"{w.hold(f'nn.GroupNorm({w.rng.choice(divisors(n))}, {n}, eps=1e-2)')}({x}.flatten(0, -2))"
                    f".view({', '.join(map(str, x.shape))})"
                ),
                lambda: f"F.normalize({x}, dim={dim}, eps=1e-2)",
                lambda: f"{x} * ({x}.pow(2).mean({dim}, keepdim=True) + 1e-2).rsqrt() * {w.parameter(n)}",
                lambda: f"({x} - {x}.mean(-1, keepdim=True)) / ({x}.var(-1, keepdim=True) + 1e-2).sqrt()",
            )
        )()
    )


@move(1, "norm")
def channel_norm(w: Writer) -> None:
    """Normalise by statistics over positions, per channel or group of channels."""
    x = w.pick(3, 5)
    c = x.shape[1]
    kind = {3: "1d", 4: "2d", 5: "3d"}[x.ndim]
    groups = w.rng.choice(divisors(c))
    w.put(
        w.rng.choice(
            (
                lambda: f"{w.hold(f'nn.BatchNorm{kind}({c})')}({x})",
                lambda: f"{w.hold(f'nn.GroupNorm({groups}, {c}, eps=1e-2)')}({x})",
                lambda: f"{w.hold(f'nn.InstanceNorm{kind}({c}, eps=1e-2, affine=True)')}({x})",
            )
        )()
    )


@move(1.5, "contraction")
def product_of_activations(w: Writer) -> None:
    """Multiply two activations and sum over a dim, in one of several spellings."""
    x = w.pick(3, 4)
    if w.chance(0.5):
        y = w.pick(x.ndim, x.ndim, lambda v: v.shape[:-2] == x.shape[:-2] and v.shape[-1] == x.shape[-1])
        lead = "abf"[: x.ndim - 2]
        w.put(w.rng.choice((f"{x} @ {y}.transpose(-1, -2)", f"torch.einsum('{lead}sd,{lead}td->{lead}st', {x}, {y})")))
    else:
        y = w.pick(x.ndim, x.ndim, lambda v: v.shape[:-2] == x.shape[:-2] and v.shape[-2] == x.shape[-1])
        w.put(f"torch.matmul({x}, {y})")


@move(1.5, "conv")
def convolved(w: Writer) -> None:
    """Apply a convolution of any kind."""
    x = w.pick(3, 5)
    kind, c = x.ndim - 2, x.shape[1]
    k = w.rng.choice((1, 1, 2, 3))
    groups = w.rng.choice(divisors(c))
    match w.rng.randrange(5):
        case 0:
            layer = f"nn.Conv{kind}d({c}, {c * w.rng.choice((1, 1, 2))}, {k}, padding={k // 2}, groups={c})"
        case 1:
            layer = f"nn.Conv{kind}d({c}, {groups * w.size()}, {k}, padding={k // 2}, groups={groups})"
        case 2:
            layer = f"nn.ConvTranspose{kind}d({c}, {w.size()}, {k}, stride={w.rng.choice((1, 2))})"
        case _:
            layer = f"nn.Conv{kind}d({c}, {w.size()}, {k}, padding={k // 2})"
    w.put(f"{w.hold(layer)}({x})")


@move(0.8, "conv")
def resampled(w: Writer) -> None:
    """Pool or resize positions, or move them into channels."""
    x = w.pick(3, 4)
    kind = x.ndim - 2
    w.put(
        w.rng.choice(
            (
                f"F.avg_pool{kind}d({x}, 2)",
                f"F.max_pool{kind}d({x}, 2)",
                f"F.adaptive_avg_pool{kind}d({x}, 1)",
                f"F.interpolate({x}, scale_factor=2, mode='nearest')",
                f"F.pixel_shuffle({x}, 2)" if kind == 2 else f"F.avg_pool1d({x}, 1)",
                f"F.pixel_unshuffle({x}, 2)" if kind == 2 else f"{x}.flatten(1)",
            )
        )
    )
