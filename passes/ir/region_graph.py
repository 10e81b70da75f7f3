"""Region graph: one region of a model as an FX graph of ATen ops, at its original sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ecospa_fx.passes.axes.algebra import Size

from .border import NO_BORDER, Border
from .guards import Read
from .numbers import Number
from .signature import Signature
from .state_access import TENSOR, IndexAttributes, ObjectPath, StateAccess, flattened, parted, resolve_object

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments

Forward = Callable[..., Any]

Filled = Set[tuple[type, tuple[Any, ...]]]  # (class of an object, path into it)


class Originals(Protocol):
    """Stand-ins at original sizes for the parameters and buffers of a region that have shrunk, tied as they are."""

    def shapes(self) -> dict[str, Tensor]:
        """Return them without memory, to trace with."""
        ...

    def values(self) -> dict[str, Tensor]:
        """Return them with the entries that are left in their places among zeros, to compute with."""
        ...


@dataclass(frozen=True, eq=False)
class Point:
    """One call of a hooked module inside a region.

    Attributes:
        path: of the module in the region.
        leaves: of its arguments, keyword arguments and result; `TENSOR` where there is a tensor.
        spec: tree of the three.
    """

    path: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


@dataclass(frozen=True)
class Assigned:
    """A place in a submodule to which a forward assigns a tensor at every call.

    Attributes:
        path: of the submodule in the region.
        name: of the buffer or attribute.
        buffer: whether it is a registered buffer.
    """

    path: str
    name: str
    buffer: bool

    @property
    def full_name(self) -> str:
        """The name in the region."""
        return f"{self.path}.{self.name}" if self.path else self.name

    def _held(self, region: nn.Module) -> dict[str, Any]:
        owner = region.get_submodule(self.path)
        held: dict[str, Any] = owner._buffers if self.buffer else owner.__dict__
        return held

    def value(self, region: nn.Module) -> Any:
        """Return the value there now; None where there is none."""
        return self._held(region).get(self.name)

    def put(self, region: nn.Module, value: Any) -> None:
        """Assign a tensor."""
        self._held(region)[self.name] = value


@dataclass(frozen=True, eq=False)
class RegionGraph:
    """A region as a graph at original sizes. Frozen: `dataclasses.replace` gives another one around the same graph.

    Attributes:
        region: name of the region in the model, `""` for the root.
        graph: ATen graph; its placeholders are `tensors`, `constants` and `inputs` by name.
        tensors: placeholder name -> name of the parameter or buffer in the region.
        parameters: the placeholders among `tensors` that are parameters.
        constants: placeholder name -> lifted tensor or subgraph module.
        inputs: placeholders of the tensor leaves of a call, in order; last those of tensors in its objects.
        signature: calls that the graph serves.
        sizes: original shape per name in `tensors`.
        out_spec: tree of the results.
        out_leaves: the leaves of that tree: `TENSOR` where there is a tensor, else the value itself.
        same_storage: name -> first name with the same storage (tied weights).
        shared_outside: name -> why it must stay whole: something outside the region uses it too.
        hooked: submodules whose forward hooks ran while the region was captured, and so are part of the graph -> the
            number of hooks.
        observed: calls of submodules whose tensors leave the graph after its results, for hooks that only look.
        assigned: places to which it assigns tensors, which leave the graph after those for hooks.
        carried: how the graph reads and changes the objects of its calls, such as caches.
        strangers: paths of the tensors in these objects that something else fills, at sizes of its own.
        filled: the parts of objects that other calls of the region fill, as far as known when this one was captured.
        index_attributes: integers of the region that only select its own part of an object.
        between: it holds what the model runs between its regions, see `passes.capture.between`.
        border: the dims of arguments, results and tied weights that shrink with the model around the region.
        argument_names: names of the tensors of a call, in order; see `passes.ir.border.argument_names`.
        moving: buffers that some call of the region computes from parameters, and that shrink with these everywhere.
        settings: (submodule, attribute) -> a constant that the forward reads there and does not change itself.
        numbers: constants among those that it takes as inputs, because they change from call to call.
        reads: the other values that the forward reads in Python, which its graph holds as constants.
        under_autocast: it was traced under the autocast of its signature, because the forward reads dtypes that
            autocast changes: its constants follow them.
        data_sizes: sizes that values in tensors decide -> what they were in the captured call, where it had values.
    """

    region: str
    graph: fx.Graph
    tensors: Mapping[str, str]
    parameters: frozenset[str]
    constants: Mapping[str, Any]
    inputs: tuple[str, ...]
    signature: Signature
    sizes: Mapping[str, torch.Size]
    out_spec: pytree.TreeSpec
    out_leaves: tuple[Any, ...]
    same_storage: Mapping[str, str] = field(default_factory=dict)
    shared_outside: Mapping[str, str] = field(default_factory=dict)
    hooked: Mapping[str, int] = field(default_factory=dict)
    observed: tuple[Point, ...] = ()
    assigned: tuple[Assigned, ...] = ()
    carried: StateAccess = field(default_factory=StateAccess)
    strangers: frozenset[ObjectPath] = frozenset()
    filled: Filled = frozenset()
    index_attributes: IndexAttributes = field(default_factory=IndexAttributes)
    between: bool = False
    border: Border = NO_BORDER
    argument_names: tuple[str, ...] = ()
    moving: frozenset[str] = frozenset()
    settings: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    reads: tuple[Read, ...] = ()
    numbers: tuple[Number, ...] = ()
    under_autocast: bool = False
    data_sizes: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    _plain_result: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Computed here, because torch.compile cannot trace a cached property, which takes a lock.
        object.__setattr__(self, "_plain_result", _plain_structure(self.out_leaves, self.out_spec))

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionGraph:
        return self  # frozen, and its nodes are compared by identity

    def assigned_among(self, outputs: Sequence[Any], stored: int | None = None) -> Sequence[Any]:
        """Return the part of outputs that goes to `assigned`.

        Args:
            outputs: of the graph, or of a program.
            stored: number of tensors after them that go to objects; by default as in the graph.
        """
        end = len(outputs) - (len(self.carried.stored) if stored is None else stored)
        return outputs[end - len(self.assigned) : end]

    def is_parameter(self, name: str) -> bool:
        """Return whether a tensor of the region is a parameter and not a buffer."""
        return any(self.tensors[placeholder] == name for placeholder in self.parameters)

    @property
    def buffers(self) -> set[str]:
        """Names of the tensors that are not parameters."""
        return {name for placeholder, name in self.tensors.items() if placeholder not in self.parameters}

    def used(self) -> set[str]:
        """Return the names of the parameters and buffers that the graph uses; an exported graph lists all.

        A tied weight that it uses under one name counts under all.
        """
        nodes = self.graph.find_nodes(op="placeholder")
        named = {self.tensors[node.name] for node in nodes if node.users and node.name in self.tensors}
        firsts = {self.same_storage.get(name, name) for name in named}
        return {name for name in self.tensors.values() if self.same_storage.get(name, name) in firsts}

    def numbers_now(self, region: nn.Module) -> list[float]:
        """Return the values of `numbers` in a live region."""
        modules = _Paths(region)
        return [number.read.now(modules) for number in self.numbers]

    @property
    def arguments(self) -> dict[str, str]:
        """Inputs that are tensors of the call itself -> their names, where these are known."""
        return dict(zip(self.inputs, self.argument_names, strict=False))

    @property
    def returned(self) -> int:
        """Number of tensors that the region itself returns."""
        return sum(leaf is TENSOR for leaf in self.out_leaves)

    @property
    def state(self) -> dict[str, ObjectPath]:
        """Inputs that are tensors in objects of the call -> where they lie."""
        paths = self.carried.state
        return dict(zip(self.inputs[len(self.inputs) - len(paths) :], paths, strict=True))

    def mismatch(
        self, call: Any, training: tuple[bool, ...], sizes: Sequence[tuple[Size, ...]] | None = None
    ) -> str | None:
        """Say why the graph does not serve a call, (arguments, keyword arguments); None where it does.

        Args:
            call: the call.
            training: see `training_flags`.
            sizes: of its tensors, those in its objects last, where some have shrunk.
        """
        leaves, spec = flattened(call)
        leaves, objects = parted(leaves)
        if len(objects) != len(self.carried.types):
            return "the arguments are structured differently"
        state = self.carried.read(objects)
        if state is None:
            return f"the contents of the {' and the '.join(cls.__name__ for cls in self.carried.types)} differ"
        return self.signature.mismatch(spec, leaves, training, state, sizes)

    def difference(
        self,
        call: Any,
        module: nn.Module,
        training: tuple[bool, ...],
        sizes: Sequence[tuple[Size, ...]] | None = None,
    ) -> str | None:
        """Say why the graph does not serve a call of a live region, whose weights may have been cast; None: it does."""
        return self.mismatch(call, training, sizes) or self.signature.other_weight(module)

    def serves(self, hooks: Mapping[str, int], called: Set[str]) -> bool:
        """Return whether the hooks that submodules have now run as they should.

        Args:
            hooks: submodule -> number of its forward hooks and pre-hooks.
            called: submodules that the program made from the graph calls, hooks and all.
        """
        if not hooks and not self.hooked:
            return True
        seen = {*called, *(point.path for point in self.observed)}
        others = {path: number for path, number in hooks.items() if path not in seen or path in self.hooked}
        return others == self.hooked

    def result(self, tensors: Sequence[Tensor], objects: Sequence[Any] = ()) -> Any:
        """Build the region's own result structure from the graph's output `tensors` and the `objects` of the call."""
        match self._plain_result:
            case "tensor":
                return tensors[0]
            case "tuple":
                return tuple(tensors)
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is TENSOR else resolve_object(leaf, objects) for leaf in self.out_leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)


class _Paths(dict[str, nn.Module]):
    """The submodules of a region by path, looked up when asked for."""

    def __init__(self, region: nn.Module) -> None:
        super().__init__()
        self.region = region

    def __missing__(self, path: str) -> nn.Module:
        return self.region.get_submodule(path)


def _plain_structure(out_leaves: Sequence[Any], out_spec: pytree.TreeSpec) -> str:
    """Return `"tensor"` or `"tuple"` for a result that is one or a tuple of them, as most are; else `""`."""
    tensors = range(len(out_leaves))
    if all(leaf is TENSOR for leaf in out_leaves):
        shapes = {"tensor": TENSOR, "tuple": tuple(tensors)}
        for name, shape in shapes.items():
            if pytree.tree_structure(shape) == out_spec:
                return name
    return ""


def described(region: str) -> str:
    """Name a region in a sentence."""
    return f"region `{region}`" if region else "the model"
