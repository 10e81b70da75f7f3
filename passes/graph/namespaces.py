"""Namespaces: where the code of a forward keeps values beside the attributes of its modules.

code_of(module)           the functions that a forward can reach, by name
-> namespaces(module, c)  globals, cells of closures and attributes of classes that they read or write
"""

from __future__ import annotations

import dis
import functools
import gc
import linecache
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from .stand_in_class import stands_for


class _Sign:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name.lower()

    def __reduce__(self) -> str:
        return self.name


ABSENT = _Sign("ABSENT")  # stands for the value of an attribute or entry that does not exist
WHOLE = _Sign("WHOLE")  # stands for the key of all that a container holds; None may be a key of its own

# Packages whose functions read nothing that a training loop changes between calls.
_OTHERS = frozenset({"torch", "numpy", "ecospa_fx", "functorch", "sympy", "networkx", "triton"})


def foreign_code(package: str | None) -> bool:
    """Return whether code is of torch, of this library or of the standard library."""
    root = (package or "").partition(".")[0]
    return root in _OTHERS or (root in sys.stdlib_module_names and root != "__main__")


_OF_FUNCTIONS = ("__defaults__", "__kwdefaults__")  # which lie in a function beside its `__dict__`
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Code = Mapping[CodeType, FunctionType | dict[str, Any]]
"""Code -> the function that it is of, or its globals where that is not known."""


def code_of(module: nn.Module) -> dict[CodeType, FunctionType | dict[str, Any]]:
    """Find the functions that the forwards of a module and its submodules can reach by their names.

    These are methods of their classes that are named in the code, and functions among its globals; not those of torch.
    """
    found: dict[CodeType, FunctionType | dict[str, Any]] = {}
    classes: dict[type, list[FunctionType | MethodType]] = {}
    for child in module.modules():
        hooks = [hook for kind in _HOOKS for hook in child.__dict__.get(kind, {}).values()]
        held = [value for value in (*child.__dict__.values(), *hooks) if isinstance(value, (FunctionType, MethodType))]
        classes.setdefault(stands_for(type(child)), []).extend(held)
    for cls, held in classes.items():
        for function in (*_reached_from(cls), *_reached(held, cls)):
            if function.__code__ not in found and not foreign_code(function.__globals__.get("__name__")):
                found |= dict.fromkeys(_nested(function.__code__), function.__globals__)
                found[function.__code__] = function
    return found


@functools.lru_cache(maxsize=1024)
def _reached_from(cls: type) -> tuple[FunctionType, ...]:
    return _reached([getattr(cls, "forward", None)], cls)


def _reached(functions: Sequence[Any], cls: type) -> tuple[FunctionType, ...]:
    """Find the functions that others, of objects of a class, can reach by their names."""
    found: dict[CodeType, FunctionType] = {}
    waiting: list[Any] = [*functions]
    while waiting:
        function = waiting.pop()
        if isinstance(function, (MethodType, classmethod, staticmethod)):  # no look at others: it may import
            function = function.__func__
        if not isinstance(function, FunctionType) or function.__code__ in found:
            continue
        if foreign_code(function.__globals__.get("__name__")):
            continue
        found[function.__code__] = function
        for code in _nested(function.__code__):
            waiting += [getattr(cls, name, None) for name in code.co_names]
            waiting += [function.__globals__.get(name) for name in code.co_names]
        waiting += [value_in(cell, "") for cell in function.__closure__ or ()]
    return tuple(found.values())


def function_of(frame: FrameType) -> FunctionType | None:
    """Return the function that runs in a frame, where its name or its first argument leads to it."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    owner, *way = code.co_qualname.split(".")
    found = frame.f_globals.get(owner)
    for name in way:
        found = vars(found).get(name) if isinstance(found, type) else None
    cls = first if isinstance(first, type) else type(first)
    for value in (found, *(vars(base).get(code.co_name) for base in cls.__mro__)):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        while not isinstance(function, FunctionType) or function.__code__ is not code:
            function = getattr(function, "__wrapped__", None)
            if function is None:
                break
        else:
            return function
    return None


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def names_in(code: Code) -> set[str]:
    """Return the names of attributes that code may look up: those that it names, and its strings."""
    every = {each for outer in code for each in _nested(outer)}
    strings = {constant for each in every for constant in each.co_consts if isinstance(constant, str)}
    return strings.union(*(each.co_names for each in every))


def namespaces(module: nn.Module, code: Code) -> Iterator[tuple[Any, str, str]]:
    """Yield the names outside of a module's attributes that code reads or writes: (namespace, name, words for it)."""
    for each, function in code.items():
        namespace = function.__globals__ if isinstance(function, FunctionType) else function
        for name in _global_names(each):
            if name in namespace:
                yield namespace, name, f"{namespace.get('__name__', '')}.{name}"
        if isinstance(function, FunctionType):
            cls = _class_of(function)
            if cls is not None and function.__name__[:2] != "__":
                yield cls, function.__name__, f"{cls.__name__}.{function.__name__}"
        for owner, attribute in _attributes_of_globals(each):
            held = namespace.get(owner)
            for place in _places_of(held, attribute):
                yield place, attribute, f"{owner}.{attribute}"
    for function in (each for each in code.values() if isinstance(each, FunctionType)):
        for name in mutable_defaults(function):
            yield function, name, f"{function.__qualname__}.{name}"
    for function in functions_with_cells(code):
        yield from cells_of(function)
    classes = {cls for child in module.modules() for cls in type(child).__mro__ if stands_for(cls) is cls}
    for cls in classes:
        if not foreign_code(cls.__module__):
            for name, value in list(vars(cls).items()):
                if name[:2] != "__" and (
                    value.__code__ in code if isinstance(value, FunctionType) else not hasattr(value, "__get__")
                ):
                    yield cls, name, f"{cls.__name__}.{name}"


def is_special(name: str) -> bool:
    """Decide whether a name is one of Python's own, such as `__module__`, in whose place nothing else can stand."""
    return name[:2] == "__" and name[-2:] == "__" and name not in _OF_FUNCTIONS


def _class_of(function: FunctionType) -> type | None:
    """Return the class in which a function lies under its own name, as far as its globals lead to it."""
    owner, *way = function.__qualname__.split(".")
    found = function.__globals__.get(owner)
    for name in way[:-1]:
        found = vars(found).get(name) if isinstance(found, type) else None
    held = vars(found).get(way[-1]) if way and isinstance(found, type) else None
    return found if isinstance(found, type) and getattr(held, "__func__", held) is function else None


def _places_of(held: Any, attribute: str) -> Iterator[ModuleType | type | FunctionType]:
    """Yield the modules, functions and classes in which an attribute of one lies, or would be set."""
    if not isinstance(held, (ModuleType, type, FunctionType)) or is_special(attribute) or foreign_code(_package(held)):
        return
    yield held
    if isinstance(held, type):
        metaclass: type = type(held)
        for cls in (*held.__mro__[1:], *metaclass.__mro__):
            if attribute in vars(cls) and not foreign_code(cls.__module__):
                yield cls


def _package(held: Any) -> str | None:
    return held.__name__ if isinstance(held, ModuleType) else held.__module__


def value_in(namespace: Any, name: str) -> Any:
    """Return the value of a name in globals, a cell, a module or a class; `ABSENT` where it has none.

    A class and a function have what lies in themselves. A base, a metaclass or a descriptor makes other values, anew at
    each look: put back, such a value would lie in the class and hide what made it.
    """
    if isinstance(namespace, dict):
        return dict.get(namespace, name, ABSENT)  # a subclass may have another `get`
    if isinstance(namespace, CellType):
        try:
            return namespace.cell_contents
        except ValueError:  # empty
            return ABSENT
    if isinstance(namespace, type) or (isinstance(namespace, FunctionType) and name not in _OF_FUNCTIONS):
        return vars(namespace).get(name, ABSENT)
    try:
        return getattr(namespace, name, ABSENT)
    except Exception:  # a module that imports others at a look, of which one is not installed
        return ABSENT


def seen_in(cls: type, name: str) -> Any:
    """Return what a look at an attribute of a class gives, wherever it lies; `ABSENT` for what all classes have."""
    return getattr(cls, name, ABSENT) if any(name in vars(place) for place in _places_of(cls, name)) else ABSENT


def put_in(namespace: Any, name: str, value: Any) -> None:
    """Give a name in globals, a cell, a module or a class a value; take it away where that is `ABSENT`."""
    if isinstance(namespace, CellType):
        if value is ABSENT:
            del namespace.cell_contents
        else:
            namespace.cell_contents = value
    elif isinstance(namespace, dict):
        if value is ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value
    elif value is ABSENT:
        delattr(namespace, name)
    else:
        setattr(namespace, name, value)


def mutable_defaults(function: FunctionType) -> dict[str, Any]:
    """Return the default arguments of a function, as the attributes that hold them, where some can change."""
    if foreign_code(function.__module__):
        return {}
    held = {"__defaults__": function.__defaults__, "__kwdefaults__": function.__kwdefaults__}
    values = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    fixed = (type(None), bool, int, float, complex, str, bytes, type)
    return {} if all(isinstance(value, fixed) for value in values) else {k: v for k, v in held.items() if v}


@functools.lru_cache(maxsize=4096)
def _global_names(code: CodeType) -> tuple[str, ...]:
    opcodes = ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME", "DELETE_GLOBAL")
    return tuple(dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in opcodes))


@functools.lru_cache(maxsize=4096)
def _attributes_of_globals(code: CodeType) -> tuple[tuple[str, str], ...]:
    """Return the attributes that code reads or writes right after a global: `settings.tau`, `Net.tau`."""
    found: dict[tuple[str, str], None] = {}
    owner = None
    for each in dis.get_instructions(code):
        if each.opname == "LOAD_GLOBAL":
            owner = each.argval
        elif owner is not None and each.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"):
            found[owner, each.argval] = None
            owner = None
        elif each.opname not in ("CACHE", "PUSH_NULL", "COPY"):
            owner = None
    return tuple(found)


_CLOSURES: dict[int, tuple[CodeType, list[weakref.ref[FunctionType]]]] = {}
"""Identity of code -> the code, and the functions with cells that had it when it was first met."""


def cells_of(function: FunctionType) -> Iterator[tuple[CellType, str, str]]:
    """Yield the variables of an enclosing function that a function reads, as `namespaces` does."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield cell, name, f"{name} in {function.__qualname__}"


def functions_with_cells(code: Code) -> list[FunctionType]:
    """Find the functions that read variables of an enclosing function, unless that is among them and runs anew."""
    known = [function for function in code.values() if isinstance(function, FunctionType) and function.__closure__]
    inner = {each for outer in code for each in _nested(outer) if each is not outer}
    others = [each for each, function in code.items() if not isinstance(function, FunctionType)
              and each not in inner and each.co_freevars and set(each.co_freevars) != {"__class__"}]  # fmt: skip
    new = [each for each in others if id(each) not in _CLOSURES]
    if new:  # a search of all objects, which takes long in a large process: once for each function
        found = [f for f in gc.get_referrers(*new) if isinstance(f, FunctionType) and f.__closure__]
        for each in new:
            _CLOSURES[id(each)] = each, [weakref.ref(f) for f in found if f.__code__ is each]
    for each in others:
        known += [f for f in (reference() for reference in _CLOSURES[id(each)][1]) if f is not None]
    return known


def user_line() -> str:
    """Return the line of the model's own code that runs now, as torch writes stack traces; empty where none does."""
    frame = sys._getframe(1)
    while frame is not None:
        file, number = frame.f_code.co_filename, frame.f_lineno
        if not foreign_code(frame.f_globals.get("__name__")) and file[:1] != "<":
            return f'File "{file}", line {number}, in {frame.f_code.co_name}\n    {linecache.getline(file, number)}'
        frame = frame.f_back  # type: ignore[assignment]
    return ""
