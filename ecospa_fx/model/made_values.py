"""Made values: a model that a class makes at other sizes, run beside the program of a compiled one at these sizes."""

from __future__ import annotations

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.passes.capture.compare_eager import TOLERANCE, relative_error
from ecospa_fx.passes.capture.outside_numbers import numbers_at
from ecospa_fx.passes.follow.course import Failed, own_forward
from ecospa_fx.passes.follow.trial import drawn, example_calls, modes
from ecospa_fx.passes.graph.isolate import isolated, seed
from ecospa_fx.passes.graph.tensors import as_held, join, named_tensors, parameters_of, sliced, swapped
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.plan import Plan

from .compiled import CompiledModel
from .region import Region
from .slicing import kept_positions


def difference_of_made(model: nn.Module, compiled: CompiledModel, plan: Plan, made: nn.Module) -> str | None:
    """Say how a model that was made at the sizes of a plan computes something else; None where it does not.

    Equal shapes do not say that: a scale may follow from a number of heads. Each region is run by the new model's own
    Python with weights drawn at random, against the program of the compiled model. Outside the regions, the numbers
    that are read there are compared, and the tensors that no save holds.

    Args:
        model: the compiled model.
        compiled: its state.
        plan: the plan, which may remove more than is removed now.
        made: the model that was made, with values in its buffers.
    """
    through = (of for region in compiled.regions.values() for of in region.border.along().values())
    crossing = next((of[0] for of in through if of is not None and of in plan.kept), None)
    if crossing is not None:
        return (
            f"the axis of `{crossing}` runs through several regions, and what the model's own Python does between them "
            "with numbers of the new sizes is not compared: compile with regions='root'"
        )
    outside = _difference_outside(model, compiled, made)
    if outside is not None:
        return outside
    done: set[tuple[int, ...]] = set()
    for name, region in compiled.regions.items():
        graphs = tuple(id(each.captured.graph) for each in region.specializations)
        if not graphs or graphs in done:
            continue
        done.add(graphs)
        difference = _of_region(model, compiled.plan, plan, region, made.get_submodule(name))
        if difference is not None:
            return difference
    return None


def _difference_outside(model: nn.Module, compiled: CompiledModel, made: nn.Module) -> str | None:
    """Say which value that the model's own Python may read outside of the regions is another one."""
    inside = tuple(compiled.regions)
    for path, module in model.named_modules():
        if any(path == name or path.startswith(f"{name}.") or not name for name in inside):
            continue
        other = made.get_submodule(path)
        for name, value in module.__dict__.items():
            if type(value) is float and other.__dict__.get(name) != value:
                return f"`{join(path, name)}` would be {other.__dict__.get(name)!s:.30} and is {value}"
        for name in module._non_persistent_buffers_set:
            mine, theirs = module._buffers[name], other._buffers.get(name)
            if mine is not None and (theirs is None or not torch.equal(mine, theirs.to(mine))):
                return f"the buffer `{join(path, name)}`, which no save holds, would have other values"
    for place in sorted(compiled.state.numbers or ()):
        value = numbers_at(model, place)
        try:
            theirs = numbers_at(made, place)
        except AttributeError:
            theirs = None
        if theirs != value:
            where = join(place[0], ".".join(place[1]))
            return (
                f"`{where}` would be {theirs!s:.30} and is {value!s:.30}, and what the model's own Python computes "
                "with it outside of the regions is not compared: compile with regions='root'"
            )
    return None


def _of_region(model: nn.Module, now: Plan, plan: Plan, region: Region, made: nn.Module) -> str | None:
    module, where = model.get_submodule(region.name), region.name or "the model"
    names = {id(t): name for name, t in named_tensors(model).items() if name in plan.original_shapes}
    small: dict[str, Tensor] = {}
    for name, tensor in named_tensors(module).items():
        planned = names.get(id(tensor))
        small[name] = tensor if planned is None else _like(tensor, sliced(tensor, kept_positions(planned, now, plan)))
    small = drawn(small)
    persistent = made.state_dict(keep_vars=True).keys() | {name for name, _ in parameters_of(made)}
    for each in region.specializations:
        facts = each.axis_facts
        program = rewrite(facts, replay(facts, plan), module)
        for args, kwargs in example_calls(facts):
            inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            with torch.no_grad(), swapped(module, as_held(module, small)), isolated(module):
                seed(0)
                try:
                    expected = program.run(module, *(t.clone() for t in inputs), *program.constants)
                except Exception:  # values that were made up may be none that it takes
                    continue
            theirs = {name: t for name, t in small.items() if name in persistent}
            training = each.captured.signature.training
            with torch.no_grad(), swapped(made, as_held(made, theirs)), isolated(made), modes(made, training):
                seed(0)
                try:
                    result = own_forward(made, type(made).forward, args, kwargs)
                except Failed as failed:
                    return f"{where} {failed}"
            for mine, theirs_ in zip(tensors_in(result), expected, strict=False):
                error = relative_error(theirs_, mine)
                if mine.shape != theirs_.shape or not error <= TOLERANCE.get(mine.dtype, 0.0):
                    return f"{where} would give results that differ by {error:.1e}"
            break
    return None


def tensors_in(result: object) -> list[Tensor]:
    """Return the tensors that a forward returns, in order."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
