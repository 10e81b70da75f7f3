"""Measurements of one model, in the order in which they are made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.model.region import Region
from ecospa_fx.passes.find.analyse import Analysis
from ecospa_fx.passes.find.regions import choose
from ecospa_fx.passes.rewrite.verify import Comparison
from ecospa_fx.see.verification import comparisons
from modelzoo.expected import PARTS, tally

KINDS = ("qk", "vo", "heads", "groups", "ffn", "glu", "conv", "recurrent", "residual")
COLUMNS = (
    "library", "name", "model", "stage", "captured", "dtype", "parameters", "nodes", "export_s", "analysis_s",
    "analysis_share", "couplings", *KINDS, "refusals", "parameters_inside", "attentions", "attentions_explained",
    "ffns_explained", *(f"{part}_expected" for part in PARTS), "refused_because", "missing", "verified", "inexact",
    "worst_error", "verify_s", "total_s", "error",
)  # fmt: skip
Row = dict[str, Any]
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def measure(build: Callable[[], Built], budget: float) -> Iterator[Row]:
    """Parts of a row, each as soon as it is known, so that one that runs out of time is not all lost.

    Args:
        build: makes the model and the arguments of a call.
        budget: seconds for verification; 0 for none.
    """
    model, args, kwargs = build()
    model.eval()
    stir(model)
    yield {"stage": "built", "model": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    model, args, kwargs, dtype = in_double(model, args, kwargs)
    yield {"stage": "run", "dtype": str(dtype).removeprefix("torch.")}
    found, not_captured, error = captured(model, args, kwargs)
    if error:
        yield {"error": error}
    if not found:
        yield {"captured": "no"}
        return
    yield analysed(model, found)
    if budget and any(analysis.discovery.couplings for analysis in found.values()):
        install(model, found, not_captured)
        yield verified(model, args, kwargs, budget)
    yield {"stage": "done"}


def stir(model: nn.Module) -> None:
    """Move parameters away from zeros, ones and tiny values, behind which much could go unseen.

    Matrices are scaled to keep the size of what passes through them: activations that explode drown in rounding what
    they are to be compared by.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.ndim < 2 or float(parameter.abs().max()) < 1e-3 or float(parameter.std(unbiased=False)) == 0:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim > 1:
                parameter *= (summed_over(parameter.shape) * parameter.square().mean()).rsqrt()


def summed_over(shape: torch.Size) -> int:
    """Estimate from the shape of a weight how many of its entries are summed into one output entry."""
    if shape[0] == 1 or (len(shape) == 3 and shape[2] > 11):  # a table; a stack of matrices, not a kernel
        return max(shape[1:])
    return shape[1:].numel()


def in_double(model: nn.Module, args: Any, kwargs: Any) -> tuple[nn.Module, Any, Any, torch.dtype]:
    """The model in float64, where it runs so; in float32 otherwise."""
    cast = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    states = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    wide = pytree.tree_map_only(Tensor, cast, (args, kwargs))
    try:
        model.double()
        with torch.no_grad():
            model(*wide[0], **wide[1])
        return model, *wide, torch.float64
    except Exception:
        model.float()
        with torch.no_grad():
            for name, t in (*model.named_parameters(), *model.named_buffers()):
                t.copy_(states[name])
            model(*args, **kwargs)
        return model, args, kwargs, torch.float32


def captured(model: nn.Module, args: Any, kwargs: Any) -> tuple[dict[str, Analysis], dict[str, str], str]:
    """The whole model if that can be captured, else what regions can be; and why not the whole."""
    try:
        return *choose(model, args, kwargs, "root"), ""
    except CaptureError as error:
        first = str(error)
    try:
        return *choose(model, args, kwargs, "auto"), first[:300]
    except CaptureError as error:
        return {}, {}, str(error)[:300]


def install(model: nn.Module, found: dict[str, Analysis], not_captured: dict[str, str]) -> None:
    """Compile a model from analyses that were made already."""
    compiled = CompiledModel("auto")
    compiled.not_captured = not_captured
    for name, analysis in found.items():
        compiled.regions[name] = region = Region(name, compiled.state, analysis.captured.shared_outside)
        region.install(analysis, model.get_submodule(name), {})
    model.__dict__[MODEL] = compiled
    compiled.route(model)


def verified(model: nn.Module, args: Any, kwargs: Any, budget: float) -> Row:
    """Compare shrunk with masked: all couplings together, then each alone, while time is left."""
    start = time.process_time()
    done: list[Comparison] = []
    for comparison in comparisons(model, args, kwargs):
        done.append(comparison)
        if time.process_time() - start > budget:
            break
    worst = max(done, key=lambda c: max(c.output_error, c.gradient_error))
    row = {
        "verified": len(done),
        "inexact": sum(not comparison.ok for comparison in done),
        "worst_error": f"{max(worst.output_error, worst.gradient_error):.1e}",
        "verify_s": round(time.process_time() - start, 2),
    }
    if row["inexact"]:
        row["error"] = "; ".join(f"{c.coupling}: {max(c.output_error, c.gradient_error):.0e}" for c in done if not c.ok)
    return row


def analysed(model: nn.Module, found: dict[str, Analysis]) -> Row:
    """Summarise the analyses of a model as one row."""
    couplings = [(analysis, coupling) for analysis in found.values() for coupling in analysis.discovery.couplings]
    kinds = Counter(coupling.kind for _, coupling in couplings)
    named = dict(model.named_parameters(remove_duplicate=False))
    total = {id(p): p.numel() for p in named.values()}
    inside = {
        id(named[key]): named[key].numel()
        for analysis, coupling in couplings
        for key in (f"{analysis.name}.{name}".lstrip(".") for name, _ in coupling.axes)
        if key in named
    }
    judged = tally(found.values())
    missing = Counter(
        op for analysis in found.values() for op, nodes in analysis.axis_facts.missing.items() for _ in nodes
    )
    export = sum(analysis.seconds["export"] for analysis in found.values())
    other = sum(
        seconds for analysis in found.values() for name, seconds in analysis.seconds.items() if name != "export"
    )
    shares = judged.share_of_attentions(), judged.share_of_ffns()
    because = Counter(reason for reasons in judged.reasons.values() for reason in reasons.elements())
    return {
        "stage": "analysed",
        "captured": "whole" if list(found) == [""] else f"{len(found)} regions",
        "nodes": sum(len(analysis.captured.graph.nodes) for analysis in found.values()),
        "export_s": round(export, 2),
        "analysis_s": round(other, 3),
        "analysis_share": round(other / export, 3) if export else "",
        "couplings": len(couplings),
        **{kind: kinds.get(kind, 0) for kind in KINDS},
        "refusals": sum(len(analysis.discovery.refusals) for analysis in found.values()),
        "parameters_inside": round(sum(inside.values()) / max(1, sum(total.values())), 3),
        "attentions": judged.attentions,
        "attentions_explained": "" if shares[0] is None else round(shares[0], 3),
        "ffns_explained": "" if shares[1] is None else round(shares[1], 3),
        **{
            f"{part}_expected": " ".join(f"{status}:{n}" for status, n in sorted(judged.counts[part].items()))
            for part in PARTS
        },
        "refused_because": " | ".join(f"{reason[:110]} x{n}" for reason, n in because.most_common(3)),
        "missing": " ".join(f"{op}:{n}" for op, n in missing.most_common()),
    }
