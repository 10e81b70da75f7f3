"""Attention moves, in the many spellings that people use.

`B` batch, `S` query positions, `T` key positions, `D` model width, `H` heads, `K` key heads, `E` entries per head of
queries and keys, `V` of values.
"""

from __future__ import annotations

import math

from .blocks import tokens
from .moves import move, project
from .programs import Dead, Value, Writer


@move(6, "attention")
def attention(w: Writer) -> None:
    """Write an attention: projections, heads, perhaps rotation, scores, mixing, and the output projection."""
    x = tokens(w)
    d = x.shape[-1]
    heads, entries = w.rng.choice((1, 2, 3, 4)), w.rng.choice((2, 3, 4, 6))
    keys = w.rng.choice([k for k in range(1, heads + 1) if heads % k == 0]) if w.chance(0.4) else heads
    values = entries if w.chance(0.7) else w.rng.choice((2, 3, 5))
    q, k, v = _project_heads(w, x, heads, keys, entries, values)
    if w.chance(0.2):
        norm = w.hold(f"nn.RMSNorm({entries}, eps=1e-3)")
        q, k = w.put(f"{norm}({q})"), w.put(f"{norm if w.chance(0.5) else w.hold(f'nn.LayerNorm({entries})')}({k})")
    if entries % 2 == 0 and w.chance(0.4):
        q, k = _rotate(w, q, k)
    mixed = _mix(w, q, k, v)
    if w.chance(0.15):
        mixed = w.put(f"{mixed} * {w.parameter(heads, 1, 1)}")
    _project_back(w, x, mixed, d)


def _project_heads(w: Writer, x: Value, heads: int, keys: int, e: int, ve: int) -> tuple[Value, Value, Value]:
    """Write projections to queries `[B, H, S, E]`, keys `[B, K, T, E]` and values `[B, K, T, V]`."""
    b, s, d = x.shape
    bias = w.chance(0.5)

    def layer(width: int, n: int = d) -> str:
        return w.hold(f"nn.Linear({n}, {width}{'' if bias else ', bias=False'})")

    def split(y: Value, count: int, entries: int, length: int = s) -> Value:
        code = w.rng.choice(
            (
                f"{y}.view({b}, {length}, {count}, {entries}).transpose(1, 2)",
                f"{y}.unflatten(-1, ({count}, {entries})).permute(0, 2, 1, 3)",
                f"{y}.reshape({b}, {length}, -1, {entries}).transpose(1, 2)",
                f"{y}.view({b}, -1, {count}, {entries}).movedim(2, 1)",
            )
        )
        return w.put(code)

    fused = keys == heads and e == ve
    way = w.rng.randrange(7)
    if way == 0 and fused:
        y = w.put(f"{layer(3 * heads * e)}({x})")
        q, k, v = w.put_all(f"{y}.chunk(3, dim=-1)", 3)
        return split(q, heads, e), split(k, heads, e), split(v, heads, e)
    if way == 1 and fused:
        y = w.put(f"{layer(3 * heads * e)}({x}).view({b}, {s}, {heads}, {3 * e}).transpose(1, 2)")
        q, k, v = w.put_all(f"{y}.chunk(3, dim=-1)", 3)
        return q, k, v
    if way == 2 and fused:
        y = w.put(f"{layer(3 * heads * e)}({x}).reshape({b}, {s}, 3, {heads}, {e}).permute(2, 0, 3, 1, 4)")
        if w.chance(0.5):
            q, k, v = w.put_all(f"{y}.unbind(0)", 3)
            return q, k, v
        return w.put(f"{y}[0]"), w.put(f"{y}[1]"), w.put(f"{y}[2]")
    if way == 3 and fused:
        # The dim of three lies in the middle, or last, which is rare.
        shape, order = w.rng.choice(((f"{heads}, 3, {e}", "3, 0, 2, 1, 4"), (f"{heads}, {e}, 3", "4, 0, 2, 1, 3")))
        y = w.put(f"{layer(3 * heads * e)}({x}).reshape({b}, {s}, {shape}).permute({order})")
        q, k, v = w.put_all(f"{y}.unbind(0)", 3)
        return q, k, v
    if way == 4:
        sizes = [heads * e, keys * e, keys * ve]
        y = w.put(f"{layer(sum(sizes))}({x})")
        q, k, v = w.put_all(f"{y}.split({sizes}, dim=-1)", 3)
        return split(q, heads, e), split(k, keys, e), split(v, keys, ve)
    if way == 5 and fused:
        q = w.put(f"{layer(heads * e)}({x})")
        k, v = w.put_all(f"{layer(2 * heads * e)}({x}).reshape({b}, {s}, 2, {heads}, {e}).unbind(2)", 2)
        return split(q, heads, e), w.put(f"{k}.transpose(1, 2)"), w.put(f"{v}.transpose(1, 2)")
    if way == 6 and e == ve and w.chance(0.5):
        # One tensor with the queries of each group, then its key and its value, divided by slices and lists.
        group = heads // keys
        y = w.put(f"{layer((heads + 2 * keys) * e)}({x}).view({b}, {s}, {keys}, {group + 2}, {e})")
        spans = (f":{group}", w.rng.choice(("[-2]", f"{group}:-1")), w.rng.choice(("[-1]", f"[{group + 1}]", "-1:")))
        q, k, v = (w.put(f"{y}[:, :, :, {span}].flatten(2, 3).transpose(1, 2)") for span in spans)
        return q, k, v
    memory = w.pick(3, 3, lambda y: y.shape[0] == b) if w.chance(0.25) else x
    q = project(w, x, heads * e)
    k, v = w.put(f"{layer(keys * e, memory.shape[-1])}({memory})"), project(w, memory, keys * ve)
    length = memory.shape[1]
    return split(q, heads, e), split(k, keys, e, length), split(v, keys, ve, length)


def _rotate(w: Writer, q: Value, k: Value) -> tuple[Value, Value]:
    """Apply rotary positions: pairs of halves, pairs of neighbours, or a part of the entries only."""
    way = w.rng.randrange(4)

    def rotate(x: Value) -> Value:
        s, e = x.shape[-2:]
        angle = f"torch.arange({s}, dtype={x}.dtype)[:, None] / 3.0 ** torch.arange({e // 2}, dtype={x}.dtype)"
        if way == 0:
            a = w.put(f"({angle}).repeat(1, 2)")
            half = f"torch.cat([-{x}[..., {e // 2}:], {x}[..., :{e // 2}]], dim=-1)"
            return w.put(f"{x} * {a}.cos() + {half} * {a}.sin()")
        if way == 1:
            a = w.put(angle)
            first, second = w.put(f"{x}[..., ::2]"), w.put(f"{x}[..., 1::2]")
            pair = f"{first} * {a}.cos() - {second} * {a}.sin(), {first} * {a}.sin() + {second} * {a}.cos()"
            return w.put(f"torch.stack([{pair}], dim=-1).flatten(-2)")
        if way == 2:
            a = w.put(angle)
            first, second = w.put_all(f"{x}.chunk(2, dim=-1)", 2)
            pair = f"{first} * {a}.cos() - {second} * {a}.sin(), {second} * {a}.cos() + {first} * {a}.sin()"
            return w.put(f"torch.cat([{pair}], dim=-1)")
        if e % 4:
            raise Dead("the half cannot be halved")
        a = w.put(f"({angle})[:, : {e // 4}].repeat(1, 2)")
        part, rest = w.put_all(f"{x}.split([{e // 2}, {e // 2}], dim=-1)", 2)
        half = f"torch.cat([-{part}[..., {e // 4}:], {part}[..., :{e // 4}]], dim=-1)"
        rotated = w.put(f"{part} * {a}.cos() + {half} * {a}.sin()")
        return w.put(f"torch.cat([{rotated}, {rest}], dim=-1)")

    return rotate(q), rotate(k)


def _mix(w: Writer, q: Value, k: Value, v: Value) -> Value:
    """Write one of the forms of attention, with the result `[B, H, S, V]`."""
    b, h, s, e = q.shape
    keys, t = k.shape[1:3]
    if keys != h:
        if w.chance(0.35):
            return w.put(f"F.scaled_dot_product_attention({q}, {k}, {v}, enable_gqa=True)")
        if w.chance(0.2):
            grouped = w.put(f"{q}.view({b}, {keys}, {h // keys}, {s}, {e})")
            score = w.put(f"torch.einsum('bkgse,bkte->bkgst', {grouped}, {k}).softmax(-1)")
            return w.put(f"torch.einsum('bkgst,bktv->bkgsv', {score}, {v}).flatten(1, 2)")
        k, v = (_repeat_heads(w, y, h // keys) for y in (k, v))
    scale = w.rng.choice((f"{e}**-0.5", f"{q}.shape[-1] ** -0.5", f"{1 / math.sqrt(e):.6f}"))
    match w.rng.randrange(8):
        case 0 | 1:
            more = w.rng.choice(
                ("", ", is_causal=True", f", attn_mask=torch.ones({s}, {t}, dtype=torch.bool).tril()", ", scale=0.3")
            )
            return w.put(f"F.scaled_dot_product_attention({q}, {k}, {v}{more})")
        case 2:
            score = w.put(f"{q} @ {k}.transpose(-2, -1) * {scale}")
            score = _add_bias(w, score)
            return w.put(f"{score}.softmax(-1) @ {v}")
        case 3:
            score = w.put(f"torch.einsum('bhse,bhte->bhst', {q}, {k}) * {scale}")
            score = _add_bias(w, score)
            return w.put(f"torch.einsum('bhst,bhtv->bhsv', torch.softmax({score}, dim=-1), {v})")
        case 4:
            flat_q, flat_k, flat_v = (w.put(f"{y}.reshape({b * h}, {y.shape[2]}, {y.shape[3]})") for y in (q, k, v))
            score = w.put(f"torch.baddbmm(torch.zeros(1, {s}, {t}, dtype={q}.dtype), {flat_q}, "
                          f"{flat_k}.transpose(1, 2), alpha={e**-0.5:.6f}).softmax(-1)")  # fmt: skip
            return w.put(f"torch.bmm({score}, {flat_v}).view({b}, {h}, {s}, {v.shape[-1]})")
        case 5:
            # Linear attention: keys and values are multiplied first.
            feature = w.rng.choice(("F.elu({}) + 1", "F.relu({})", "{}.softmax(-1)", "torch.exp(-{}.square())"))
            fq, fk = w.put(feature.replace("{}", str(q))), w.put(feature.replace("{}", str(k)))
            state = w.put(f"{fk}.transpose(-1, -2) @ {v}")
            return w.put(f"({fq} @ {state}) / ({fq} @ {fk}.sum(2, keepdim=True).transpose(-1, -2) + 1)")
        case 6:
            # Scores of all heads are mixed by a weight (talking heads).
            score = w.put(f"({q} @ {k}.transpose(-2, -1) * {scale}).permute(0, 2, 3, 1)")
            score = w.put(f"{w.hold(f'nn.Linear({h}, {h}, bias=False)')}({score}).permute(0, 3, 1, 2)")
            return w.put(f"{score}.softmax(-1) @ {v}")
        case _:
            # Attention over entries, not positions (cross-covariance).
            if s != t:
                raise Dead("different numbers of queries and keys")
            score = w.put(f"F.normalize({q}, dim=2, eps=1e-2).transpose(-2, -1) @ F.normalize({k}, dim=2, eps=1e-2)")
            return w.put(f"({score}.softmax(-1) @ {v}.transpose(-2, -1)).transpose(-2, -1)")


def _repeat_heads(w: Writer, x: Value, times: int) -> Value:
    b, k, t, e = x.shape
    return w.put(
        w.rng.choice(
            (
                f"{x}[:, :, None].expand({b}, {k}, {times}, {t}, {e}).reshape({b}, {k * times}, {t}, {e})",
                f"{x}.repeat_interleave({times}, dim=1)",
                f"{x}.repeat(1, {times}, 1, 1)",
                f"{x}.unsqueeze(2).repeat(1, 1, {times}, 1, 1).flatten(1, 2)",
            )
        )
    )


def _add_bias(w: Writer, score: Value) -> Value:
    """Add a bias to scores `[B, H, S, T]`: a parameter, a mask, or slopes by position."""
    _, h, s, t = score.shape
    match w.rng.randrange(4):
        case 0:
            return w.put(f"{score} + {w.parameter(h, s, t)}")
        case 1:
            return w.put(f"{score}.masked_fill(~torch.ones({s}, {t}, dtype=torch.bool).tril(), -1e2)")
        case 2:
            slopes = f"torch.linspace(0.1, 1, {h}, dtype={score}.dtype)[:, None, None]"
            return w.put(f"{score} - {slopes} * torch.arange({t}, dtype={score}.dtype)")
        case _:
            return score


def _project_back(w: Writer, x: Value, mixed: Value, d: int) -> None:
    """Write the output projection, from heads `[B, H, S, V]` to `[B, S, D]`."""
    b, h, s, v = mixed.shape
    match w.rng.randrange(4):
        case 0:
            w.put(f"torch.einsum('bhsv,hvd->bsd', {mixed}, {w.parameter(h, v, d)})")
            return
        case 1:
            flat = w.put(f"{mixed}.permute(0, 2, 1, 3).contiguous().view({b}, {s}, {h * v})")
        case 2:
            flat = w.put(f"{mixed}.transpose(1, 2).flatten(-2)")
        case _:
            flat = w.put(f"{mixed}.transpose(1, 2).reshape({b}, {s}, -1)")
    if w.chance(0.15):
        flat = w.put(f"{flat} * torch.sigmoid({w.hold(f'nn.Linear({d}, {h * v})')}({x}))")
    if w.chance(0.15):
        flat = w.put(f"{w.hold(f'nn.LayerNorm({h * v})')}({flat})")
    out = project(w, flat, d)
    if w.chance(0.6):
        w.put(f"{x} + {out}")
