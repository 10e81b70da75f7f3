"""Rewiring: a change of the modules of a compiled model (adapters merged, wrappers removed) that keeps its plan.

rewire(model, change)
  -> plain        original classes, as `change` expects them
  -> change       the user's function, which replaces modules
  -> _moved       the plan by the names that the same tensors have now; regions by the names of the same modules
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ecospa_fx.arguments import FUNCTION, MODULE, takes
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.wrappers import looks_inside

from .compiled import MODEL, CompiledModel
from .lookup import plan
from .region import Region
from .restore import plain


@takes(model=MODULE, change=FUNCTION)
@looks_inside
def rewire(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Let a function change the modules of a compiled model, and go on with the result as compiled and shrunk.

    For adapters, say, that are merged into the weights they adapt, after both have shrunk:

    >>> merged = ecospa_fx.rewire(model, lambda m: m.merge_and_unload())

    Shrunk weights are recognised as the same Parameter objects, whatever their names are afterwards. Graphs are
    dropped, and the next call captures the regions again. Make new optimizers and trainers as well.

    Args:
        model: a compiled model.
        change: takes the model, with its modules of their original classes, and returns the model that it has become.
            The regions (`ecospa_fx.explain` lists them) must still be in it, and shrunk weights be the same Parameters.

    Returns:
        The model that `change` returned, compiled.

    Raises:
        EcoSpaError: the model is not compiled; `change` did not return a module, or one without some region.
    """
    before = plan(model)  # raises where the model is not compiled
    compiled: CompiledModel = model.__dict__[MODEL]
    if compiled.state.joints:
        raise EcoSpaError(
            f"this {type(model).__name__} has couplings across regions ({compiled.state.joints[0].name}), whose other "
            "ends would be unknown after the change: change the modules first, or compile with regions='root'"
        )
    tensors = {id(tensor): name for name, tensor in reversed(named_tensors(model).items())}
    modules = {module: name for name, module in model.named_modules()}
    held = [_Held(module) for module in model.modules()]
    try:
        for name in compiled.regions:
            plain(model.get_submodule(name))
        plain(model)
        result = change(model)
        moved = _moved(compiled, result, before, tensors, modules)
    except BaseException:
        for each in held:
            each.put_back()
        raise
    if moved.regions:
        result.__dict__[MODEL] = moved
        moved.route(result)
    if not moved.regions or moved.execution == "module":
        moved.attach(result)
    return result


def _moved(
    compiled: CompiledModel, result: nn.Module, before: Plan, tensors: dict[int, str], modules: dict[nn.Module, str]
) -> CompiledModel:
    """Return the state of the model that `change` made."""
    if not isinstance(result, nn.Module):
        raise EcoSpaError(f"change returned a {type(result).__name__}; it returns the model that it has made")
    paths = {modules[module]: path for path, module in result.named_modules() if module in modules}
    for name in compiled.regions:
        if name not in paths:
            what = f"`{name}`" if name else "all of the model"
            raise EcoSpaError(
                f"{what} ran as one graph and is not in the {type(result).__name__} that change returned: compile the "
                "part that stays (the model inside a wrapper), with regions= if need be"
            )
    moved = CompiledModel(compiled.how, compiled.experiments, compiled.execution)
    for name, tensor in named_tensors(result).items():
        was = tensors.get(id(tensor))
        if was in before.original_shapes:
            moved.plan.original_shapes[name] = before.original_shapes[was]
            for dim in range(tensor.ndim):
                if (was, dim) in before.kept:
                    moved.plan.kept[name, dim] = before.kept[was, dim]
    moved.state.attributes = {
        replace(attribute, module=paths[attribute.module]): values
        for attribute, values in compiled.attributes.items()
        if attribute.module in paths
    }
    memory = SharedMemory(named_tensors(result))
    for name, region in compiled.regions.items():
        moved.regions[paths[name]] = fresh = Region(paths[name], moved.state, memory.outside(paths[name]))
        fresh.called, fresh.unsupported_marks = region.called, frozenset(region.offers.marks())
    return moved


class _Held:
    """A module as it was: its class, its attributes, and the tensors and modules in it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls, self.attributes = module, module.__class__, dict(module.__dict__)
        inside: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
        self.inside = [(held, dict(held)) for held in inside]

    def put_back(self) -> None:
        """Make it that again."""
        self.module.__class__ = self.cls
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for held, entries in self.inside:
            held.clear()
            held.update(entries)
