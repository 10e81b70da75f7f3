"""ecospa_fx: make any neural network smaller while it trains.

>>> model = ecospa_fx.compile(model)
>>> trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5)
"""

import random
from importlib import import_module
from importlib.util import find_spec
from sys import modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecospa_fx.checkpoint.save_load import load, resume, save
    from ecospa_fx.compensate.grams import Grams
    from ecospa_fx.compensate.rotation import Rotation, rotate
    from ecospa_fx.couple.constraints import Constraints
    from ecospa_fx.couple.coupling import Coupling, Member
    from ecospa_fx.model.class_swap import ShrinkableLinear
    from ecospa_fx.model.diff import ModuleDiff
    from ecospa_fx.model.lookup import couplings, plan
    from ecospa_fx.model.optimizer_table import state_rule
    from ecospa_fx.model.restore import restore
    from ecospa_fx.model.rewire import rewire
    from ecospa_fx.model.shrinking import shrink
    from ecospa_fx.out.constructor import constructor_arguments
    from ecospa_fx.out.export import export
    from ecospa_fx.out.gguf.cut import Cut, cut_gguf
    from ecospa_fx.out.hf_full_size import save_unshrunk
    from ecospa_fx.out.hf_pretrained import from_pretrained, save_pretrained
    from ecospa_fx.passes.find.left_whole import Refusal
    from ecospa_fx.score.estimator import CoupledEstimator
    from ecospa_fx.see.explanation import Explanation, explain
    from ecospa_fx.see.summary import Summary, summary
    from ecospa_fx.see.verification import Verification, verify
    from ecospa_fx.see.watch import Watch
    from ecospa_fx.train.compress import Compression, compress
    from ecospa_fx.train.distiller import Distiller
    from ecospa_fx.train.latency import Latency
    from ecospa_fx.train.nested import NestedSizes
    from ecospa_fx.train.sensitivities import Sensitivity
    from ecospa_fx.train.sensitivity import sensitivity
    from ecospa_fx.train.sparsifier import CoupledSparsifier
    from ecospa_fx.train.trainer import EcoSpaTrainer
    from ecospa_fx.vocabulary.trim import Trimmed, trim_vocabulary

    from . import errors as errors
    from . import graphs as graphs
    from . import logs as logs
    from . import optimizers as optimizers
    from . import report as report
    from . import rotation as rotation
    from . import scores as scores
    from .api import compile, diff
    from .plan import Plan

__all__ = [
    "Compression",
    "Constraints",
    "CoupledEstimator",
    "CoupledSparsifier",
    "Coupling",
    "Cut",
    "Distiller",
    "EcoSpaTrainer",
    "Explanation",
    "Grams",
    "Latency",
    "Member",
    "ModuleDiff",
    "NestedSizes",
    "Plan",
    "Refusal",
    "Rotation",
    "Sensitivity",
    "ShrinkableLinear",
    "Summary",
    "Trimmed",
    "Verification",
    "Watch",
    "compile",
    "compress",
    "constructor_arguments",
    "couplings",
    "cut_gguf",
    "diff",
    "errors",
    "explain",
    "export",
    "from_pretrained",
    "load",
    "logs",
    "plan",
    "restore",
    "resume",
    "rewire",
    "rotate",
    "save",
    "save_pretrained",
    "save_unshrunk",
    "sensitivity",
    "shrink",
    "state_rule",
    "summary",
    "trim_vocabulary",
    "verify",
]

_HOMES = {
    "checkpoint.save_load": "load resume save",
    "compensate.grams": "Grams",
    "compensate.rotation": "Rotation rotate",
    "couple.constraints": "Constraints",
    "couple.coupling": "Coupling Member",
    "model.class_swap": "ShrinkableLinear",
    "model.diff": "ModuleDiff",
    "model.lookup": "couplings plan",
    "model.optimizer_table": "state_rule",
    "model.restore": "restore",
    "model.rewire": "rewire",
    "model.shrinking": "shrink",
    "out.constructor": "constructor_arguments",
    "out.export": "export",
    "out.gguf.cut": "Cut cut_gguf",
    "out.hf_full_size": "save_unshrunk",
    "out.hf_pretrained": "from_pretrained save_pretrained",
    "passes.find.left_whole": "Refusal",
    "score.estimator": "CoupledEstimator",
    "see.explanation": "Explanation explain",
    "see.summary": "Summary summary",
    "see.verification": "Verification verify",
    "see.watch": "Watch",
    "train.compress": "Compression compress",
    "train.distiller": "Distiller",
    "train.latency": "Latency",
    "train.nested": "NestedSizes",
    "train.sensitivities": "Sensitivity",
    "train.sensitivity": "sensitivity",
    "train.sparsifier": "CoupledSparsifier",
    "train.trainer": "EcoSpaTrainer",
    "vocabulary.trim": "Trimmed trim_vocabulary",
    "api": "compile diff",
    "plan": "Plan",
}
"""The names of each module, which is imported when one of them is first used: torch alone takes a second."""

_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package."""
    if name in _HOME:
        value = globals()[name] = getattr(_imported(f"{__name__}.{_HOME[name]}"), name)
        return value
    if name == "__version__":
        return import_module("importlib.metadata").version("ecospa-fx")
    spec = None if name.startswith("__") else find_spec(f"{__name__}.{name}")
    if spec is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if spec.submodule_search_locations is not None:  # a room, whose modules are reached through it, too
        for module in _HOMES:
            _imported(f"{__name__}.{module}")
    return _imported(spec.name)


def _imported(module: str) -> Any:
    """Import a module. Some libraries draw random numbers as they are imported, which a seeded program must not see."""
    before = random.getstate()
    try:
        return import_module(module)
    finally:
        random.setstate(before)


def __dir__() -> list[str]:
    """List the public names, whether or not they have been imported."""
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which `plan` is the function, although importing the module of that name binds it as well."""

    @property
    def plan(self) -> Any:
        """The function `ecospa_fx.plan`."""
        return self.__dict__["plan"] if "plan" in self.__dict__ else __getattr__("plan")

    @plan.setter
    def plan(self, value: Any) -> None:
        if not isinstance(value, ModuleType):
            self.__dict__["plan"] = value

    @plan.deleter
    def plan(self) -> None:
        del self.__dict__["plan"]

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what imports the package: libraries that send functions to other processes pickle modules by class."""
        return import_module, (self.__name__,)


modules[__name__].__class__ = _Package
