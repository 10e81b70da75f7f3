"""Parametrized weights: those that torch.nn.utils computes from others before each call, and the call that undoes it.

Some of what computes a weight needs all of its entries (the power iteration of spectral_norm in training, an
orthogonal basis), so that nothing shrinks along it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ecospa_fx.passes.find.left_whole import Refusal
from ecospa_fx.passes.graph.tensors import join, parameters_of

HOOKS: tuple[tuple[type, str, str, str], ...] = (
    (WeightNorm, "name", "torch.nn.utils.remove_weight_norm", "_v _g"),
    (SpectralNorm, "name", "torch.nn.utils.remove_spectral_norm", "_orig"),
    (BasePruningMethod, "_tensor_name", "torch.nn.utils.prune.remove", "_orig"),
)
"""Hooks that compute a weight: class, attribute with its name, function that undoes it, endings of the originals."""

WRITTEN_IN = ("parametrizations", "weight_norm.py", "spectral_norm.py", "prune.py")
"""Words in the place of an op, as a reason names it, that is part of a parametrization."""


def removals(model: nn.Module) -> dict[str, str]:
    """Return name of each parameter that a parametrization reads -> the call that removes the parametrization."""
    calls: dict[str, str] = {}
    for path, module in model.named_modules():
        where = f"model.get_submodule({path!r})" if path else "model"
        for weight, each in getattr(module, "parametrizations", {}).items() if _has_some(module) else ():
            call = f"torch.nn.utils.parametrize.remove_parametrizations({where}, {weight!r})"
            calls |= {join(path, f"parametrizations.{weight}.{name}"): call for name, _ in parameters_of(each)}
        for hook in module._forward_pre_hooks.values():
            for cls, attribute, function, endings in HOOKS:
                if isinstance(hook, cls):
                    weight = getattr(hook, attribute)
                    calls |= {join(path, weight + end): f"{function}({where}, {weight!r})" for end in endings.split()}
    return calls


def _has_some(module: nn.Module) -> bool:
    return bool(parametrize.is_parametrized(module))


def first_removal(model: nn.Module) -> str:
    """Return a sentence with the way out for a model whose weights are parametrized; else nothing."""
    calls = dict.fromkeys(removals(model).values())
    more = f" and {len(calls) - 1} more" if len(calls) > 1 else ""
    return f". Weights are parametrized; remove that first: {next(iter(calls))}{more}" if calls else ""


def with_way_out(refusal: Refusal, calls: Mapping[str, str]) -> Refusal:
    """Add the way out to a refusal that a parametrization has caused.

    Args:
        refusal: the refusal.
        calls: see `removals`.
    """
    names = [member.rpartition("[")[0] for member in refusal.members]
    caused = [name for name in names if name in calls]
    if not caused or not any(written in reason for reason in refusal.reasons for written in WRITTEN_IN):
        return refusal
    named = [name for name in caused if any(_owner(name) in reason for reason in refusal.reasons)]
    first = calls[(named or caused)[0]]
    return replace(refusal, reasons=(*refusal.reasons, f"remove the parametrization first: {first}"))


def _owner(name: str) -> str:
    return name.partition("parametrizations.")[0] or name.rpartition(".")[0]
