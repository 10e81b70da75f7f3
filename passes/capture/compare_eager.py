"""Comparison with eager: outputs and gradients of a captured graph and of the region it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ecospa_fx.passes.graph.isolate import fresh_leaf, isolated, seed
from ecospa_fx.passes.graph.tensors import dense, named_tensors, parameters_of
from ecospa_fx.passes.ir.region_graph import Forward
from ecospa_fx.passes.ir.results import flattened_results
from ecospa_fx.passes.ir.signature import autocast_now, kept_autocast, with_autocast
from ecospa_fx.passes.ir.state_access import ObjectLeaf, copy_objects, flattened, parted

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.region_graph import RegionGraph


# Relative error up to which a captured graph counts as equal to eager, by dtype. Most graphs are bit-identical; the
# others call fused kernels that sum in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def run(captured: RegionGraph, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], **interpreter: Any) -> Any:
    """Interpret the graph at original sizes. Slow; for checks.

    Args:
        captured: the graph.
        tensors: a tensor per parameter and buffer name.
        inputs: the tensor leaves of a call.
        interpreter: `interpreter=` a subclass of `fx.Interpreter` to run it with; `constants=` tensors to run it with.

    Returns:
        The output tensors of the region, without those that the graph gives to hooks; with `stored=True` in
        `interpreter`, then the tensors that objects hold after the call. With `assigned=module`, tensors that the
        forward assigns to attributes are assigned to those of the module.
    """
    make_interpreter = interpreter.get("interpreter", fx.Interpreter)
    values = {placeholder: tensors[name] for placeholder, name in captured.tensors.items()} | dict(
        zip(captured.inputs, inputs, strict=True)
    )
    constants = interpreter.get("constants", captured.constants)
    root = nn.Module()
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, constants[node.name])
    order = [node.name for node in captured.graph.nodes if node.op == "placeholder"]
    given = [values.get(name, constants.get(name)) for name in order]
    with kept_autocast():
        outputs = make_interpreter(root, graph=captured.graph).run(*given)
    if "assigned" in interpreter:
        for place, value in zip(captured.assigned, captured.assigned_among(outputs), strict=True):
            place.put(interpreter["assigned"], value)
    stored = outputs[len(outputs) - len(captured.carried.stored) :] if interpreter.get("stored") else ()
    return (*outputs[: captured.returned], *stored)


def difference_from_eager(
    captured: RegionGraph,
    module: nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    once: bool = False,
    gradients: bool = True,
) -> str | None:
    """Say where the graph differs from eager on this call, in outputs or gradients; None where they agree.

    A second call is compared too, and one without gradients, which may run other Python; not with `once`, for a graph
    that has been compared so on a block that runs the same Python. Where eager itself cannot compute gradients, that
    is a difference too, or with `gradients=False` nothing to compare.

    Graphs are traced without autocast. Under autocast they are compared twice, first without it and exactly, then as
    they are called, because the region's Python may depend on it. Where it does, a graph that has been traced under
    autocast serves under that alone, and is compared so. Where eager itself does not run without autocast,
    because a region before has cast what meets float32 weights here, the second comparison has to do, as for a model
    that is in the narrow dtype altogether. Buffers that a forward updates (running statistics) and the random state
    are left as they were.
    """
    dtypes = [dtype for dtype in autocast_now() if dtype is not None]
    error: str | None = None
    if not captured.under_autocast:
        try:
            with with_autocast():
                error = _difference(captured, module, forward, args, kwargs, once, gradients)
        except _EagerError as failed:
            error = None if dtypes else str(failed)
    if error is None and dtypes:
        try:
            tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
            error = _difference(captured, module, forward, args, kwargs, once, gradients, tolerance)
            if error and not isinstance(error, NoBackward):
                error = UnderAutocast(f"{error} under autocast")
        except _EagerError as failed:
            error = f"{failed} under autocast"
    return error


class UnderAutocast(str):
    """A difference that there is under autocast only: a graph that is traced under it may have none."""


class NoBackward(str):
    """The graph has no backward, though eager has: one that is traced without writes into its values may have one."""


class _EagerError(Exception):
    """The region's own Python fails on the call, or its backward does."""


@dataclass(frozen=True)
class _Results:
    """The outcome of calls in a row: outputs, gradients by the names of inputs and parameters, and state left."""

    outputs: list[Tensor]
    grads: list[Tensor | None]
    names: list[str]
    backward_error: str | None
    state: dict[str, Tensor]
    again: list[Tensor]
    state_again: dict[str, Tensor]


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)


def _marks(module: nn.Module) -> dict[str, tuple[Tensor, int, int, bool]]:
    """Return the parameters of a module by name, each with what tells that it has been changed."""
    return {name: (p, p._version, _address(p), p.requires_grad) for name, p in parameters_of(module)}


def _numbers_like(out: Tensor, seed: int) -> Tensor:
    """Draw numbers of the shape of an output, the same at each call; other threads may draw from torch's generator."""
    if type(out) is not Tensor:  # it may be of a class that has its own way to be drawn
        return torch.randn_like(out)
    generator = torch.Generator(out.device).manual_seed(seed)
    return torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device)


def _state_of(
    captured: RegionGraph, module: nn.Module, before: Mapping[str, tuple[Tensor, int, int, bool]]
) -> dict[str, Tensor]:
    """Copy the buffers, the tensors that a forward assigns to attributes, and the parameters that it has changed."""
    state = {name: dense(buffer.detach().clone()) for name, buffer in module.named_buffers()}
    for place in captured.assigned:
        value = place.value(module)
        if isinstance(value, Tensor):
            state[place.full_name] = value.detach().clone()
    for name, (parameter, version, address, needed) in before.items():
        if parameter.requires_grad != needed:
            state[f"{name}.requires_grad"] = torch.tensor(parameter.requires_grad)
        if (parameter._version, _address(parameter)) != (version, address):
            state[name] = dense(parameter.detach().clone())
    return state


def _difference(
    captured: RegionGraph,
    module: nn.Module,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    once: bool,
    gradients: bool,
    tolerance: float = 0.0,
) -> str | None:
    parameters = {name: p for name, p in parameters_of(module) if p.requires_grad}
    leaves, spec = flattened((args, kwargs))
    leaves, objects = parted(leaves)
    places = captured.carried.state
    leaves += [place.find(objects) for place in places]
    call_leaves = len(leaves) - len(places)

    def fresh(as_called: bool) -> list[Any]:
        """Copy the leaves; with gradients of all, or of those only that have them in the call."""
        plain = [as_called and isinstance(leaf, Tensor) and not leaf.requires_grad for leaf in leaves]
        return [leaf.detach().clone() if p else fresh_leaf(leaf) for p, leaf in zip(plain, leaves, strict=True)]

    def results(call: Callable[[list[Any]], Sequence[Any]], as_called: bool = False) -> _Results:
        """Make a call with gradients and, unless `once`, another that starts from the state that it leaves."""
        inputs = fresh(as_called)
        wanted = {f"argument {i}": leaf for i, leaf in enumerate(inputs) if _differentiable(leaf)}
        wanted |= {f"`{name}`": p for name, p in parameters.items()}
        with isolated(module), torch.enable_grad():
            marks = _marks(module)
            seed(0)
            outputs = [out for out in call(inputs) if isinstance(out, Tensor)]
            state = _state_of(captured, module, marks)
            floating = [out for out in outputs if out.is_floating_point()]
            grads: list[Tensor | None] = [None] * len(wanted)
            backward_error = None
            if wanted and any(out.requires_grad for out in floating):
                seed(1)  # numbers for all of them: eager may ask for gradients of a constant that it makes
                drawn = [(out, _numbers_like(out, number)) for number, out in enumerate(floating)]
                loss: Any = sum((out * number).sum() for out, number in drawn if out.requires_grad)
                try:
                    grads = list(torch.autograd.grad(loss, list(wanted.values()), allow_unused=True))
                except Exception as error:  # a backward of the model's own raises what it likes
                    backward_error = (str(error) or type(error).__name__).splitlines()[0]
            seed(2)
            second = [] if once else call(fresh(as_called))
            again = [dense(out) for out in second if isinstance(out, Tensor)]
            state_again = {} if once else _state_of(captured, module, marks)
        grads = [grad if grad is None else dense(grad) for grad in grads]
        return _Results([dense(out) for out in outputs], grads, list(wanted), backward_error, state, again, state_again)

    def eager(inputs: list[Any]) -> list[Any]:
        state = dict(zip(places, cloned_state(inputs), strict=True))
        twins = copy_objects(objects, lambda place, t: state[place] if place in state else t.detach().clone())
        call = [twins[leaf.number] if isinstance(leaf, ObjectLeaf) else leaf for leaf in inputs[:call_leaves]]
        call_args, call_kwargs = pytree.tree_unflatten(call, spec)
        returned = forward(module, *call_args, **call_kwargs)
        results, _ = flattened_results(returned, lambda each: any(each is twin for twin in twins))
        return [*results, *(place.find(twins) for place in captured.carried.stored), *state.values()]

    def graph(inputs: list[Any]) -> Sequence[Any]:
        named = named_tensors(module)
        state = cloned_state(inputs)
        call = [leaf for leaf in inputs[:call_leaves] if isinstance(leaf, Tensor)]
        outputs: Sequence[Any] = run(captured, named, [*call, *state], stored=True, assigned=module)
        return [*outputs, *state]

    def cloned_state(inputs: list[Any]) -> list[Tensor]:
        # A forward may write into them.
        return [tensor.clone() for tensor in inputs[call_leaves:]]

    def without_gradients(call: Callable[[list[Any]], Sequence[Any]]) -> tuple[list[Tensor], dict[str, Tensor]]:
        with isolated(module), torch.no_grad():
            marks = _marks(module)
            seed(0)
            inputs = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            outputs = [dense(out) for out in call(inputs) if isinstance(out, Tensor)]
            return outputs, _state_of(captured, module, marks)

    as_called = False
    try:
        mine = results(eager)
    except RuntimeError as error:
        as_called = True  # it may ask for gradients of an input itself, which only a leaf without any allows
        try:
            mine = results(eager, as_called)
        except RuntimeError:
            raise _EagerError(f"its eager forward does not run: {str(error).splitlines()[0]}") from error
    if gradients and mine.backward_error is not None:
        raise _EagerError(
            f"its eager backward does not run: {mine.backward_error.rstrip('.')}. If this call needs no gradients, "
            "make it under torch.no_grad()"
        )
    try:
        theirs = results(graph, as_called)
    except RuntimeError as error:
        return f"its graph does not run: {str(error).splitlines()[0]}"
    for which, outs, graph_outs in (
        ("", mine.outputs, theirs.outputs),
        (" of a second call", mine.again, theirs.again),
    ):
        if len(outs) != len(graph_outs):
            return f"the graph gives {len(graph_outs)} tensors{which}, eager {len(outs)}"
        for i, (out, graph_out) in enumerate(zip(outs, graph_outs, strict=True)):
            if not _close(out, graph_out, tolerance):
                return f"output {i}{which} of the graph differs from eager by {relative_error(out, graph_out):.1e}"
    for left, graph_left in ((mine.state, theirs.state), (mine.state_again, theirs.state_again)):
        for name in left.keys() | graph_left.keys():
            if name not in left or name not in graph_left:
                return f"`{name}` is written to by {'eager' if name in left else 'the graph'} only"
            if not _close(left[name], graph_left[name], tolerance):
                apart = relative_error(left[name], graph_left[name])
                return f"`{name}`, which a call changes, differs from eager by {apart:.1e} after it"
    if mine.backward_error is None:
        difference = _difference_of_gradients(mine, theirs, tolerance)
        if difference is not None:
            return difference
    return None if once else _difference_without_gradients(without_gradients, eager, graph, tolerance)


def _difference_of_gradients(mine: _Results, theirs: _Results, tolerance: float) -> str | None:
    """Say which gradient of the graph differs from eager's."""
    if theirs.backward_error is not None:
        return NoBackward(f"backward through its graph does not run: {theirs.backward_error.partition(' Hint: ')[0]}")
    sizes = (float(grad.detach().abs().max()) for grad in mine.grads if grad is not None and grad.numel())
    largest = max(sizes, default=0.0)
    for name, a, b in zip(mine.names, mine.grads, theirs.grads, strict=True):
        if (a is None) != (b is None):
            missing = "the graph, as where something beside its module holds it" if b is None else "eager"
            if not _negligible(a if a is not None else b):
                return f"the gradient of {name} is missing in {missing}"
        elif a is not None and b is not None and not _close(a, b, tolerance, largest):
            return f"the gradient of {name} differs from eager by {relative_error(a, b):.1e}"
    return None


def _difference_without_gradients(
    results: Callable[[Any], tuple[list[Tensor], dict[str, Tensor]]], eager: Any, graph: Any, tolerance: float
) -> str | None:
    """Say where a graph differs from eager in a call without gradients, where a forward may take another branch."""
    try:
        outputs, state = results(eager)
    except Exception:
        return None  # it has no such calls
    graph_outputs, graph_state = results(graph)
    if len(outputs) != len(graph_outputs):
        return f"it gives {len(outputs)} tensors without gradients, and {len(graph_outputs)} with them"
    for i, (out, graph_out) in enumerate(zip(outputs, graph_outputs, strict=True)):
        if not _close(out, graph_out, tolerance):
            apart = relative_error(out, graph_out)
            return f"output {i} without gradients (torch.no_grad) is another than with them, by {apart:.1e}"
    for name in state.keys() | graph_state.keys():
        if name not in state or name not in graph_state or not _close(state[name], graph_state[name], tolerance):
            return f"`{name}` is another after a call without gradients (torch.no_grad) than after one with them"
    return None


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _negligible(gradient: Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest entry; NaN equals NaN, and inf equals inf."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.detach(), b.detach()
    same = (a == b) | ((a != a) & (b != b))
    if bool(same.all()):
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    finite = torch.where(same, torch.zeros_like(a), a - b).abs().max()
    scale = torch.where(torch.isfinite(a), a, torch.zeros_like(a)).abs().max()
    return float(finite / scale.clamp_min(torch.finfo(a.dtype).tiny))


def _close(a: Tensor, b: Tensor, tolerance: float, largest: float = 0.0) -> bool:
    """Return whether two tensors are equal up to rounding; entries below the rounding of `largest` count as noise."""
    if a.shape == b.shape and a.is_floating_point() and a.numel():
        noise = max(100 * torch.finfo(a.dtype).eps, tolerance / 10) * largest
        size, difference = float(a.detach().abs().max()), float((a - b).detach().abs().max())
        if size < max(1e-12, noise) and difference < max(1e-9, noise):
            return True
    return relative_error(a, b) <= max(tolerance, TOLERANCE.get(a.dtype, 0.0))
