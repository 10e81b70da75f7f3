"""Between: the ops that a model runs between its regions, as one graph, and the calls of regions that it joins.

    follow_between(model, args, kwargs, regions)
      -> one forward, in which every op outside of the regions on something that depends on weights becomes a node
      -> Between    a `RegionGraph` that is never generated as code, and the calls of regions, with their nodes

The model's own Python runs these ops, before a shrink and after. A tensor that somebody keeps after the forward (an
attribute, a list, a hook) is found by being alive still.
"""

from __future__ import annotations

import gc
import inspect
import operator
import random
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType, MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ecospa_fx.passes.graph.isolate import isolated, seed
from ecospa_fx.passes.graph.namespaces import foreign_code, user_line
from ecospa_fx.passes.graph.tensors import named_tensors, parameters_of, same_storage, swapped
from ecospa_fx.passes.ir.border import argument_names
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.results import flattened_results
from ecospa_fx.passes.ir.signature import Signature, autocast_now
from ecospa_fx.passes.ir.state_access import TENSOR, ObjectPath, copy_objects, flattened, foreign, parted

from .conditions import Conditions
from .record import computable, computable_call, plain_tensor
from .uniform import is_filled


@dataclass(eq=False)
class RegionCall:
    """One call of a region in the forward.

    Attributes:
        region: its name.
        call: arguments and keyword arguments.
        arguments: name -> node of the graph between, for tensors that depend on weights; None for others.
        held: nodes of tensors in the objects that it is called with.
        results: placeholders of the tensors that it returned.
        returned: leaves and tree of what it returned.
    """

    region: str
    call: Any
    arguments: dict[str, fx.Node | None]
    held: list[fx.Node] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)
    returned: Any = None


@dataclass(frozen=True, eq=False)
class Between:
    """All that a forward runs between its regions.

    Attributes:
        captured: its graph: placeholders are parameters used outside of regions, results of regions, and other
            tensors; outputs are the results of the model.
        calls: the calls of regions, in order.
        kept: nodes whose values somebody keeps after the forward -> where, in words.
        conditions: the lines between regions in which Python asks a tensor yes or no.
        draws: whether it draws numbers there from the generators of Python or numpy.
    """

    captured: RegionGraph
    calls: Sequence[RegionCall]
    kept: Mapping[fx.Node, str]
    conditions: tuple[str, ...]
    draws: bool


Instead = Callable[[int, Callable[[Tensor], Tensor]], Any]


@dataclass(frozen=True)
class ForwardPath:
    """Choice of one of the forwards that a model may run.

    Attributes:
        attempt: number of the forward; another one draws other numbers.
        training: the mode of all its modules; None leaves each in its own.
        gradients: with gradients.
        inverted: the line whose conditions on tensors are answered the other way round; None answers as they are.
    """

    attempt: int = 0
    training: bool | None = None
    gradients: bool = False
    inverted: str | None = None


def follow_between(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    regions: Collection[str],
    *,
    path: ForwardPath = ForwardPath(),
    tensors: Mapping[str, Tensor] = MappingProxyType({}),
    instead: Instead | None = None,
) -> Between:
    """Run one forward of a model, which changes nothing, and return what it runs between its regions.

    Args:
        model: the model; left as it is.
        args: positional arguments of the forward.
        kwargs: keyword arguments of it.
        regions: names of submodules, none inside another.
        path: which of its forwards.
        tensors: parameters and buffers to swap in, by name.
        instead: makes the result of a call of a region, from the number of the call among all and a function for each
            tensor in it; the forward of the region is not run.
    """
    with isolated(model), computable(model) as fake, torch.set_grad_enabled(path.gradients):
        call_args, call_kwargs = computable_call(args, kwargs, fake)
        with swapped(model, {name: fake(tensor) for name, tensor in tensors.items()}):
            watch = _Watch(model, regions, path, None if instead is None else lambda number: instead(number, fake))
            conditions = Conditions(lambda: watch.is_inside, path.inverted)
            with _in_mode(model, path.training), watch.hooked(), watch, _Data(watch), conditions:
                results = model(*call_args, **call_kwargs)
            watch.leave(results)
        del results, call_args, call_kwargs
        return watch.between(model, tuple(conditions.lines))


@contextmanager
def _in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Run the forward inside in training mode or not. `train()` is not called: it may do more, as merge weights."""
    before = {} if training is None else {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.__dict__["training"] = training
        yield
    finally:
        for module, mode in before.items():
            module.__dict__["training"] = mode


class _Watch(TorchDispatchMode):
    supports_higher_order_operators = True  # ops that take functions, as flex_attention does

    def __init__(
        self, model: nn.Module, regions: Collection[str], path: ForwardPath, instead: Callable[[int], Any] | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.calls = fx.Graph(), list[RegionCall]()
        self._modules = {name: model.get_submodule(name) for name in regions}
        self._instead = instead
        self._names: dict[int, str] = {}
        for name, parameter in parameters_of(model, remove_duplicate=False):
            self._names.setdefault(id(parameter), name)
        self._nodes = WeakIdKeyDictionary()  # tensor -> its node, where it depends on weights
        self._filled = WeakIdKeyDictionary()  # tensor of one value that was made here -> the op and its arguments
        self._tensors: dict[str, str] = {}
        self._inputs: list[fx.Node] = []
        self._alive: list[tuple[Any, fx.Node]] = []
        self._running: list[tuple[RegionCall, list[Any]]] = []  # with the objects of their arguments
        self._results: list[fx.Node] = []
        self._kept: dict[fx.Node, str] = {}
        self._with_backward = _forwards_of_functions()
        self._attempt, self._draws = path.attempt, False
        self._seed()

    # The regions.

    @property
    def is_inside(self) -> bool:
        """Whether a region runs now."""
        return bool(self._running)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the calls of the regions inside."""
        handles: list[Any] = []
        stubbed: list[nn.Module] = []
        for name, module in self._modules.items():

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._enter(name, module, args, kwargs)

            def leave(_: nn.Module, __: Any, result: Any, name: str = name) -> None:
                self._leave(result)

            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, prepend=True, always_call=True),
            ]
            if self._instead is not None:
                make = self._instead

                def stub(*_: Any, make: Callable[[int], Any] = make, **__: Any) -> Any:
                    return make(len(self.calls) - 1)

                module.__dict__["forward"] = stub
                stubbed.append(module)
        try:
            yield
        finally:
            for module in stubbed:
                del module.__dict__["forward"]
            for handle in handles:
                handle.remove()

    def _seed(self) -> None:
        """Seed all generators, so that a forward without the regions draws the same numbers between them."""
        number = len(self.calls) + 1000 * self._attempt
        seed(number)
        random.seed(number)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(number)
        self._seeded = _in_python()

    def _look_for_draws(self) -> None:
        self._draws = self._draws or _in_python() != self._seeded

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._look_for_draws()
        leaves, objects = parted(flattened((args, kwargs))[0])
        names = argument_names(type(module).forward, args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        arguments = {name: self._known(tensor) for name, tensor in zip(names, tensors, strict=True)}
        call = RegionCall(name, None, arguments)

        def note(_: ObjectPath, tensor: Tensor) -> Tensor:
            node = self._known(tensor)
            if node is not None:
                call.held.append(node)
            return tensor

        copy_objects(objects, note)
        self.calls.append(call)
        self._running.append((call, objects))
        if self._instead is None:  # not the tensors themselves, which would stay alive
            call.call = pytree.tree_map_only(Tensor, plain_tensor, (args, kwargs), is_leaf=foreign)

    def _leave(self, result: Any) -> None:
        call, objects = self._running[-1]
        leaves, spec = flattened_results(result, lambda each: any(each is other for other in objects))
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                node = self._placeholder(leaf, "result")
                self._remember(leaf, node)
                call.results.append(node)
        if self._instead is None:
            plain = [plain_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call.returned = plain, spec
        self._running.pop()  # copies of results are no ops between
        self._seed()

    # The ops between.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, and make it a node if it is between regions and takes something that depends on weights."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._running and any(self._depends(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            self._add(func, args, kwargs, result)
        elif not self._running and is_filled(func):
            self._filled[result] = func, args, kwargs
        return result

    def _depends(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (leaf in self._nodes or id(leaf) in self._names)

    def _add(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is torch.ops.aten.detach.default:  # autograd makes some, too
            self._remember(result, self._node(args[0]))
            return
        new_args, new_kwargs = pytree.tree_map_only(Tensor, self._node, (args, kwargs))
        if not isinstance(func, torch._ops.OpOverload):  # a graph holds no functions; no rule reads them
            nodes = [leaf for leaf in pytree.tree_leaves((new_args, new_kwargs)) if isinstance(leaf, fx.Node)]
            new_args, new_kwargs = nodes, {}
        node = self._call(func, new_args, new_kwargs, result)
        if _runs(self._with_backward):
            self._kept[node] = "a torch.autograd.Function between the regions has a backward of its own, of any kind"
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, (tuple, list)):
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    picked = self.graph.call_function(operator.getitem, (node, i))
                    picked.meta["val"] = node.meta["val"][i]
                    picked.meta["stack_trace"] = node.meta["stack_trace"]
                    self._remember(item, picked)

    def _node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor, a new placeholder for one that comes from elsewhere."""
        node = self._known(tensor)
        return self._given(tensor) if node is None else node

    def _given(self, tensor: Tensor) -> fx.Node:
        """Return a node for a tensor that depends on no weight: a new placeholder.

        A tensor that was filled with one value is the op that made it. One whose entries repeat along a dim (stride 0)
        is a placeholder for one of them, and their repetition.
        """
        if tensor in self._filled and tensor._version == 0:
            func, args, kwargs = self._filled[tensor]
            return self._call(func, args, kwargs, tensor)
        one = tensor
        if tensor.layout is torch.strided:
            with unset_fake_temporarily():
                one = _meta(tensor)
                for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
                    if stride == 0 and size > 1:
                        one = one.narrow(dim, 0, 1)
        node = self._placeholder(one, "given")
        self._inputs.append(node)
        if one.shape == tensor.shape:
            return node
        return self._call(torch.ops.aten.expand.default, (node, list(tensor.shape)), {}, tensor)

    def _call(self, func: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        node = self.graph.call_function(func, tuple(args), dict(kwargs))
        node.meta["val"] = pytree.tree_map_only(Tensor, _meta, result)
        node.meta["stack_trace"] = user_line()
        return node

    def _known(self, tensor: Tensor) -> fx.Node | None:
        """Return the node of a tensor that depends on weights, or is one."""
        node: fx.Node | None = self._nodes.get(tensor)
        if node is None and id(tensor) in self._names:
            node = self._placeholder(tensor, "weight")
            self._tensors[node.name] = self._names[id(tensor)]
            self._nodes[tensor] = node
        return node

    def _placeholder(self, tensor: Tensor, name: str) -> fx.Node:
        last = self._last_placeholder
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before():
            node = self.graph.placeholder(name)
        self._last_placeholder = node
        node.meta["val"] = _meta(tensor)
        node.meta["stack_trace"] = user_line()
        return node

    _last_placeholder: fx.Node | None = None

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[tensor] = node
        if id(tensor) not in self._names:
            self._alive.append((weakref.ref(tensor), node))

    def read_data(self, tensor: Tensor, data: Tensor) -> None:
        """Note that `data` is the `.data` of a tensor, which no op is seen to read."""
        node = None if self._running else self._known(tensor)
        if node is not None:
            self._nodes[data] = node

    def write_data(self, tensor: Tensor, data: Tensor) -> None:
        """Note that `data` is assigned to the `.data` of a tensor."""
        node = None if self._running else self._known(data)
        if node is None:
            return
        if isinstance(tensor, nn.Parameter) or tensor not in self._nodes:
            self._kept[node] = "it is assigned to the `.data` of something that was there before"
        else:
            self._remember(tensor, node)

    # The end.

    def leave(self, results: Any) -> None:
        """Note the results of the model."""
        self._look_for_draws()
        seen: list[Tensor] = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]
        leaves, objects = parted(flattened(results)[0])
        seen += [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def note(_: ObjectPath, tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor

        copy_objects(objects, note)
        nodes = (self._nodes.get(tensor) for tensor in seen)
        self._results = list(dict.fromkeys(node for node in nodes if node is not None))

    def between(self, model: nn.Module, conditions: tuple[str, ...]) -> Between:
        """Return what was seen, once the results are gone."""
        gone = set(self._results)
        kept = dict(self._kept)
        if any(ref() is not None for ref, node in self._alive if node not in gone):
            gc.collect()
            kept |= {
                node: "something keeps it after the forward: an attribute, a list, a hook"
                for ref, node in self._alive
                if ref() is not None and node not in gone
            }
        self.graph.output(tuple(self._results))
        tensors = dict(self._tensors)
        named = named_tensors(model)
        results = [node for call in self.calls for node in call.results]
        inputs = tuple(node.name for node in (*results, *self._inputs))
        spec = pytree.tree_structure(tuple(range(len(self._results))))
        signature = Signature(spec, (), (), (), {}, autocast_now())
        captured = RegionGraph(
            region="",
            graph=self.graph,
            tensors=tensors,
            parameters=frozenset(tensors),
            constants={},
            inputs=inputs,
            signature=signature,
            sizes={name: named[name].shape for name in tensors.values()},
            out_spec=spec,
            out_leaves=(TENSOR,) * len(self._results),
            same_storage=same_storage(model, tensors.values()),
            between=True,
            argument_names=tuple(node.name for node in results),
        )
        return Between(captured, self.calls, kept, conditions, self._draws)


class _Data(TorchFunctionMode):
    """Looks at `.data` and assignments to it, of which no op is made."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == _READ:
            self._watch.read_data(args[0], result)
        elif func == _WRITE:
            self._watch.write_data(*args[:2])
        return result


_READ, _WRITE = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]


def _forwards_of_functions() -> frozenset[CodeType]:
    """Return the code of the forward of every `torch.autograd.Function` that is not torch's own."""
    found: set[CodeType] = set()
    waiting: list[type] = [torch.autograd.Function]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        forward = vars(cls).get("forward")
        if isinstance(forward, staticmethod) and not foreign_code(cls.__module__):
            found.add(inspect.unwrap(forward.__func__).__code__)
    return frozenset(found)


def _runs(codes: frozenset[CodeType]) -> bool:
    """Return whether some of these functions runs now, in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


def _in_python() -> tuple[Any, ...]:
    """Return the states of the generators of Python and numpy."""
    if (numpy := sys.modules.get("numpy")) is None:
        return (random.getstate(),)
    _, words, place, *_ = numpy.random.get_state()
    return random.getstate(), words.tobytes(), place


def _meta(tensor: Tensor) -> Tensor:
    """Return a tensor without memory that stands for another."""
    with unset_fake_temporarily():
        if tensor.layout is not torch.strided:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
