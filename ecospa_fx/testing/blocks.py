"""Block moves: the parts of networks, in the many spellings that people use.

`b` batch, `s` sequence, `d` model width, `f` hidden width, `c` channels.
"""

from __future__ import annotations

from .moves import activate, move, project
from .programs import Dead, Value, Writer


def tokens(w: Writer) -> Value:
    """Draw a value `[B, S, D]`."""
    return w.pick(3, 3)


@move(3, "mlp")
def mlp(w: Writer) -> None:
    """Write two weights with a nonlinearity between them."""
    x = w.pick(2)
    d, f = x.shape[-1], w.size()
    hidden = activate(w, project(w, x, f))
    if w.chance(0.2):
        hidden = w.put(f"{hidden} * {w.parameter(f)}")
    out = project(w, hidden, d)
    if w.chance(0.5):
        w.put(f"{x} + {out}")


@move(3, "glu")
def glu(w: Writer) -> None:
    """Write a product of two branches, from two weights or a fused one."""
    x = w.pick(2)
    d, f = x.shape[-1], w.size()
    if w.chance(0.5):
        gate, up = project(w, x, f), project(w, x, f)
    else:
        both = project(w, x, 2 * f)
        match w.rng.randrange(4):
            case 0:
                gate, up = w.put_all(f"{both}.chunk(2, dim=-1)", 2)
            case 1:
                gate, up = w.put(f"{both}[..., :{f}]"), w.put(f"{both}[..., {f}:]")
            case 2:
                gate, up = w.put(f"{both}[..., ::2]"), w.put(f"{both}[..., 1::2]")
            case _:
                gate, up = w.put_all(f"{both}.unflatten(-1, (2, {f})).unbind(-2)", 2)
    if w.chance(0.3):
        gate, up = up, gate
    hidden = w.put(f"{activate(w, gate)} * {up}")
    project(w, hidden, d)


@move(1, "glu")
def torch_glu(w: Writer) -> None:
    """Write a gated unit with `F.glu`."""
    x = w.pick(2)
    f = w.size()
    hidden = w.put(f"F.glu({project(w, x, 2 * f)}, dim=-1)")
    project(w, hidden, w.size())


@move(2, "residual")
def residual(w: Writer) -> None:
    """Write a norm, a branch and a residual connection, perhaps with a layer scale."""
    x = w.pick(2)
    d, f = x.shape[-1], w.size()
    if d == 1:
        raise Dead("a norm of one entry")
    norm = w.hold(w.rng.choice((f"nn.LayerNorm({d})", f"nn.RMSNorm({d}, eps=1e-3)")))
    if w.chance(0.5):
        out = project(w, activate(w, project(w, w.put(f"{norm}({x})"), f)), d)
        scaled = f"{w.parameter(d)} * {out}" if w.chance(0.3) else str(out)
        w.put(f"{x} + {scaled}")
    else:
        w.put(f"{norm}({x} + {project(w, activate(w, project(w, x, f)), d)})")


@move(2, "experts")
def experts(w: Writer) -> None:
    """Write a mixture of experts: weights of three dims, dense or selected, or a list of layers."""
    x = tokens(w)
    b, s, d = x.shape
    count, f = w.rng.choice((2, 3, 4)), w.size()
    gate = w.put(f"{w.hold(f'nn.Linear({d}, {count}, bias=False)')}({x}).softmax(-1)")
    if w.chance(0.4):
        top, _ = w.put_all(f"{gate}.topk({max(1, count - 1)}, dim=-1)", 2)
        gate = w.put(f"{gate} * ({gate} >= {top}[..., -1:])")
    match w.rng.randrange(4):
        case 0:
            up, down = w.parameter(count, d, f), w.parameter(count, f, d)
            hidden = activate(w, w.put(f"torch.einsum('bsd,edf->bsef', {x}, {up})"))
            w.put(f"torch.einsum('bsef,efd,bse->bsd', {hidden}, {down}, {gate})")
        case 1:
            up, down = w.parameter(count, d, 2 * f), w.parameter(count, f, d)
            rows = w.put(f"{x}.reshape(1, {b * s}, {d}).expand({count}, {b * s}, {d})")
            left, right = w.put_all(f"torch.bmm({rows}, {up}).chunk(2, dim=-1)", 2)
            out = w.put(f"torch.bmm({activate(w, left)} * {right}, {down})")
            w.put(f"({out}.view({count}, {b}, {s}, {d}) * {gate}.permute(2, 0, 1)[..., None]).sum(0)")
        case 2:
            total = None
            for i in range(count):
                out = project(w, activate(w, project(w, x, f)), d)
                share = f"{gate}[..., {i}:{i + 1}] * {out}"
                total = w.put(share if total is None else f"{total} + {share}")
        case _:
            up, down = w.parameter(count, f, d), w.parameter(count, d, f)
            rows, chosen = w.put(f"{x}.reshape(-1, {d})"), w.put(f"{gate}.reshape(-1, {count}).argmax(-1)")
            hidden = activate(w, w.put(f"torch.bmm({up}[{chosen}], {rows}.unsqueeze(-1)).squeeze(-1)"))
            w.put(f"torch.bmm({down}[{chosen}], {hidden}.unsqueeze(-1)).squeeze(-1).view({b}, {s}, {d})")


@move(1, "experts")
def routed(w: Writer) -> None:
    """Write experts that a router chooses: gates, a top-k, and one of the ways to bring tokens and experts together."""
    x = tokens(w)
    b, s, d = x.shape
    count, k, f = w.rng.choice((4, 5, 6)), w.rng.choice((1, 2)), w.size()
    rows = w.put(f"{x}.reshape({b * s}, {d})")
    logits = w.put(f"{w.hold(f'nn.Linear({d}, {count})')}({rows})")
    gates = w.put(w.rng.choice((f"{logits}.softmax(-1)", f"torch.sigmoid({logits})")))
    shares, chosen = _chosen(w, logits, gates, count, k)
    up, down = w.parameter(count, d, f), w.parameter(count, f, d)
    if w.chance(0.3):
        out = _by_expert(w, rows, gates, shares, chosen, up, down)
    elif w.chance(0.5):
        match w.rng.randrange(4):
            case 0:
                own, back = (w.put(f"{each}[{chosen}]") for each in (up, down))
            case 1:
                own = w.put(f"{up}.index_select(0, {chosen}.flatten()).view({b * s}, {k}, {d}, {f})")
                back = w.put(f"{down}.index_select(0, {chosen}.flatten()).view({b * s}, {k}, {f}, {d})")
            case 2:
                own = w.put(f"F.embedding({chosen}, {up}.flatten(1)).view({b * s}, {k}, {d}, {f})")
                back = w.put(f"F.embedding({chosen}, {down}.flatten(1)).view({b * s}, {k}, {f}, {d})")
            case _:
                wide = [f"{chosen}[..., None, None].expand(-1, -1, {d}, {f})", f"{up}.expand({b * s}, -1, -1, -1)"]
                own = w.put(f"torch.gather({wide[1]}, 1, {wide[0]})")
                back = w.put(f"{down}[{chosen}]")
        hidden = activate(w, w.put(f"torch.einsum('td,tkdf->tkf', {rows}, {own})"))
        out = w.put(f"torch.einsum('tkf,tkfd,tk->td', {hidden}, {back}, {shares})")
    else:
        match w.rng.randrange(4):
            case 0:
                weights = w.put(f"torch.zeros_like({gates}).scatter(1, {chosen}, {shares})")
            case 1:
                weights = w.put(f"(F.one_hot({chosen}, {count}) * {shares}[..., None]).sum(1)")
            case 2:
                weights = w.put(f"(({chosen}[..., None] == torch.arange({count})) * {shares}[..., None]).sum(1)")
            case _:
                least = w.put(f"{gates}.topk({k})[0][:, -1:]")
                weights = w.put(f"{gates} * ({gates} >= {least})")
        hidden = activate(w, w.put(f"torch.einsum('td,edf->tef', {rows}, {up})"))
        out = w.put(f"torch.einsum('tef,efd,te->td', {hidden}, {down}, {weights})")
    w.put(f"{out}.view({b}, {s}, {d})")


def _by_expert(w: Writer, rows: Value, gates: Value, shares: Value, chosen: Value, up: str, down: str) -> Value:
    """Lay rows out expert by expert, or let experts choose their rows; add up where these came from."""
    (n, d), k = rows.shape, chosen.shape[1]
    way = w.rng.randrange(4)
    if way == 3:
        best, taken = w.put_all(f"{gates}.t().topk({min(n, 2)}, dim=-1)", 2)
        hidden = activate(w, w.put(f"torch.bmm({rows}[{taken}], {up})"))
        each = w.put(f"torch.bmm({hidden}, {down}) * {best}[..., None]")
        return w.put(f"torch.zeros_like({rows}).index_add(0, {taken}.flatten(), {each}.flatten(0, 1))")
    flat = w.put(f"{chosen}.flatten()")
    order = w.put(f"{flat}.argsort(stable=True)")
    mine, source = w.put(f"{flat}[{order}]"), w.put(f"{order} // {k}")
    hidden = activate(w, w.put(f"torch.einsum('td,tdf->tf', {rows}[{source}], {up}[{mine}])"))
    each = w.put(f"torch.einsum('tf,tfd,t->td', {hidden}, {down}[{mine}], {shares}.flatten()[{order}])")
    match way:
        case 0:
            return w.put(f"torch.zeros_like({rows}).index_add(0, {source}, {each})")
        case 1:
            return w.put(f"torch.zeros_like({rows}).scatter_add(0, {source}[:, None].expand(-1, {d}), {each})")
        case _:
            back = w.put(f"torch.empty_like({order}).scatter(0, {order}, torch.arange({n * k}))")
            return w.put(f"{each}[{back}].view({n}, {k}, {d}).sum(1)")


def _chosen(w: Writer, logits: Value, gates: Value, count: int, k: int) -> tuple[Value, Value]:
    """Choose `k` of the experts of each token; return their shares and their places."""
    match w.rng.randrange(5):
        case 0:
            best, chosen = w.put_all(f"{gates}.topk({k}, dim=-1)", 2)
            return best, chosen
        case 1:
            best, chosen = w.put_all(f"{logits}.topk({k}, dim=-1)", 2)
            return w.put(f"{best}.softmax(-1)"), chosen
        case 2 if k == 1:
            chosen = w.put(f"{gates}.argmax(-1, keepdim=True)")
        case 3 if count % 2 == 0:
            sums = w.put(f"{gates}.view(-1, 2, {count // 2}).topk({k}, dim=-1)[0].sum(-1)")
            mark = w.put(f"torch.zeros_like({sums}).scatter(1, {sums}.argmax(-1, keepdim=True), 1.0)")
            mask = w.put(f"{mark}[..., None].expand(-1, 2, {count // 2}).reshape(-1, {count})")
            chosen = w.put(f"{gates}.masked_fill({mask} == 0, -1.0).topk({k}, dim=-1)[1]")
        case _:
            chosen = w.put(f"({gates} + {w.parameter(count)}).topk({k}, dim=-1)[1]")
    shares = w.put(f"{gates}.gather(1, {chosen})")
    return (w.put(f"{shares} / {shares}.sum(-1, keepdim=True)") if w.chance(0.5) else shares), chosen


@move(1, "conv")
def squeeze_excite(w: Writer) -> None:
    """Write a gate per channel, from averages over positions."""
    x = w.pick(3, 5)
    dims = list(range(2, x.ndim))
    c, f = x.shape[1], w.size()
    pooled = w.put(f"{x}.mean({dims})")
    gate = w.put(f"torch.sigmoid({project(w, activate(w, project(w, pooled, f)), c)})")
    w.put(f"{x} * {gate}[{', '.join([':', ':', *('None' for _ in dims)])}]")


@move(1.5, "conv")
def conv_block(w: Writer) -> None:
    """Write convolutions with a norm between them, depthwise, or as linear layers over channels."""
    x = w.pick(3, 4)
    kind, c, f = x.ndim - 2, x.shape[1], w.size()
    first = w.put(f"{w.hold(f'nn.Conv{kind}d({c}, {f}, 1)')}({x})")
    match w.rng.randrange(4):
        case 0:
            first = w.put(f"{w.hold(f'nn.BatchNorm{kind}d({f})')}({first})")
        case 1:
            first = w.put(f"{w.hold(f'nn.Conv{kind}d({f}, {f}, 3, padding=1, groups={f})')}({first})")
        case 2:
            order = (0, *range(2, x.ndim), 1)
            last = w.put(f"{first}.permute({', '.join(map(str, order))})")
            back = (0, x.ndim - 1, *range(1, x.ndim - 1))
            first = w.put(f"{activate(w, project(w, last, f))}.permute({', '.join(map(str, back))})")
        case _:
            pass
    out = w.put(f"{w.hold(f'nn.Conv{kind}d({f}, {c}, 3, padding=1)')}({activate(w, first)})")
    if w.chance(0.5):
        w.put(f"{x} + {out}")


@move(1, "view")
def windows(w: Writer) -> None:
    """Write a layer on windows of positions, perhaps shifted, and merge the windows."""
    x = w.pick(3, 3, lambda v: v.shape[1] % 2 == 0)
    b, s, d = x.shape
    shifted = w.put(f"{x}.roll(1, 1)") if w.chance(0.5) else x
    inside = w.put(f"{shifted}.view({b}, 2, {s // 2}, {d}).reshape({b * 2}, {s // 2}, {d})")
    out = project(w, activate(w, project(w, inside, w.size())), d)
    w.put(f"{out}.view({b}, 2, {s // 2}, {d}).reshape({b}, {s}, {d}) + {x}")


@move(0.7, "view")
def patches(w: Writer) -> None:
    """Merge neighbours of a grid into one row (patch merging)."""
    x = w.pick(4, 4, lambda v: v.shape[2] % 2 == 0 and v.shape[3] % 2 == 0)
    b, c, rows, columns = x.shape
    code = f"{x}.reshape({b}, {c}, {rows // 2}, 2, {columns // 2}, 2).permute(0, 2, 4, 3, 5, 1).flatten(3)"
    if w.chance(0.5):
        code = f"torch.cat([{x}[..., ::2, ::2], {x}[..., 1::2, ::2], {x}[..., ::2, 1::2]], 1).permute(0, 2, 3, 1)"
    project(w, w.put(code), w.size())


@move(0.7, "view")
def class_token(w: Writer) -> None:
    """Prepend a learnt token, and perhaps add learnt positions."""
    x = tokens(w)
    b, s, d = x.shape
    longer = w.put(f"torch.cat([{w.parameter(1, 1, d)}.expand({b}, -1, -1), {x}], dim=1)")
    if w.chance(0.5):
        longer = w.put(f"{longer} + {w.parameter(1, s + 1, d)}")
    if w.chance(0.5):
        w.put(f"{longer}[:, 0]")


@move(0.7, "scan")
def state_space(w: Writer) -> None:
    """Write a scan over positions with a state per channel, step by step."""
    x = tokens(w)
    _, s, d = x.shape
    if s > 5:
        raise Dead("too long")
    decay = w.put(f"torch.sigmoid({w.parameter(d)})")
    state, states = None, []
    for i in range(s):
        here = f"{x}[:, {i}]"
        state = w.put(here if state is None else f"{decay} * {state} + {here}")
        states.append(str(state))
    w.put(f"torch.stack([{', '.join(states)}], dim=1)")


@move(1, "recurrent")
def recurrent(w: Writer) -> None:
    """Write a recurrent layer of torch, stacked or in both directions, or steps of a cell."""
    x = tokens(w)
    n = w.size() + 1
    kind = w.rng.choice(("LSTM", "GRU", "RNN"))
    if w.chance(0.3):
        cell, state = w.hold(f"nn.{kind}Cell({x.shape[-1]}, {n})"), "None"
        for step in range(min(3, x.shape[1])):
            made = f"{cell}({x}[:, {step}], {state})"
            state = f"({', '.join(map(str, w.put_all(made, 2)))})" if kind == "LSTM" else str(w.put(made))
        return
    how = f"batch_first=True, num_layers={w.rng.choice((1, 1, 2))}, bidirectional={w.chance(0.3)}"
    w.put(f"{w.hold(f'nn.{kind}({x.shape[-1]}, {n}, {how})')}({x})[0]")


@move(1, "angle")
def compared(w: Writer) -> None:
    """Write angles or distances to learnt vectors."""
    x = tokens(w)
    d = x.shape[-1]
    if d == 1:
        raise Dead("an angle between numbers")
    vectors = w.parameter(w.size(), d)
    w.put(
        w.rng.choice(
            (
                f"F.cosine_similarity({x}.unsqueeze(-2), {vectors}, dim=-1, eps=1e-2)",
                f"F.normalize({x}, dim=-1, eps=1e-2) @ F.normalize({vectors}, dim=-1, eps=1e-2).t()",
                f"F.linear({x}, {vectors}.softmax(-1))",
                f"F.linear({x}, {vectors} - {vectors}.mean(1, keepdim=True))",
            )
        )
    )


@move(0.5, "attention")
def torch_attention(w: Writer) -> None:
    """Write a call of `nn.MultiheadAttention`."""
    x = tokens(w)
    d = x.shape[-1]
    heads = w.rng.choice([h for h in range(1, d + 1) if d % h == 0])
    layer = w.hold(f"nn.MultiheadAttention({d}, {heads}, batch_first=True)")
    w.put(f"{layer}({x}, {x}, {x}, need_weights=False)[0]")


@move(0.7, "mlp")
def low_rank(w: Writer) -> None:
    """Write a layer with a low-rank adapter."""
    x = w.pick(2)
    n, rank = w.size(), w.rng.choice((1, 2, 3))
    layer = w.hold(f"nn.Linear({x.shape[-1]}, {n})")
    down, up = w.parameter(rank, x.shape[-1]), w.parameter(n, rank)
    w.put(f"{layer}({x}) + F.linear(F.linear({x}, {down}), {up}) * 0.5")
