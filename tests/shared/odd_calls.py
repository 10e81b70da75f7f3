"""Odd calls of the public functions: right arguments, of which one or two are replaced by something else.

Whatever is raised must be an error of ours, and everything as before: weights, buffers, gradients, settings, plan,
generators, outputs. What only looks must change nothing in any case.
"""

from __future__ import annotations

import copy
import random
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.observers import Observers


class Tiny(nn.Module):
    """A bit of everything: a buffer that train mode updates, dropout, a switch among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 8)
        self.c, self.drop = nn.Linear(8, 3), nn.Dropout(0.1)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        y = self.c(self.drop(self.b(self.norm(self.a(x)).relu()).relu()))
        return 2 * y if double else y


X = torch.linspace(-1, 1, 20).reshape(5, 4)
STATES = ("compiled", "shrunk", "waiting", "plain", "module", "meta", "restored")


@cache
def _template(state: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Tiny()
    if state in ("compiled", "shrunk", "module", "restored"):
        execution: Any = "module" if state == "module" else "graph"
        ecospa_fx.compile(model, example_inputs=(X,), execution=execution)
        model.eval()(X)
        model.train()(X)
    if state in ("shrunk", "restored"):
        ecospa_fx.shrink(model, {"ffn": torch.arange(3)})
    if state == "restored":
        ecospa_fx.restore(model)
    if state == "waiting":
        ecospa_fx.compile(model)
    if state == "meta":
        model = ecospa_fx.compile(Tiny().to("meta"), example_inputs=(X.to("meta"),))
    return model


@dataclass
class World:
    """One model in some state, and what calls may be made with."""

    state: str
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    x: Tensor = field(init=False)
    directory: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(_template(self.state))
        self.x = X.to("meta") if self.state == "meta" else X
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.directory = Path(tempfile.mkdtemp(prefix="odd"))
        weakref.finalize(self, shutil.rmtree, self.directory, True)
        if self.state not in ("waiting", "meta"):
            self.model(self.x).square().sum().backward()
            self.optimizer.step()
            self.model.a.bias.requires_grad_(False)

    def other(self) -> nn.Module:
        """Another model of the same class, compiled."""
        return copy.deepcopy(_template("compiled"))

    def trainer(self, **options: Any) -> Any:
        return ecospa_fx.EcoSpaTrainer(self.model, self.optimizer, target=0.6, **options)

    def keep(self) -> dict[Any, Tensor]:
        return {"ffn": torch.arange(0, 3 if self.state in ("shrunk", "restored") else 6, 2)}

    def snapshot(self) -> dict[str, Any]:
        """All that must be as before, by value."""
        tensors: dict[str, Any] = {}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            tensors[name] = (id(tensor), tensor.requires_grad, _bits(tensor), _bits(tensor.grad), tensor.stride())
        compiled = self.model.__dict__.get(MODEL)
        return {
            "tensors": tensors,
            "classes": [type(m) for m in self.model.modules()],
            "settings": [
                {k: v for k, v in m.__dict__.items() if isinstance(v, (int, float, str, tuple))}
                for m in self.model.modules()
            ],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in self.model.modules()
            ],
            "plan": None if compiled is None else compiled.plan.to_json(),
            "observers": None
            if compiled is None
            else [
                len(region.watcher.observers) if isinstance(region.watcher, Observers) else 0
                for region in compiled.regions.values()
            ],
            "moments": {k: _bits(v) for s in self.optimizer.state.values() for k, v in s.items()},
            "generators": (random.getstate(), _numpys(), _bits(torch.get_rng_state())),
            "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        }

    def outputs(self) -> list[Any]:
        """What the model gives, in both modes; it is not changed by that."""
        if self.state in ("waiting", "meta"):
            return []
        results = []
        training = self.model.training
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        with torch.random.fork_rng(), torch.no_grad():
            for mode in (False, True):
                torch.manual_seed(0)
                results.append(_bits(self.model.train(mode)(self.x)))
        self.model.train(training)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        return results


def _numpys() -> tuple[Any, ...]:
    name, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return name, numbers.tobytes(), *rest


def _bits(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.detach()
    return tensor.shape, tensor.dtype, None if tensor.is_meta else tensor.contiguous().numpy().tobytes()


class Odd:
    """An object that is nothing."""

    def __repr__(self) -> str:
        return "Odd()"


VALUES: dict[str, Any] = {  # wrong in most places, by a name to find them again; a function is called with the world
    "None": None, "0": 0, "-1": -1, "1.5": 1.5, "2": 2, "True": True, "nan": float("nan"), "inf": float("inf"),
    "huge": 10**30, "empty text": "", "no such name": "nope", "a name": "a", "bytes": b"x",
    "empty list": lambda w: [], "empty tuple": (), "empty dict": lambda w: {}, "set": lambda w: {1},
    "list of texts": lambda w: ["nope", "a"], "list of None": lambda w: [None],
    "dict of numbers": lambda w: {"nope": 1}, "dict of odd keys": lambda w: {3: None, None: 2},
    "Odd": lambda w: Odd(), "class": lambda w: Odd, "function": lambda w: lambda *_, **__: None,
    "raises": lambda w: _raises, "array": lambda w: np.arange(3), "tensor": lambda w: torch.arange(3),
    "float tensor": lambda w: torch.ones(5, 4), "scalar tensor": lambda w: torch.tensor(0.5),
    "empty tensor": lambda w: torch.empty(0), "no rows": lambda w: torch.empty(0, 4),
    "one row": lambda w: torch.ones(1, 4), "nan tensor": lambda w: torch.full((5, 4), float("nan")),
    "meta tensor": lambda w: torch.ones(5, 4, device="meta"), "double": lambda w: torch.ones(5, 4).double(),
    "wrong width": lambda w: torch.ones(5, 3), "inputs": lambda w: (torch.ones(5, 4),),
    "empty inputs": lambda w: (torch.empty(0, 4),), "two inputs": lambda w: (torch.ones(5, 4), torch.ones(5, 4)),
    "meta inputs": lambda w: (torch.ones(5, 4, device="meta"),), "inputs of None": (None,),
    "switch": lambda w: {"double": True}, "unknown keyword": lambda w: {"nope": 1},
    "unsorted": lambda w: {"ffn": torch.tensor([2, 0])}, "duplicates": lambda w: {"ffn": torch.tensor([1, 1])},
    "out of range": lambda w: {"ffn": torch.tensor([0, 99])}, "negative": lambda w: {"ffn": torch.tensor([-1, 0])},
    "empty selection": lambda w: {"ffn": torch.tensor([], dtype=torch.long)},
    "floats": lambda w: {"ffn": torch.tensor([0.0, 1.0])}, "mask": lambda w: {"ffn": torch.tensor([True, False, True])},
    "a list": lambda w: {"ffn": [0, 1]}, "rows": lambda w: {"ffn": torch.zeros(2, 2).long()},
    "meta selection": lambda w: {"ffn": torch.arange(2, device="meta")},
    "unknown coupling": lambda w: {"nope": torch.arange(2)},
    "coupling of another": lambda w: {_foreign(w): torch.arange(2)},
    "number as coupling": lambda w: {0: torch.arange(2)}, "other model": lambda w: w.other(),
    "plain layer": lambda w: nn.Linear(2, 2), "empty module": lambda w: nn.Module(), "model class": lambda w: Tiny,
    "optimizer of another": lambda w: _optimizer(w.other()), "optimizers": lambda w: [_optimizer(w.other()), 3],
    "coupling": lambda w: _foreign(w), "couplings": lambda w: [_foreign(w)],
    "missing path": lambda w: w.directory / "nope" / "nope", "a file": lambda w: _file(w),
    "plan": lambda w: ecospa_fx.Plan(),
    "trainer of another": lambda w: ecospa_fx.EcoSpaTrainer(other := w.other(), _optimizer(other)),
    "grams of another": lambda w: ecospa_fx.Grams(w.other()),
}  # fmt: skip
NAMES = tuple(VALUES)


def odd_value(name: str, world: World) -> Any:
    """Make a value that is wrong in most places."""
    value = VALUES[name]
    if not callable(value):
        return value
    with torch.random.fork_rng():
        return value(world)


def _foreign(world: World) -> Any:
    return ecospa_fx.couplings(world.other())[0]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _raises(*_: Any, **__: Any) -> Any:
    raise ecospa_fx.errors.ShrinkError("as a callback of a user may")


def _file(world: World) -> Path:
    path = world.directory / "file"
    path.write_text("{}")
    return path


@dataclass(frozen=True)
class Call:
    """A public function and right arguments for it.

    Attributes:
        make: returns the function and its arguments by name, first the positional ones by number.
        looks: it changes nothing, also where it succeeds.
        trains: it runs the model, whose running statistics have moved by the time that a wrong batch shows.
    """

    make: Callable[[World], tuple[Callable[..., Any], dict[Any, Any]]]
    looks: bool = False
    trains: bool = False


def right(looks: bool, function: Any, *args: Any, **kwargs: Any) -> Call:
    """Make a call; arguments that are functions of a world are made for it."""

    def make(world: World) -> tuple[Callable[..., Any], dict[Any, Any]]:
        given = {**dict(enumerate(args)), **kwargs}
        return function, {name: value(world) if callable(value) else value for name, value in given.items()}

    return Call(make, looks)


def model(world: World) -> nn.Module:
    return world.model


def call(world: World) -> tuple[Tensor]:
    return (world.x,)


def nothing(world: World) -> dict[str, Any]:
    return {}


def method(
    make: Callable[[World], Any], name: str, *args: Any, looks: bool = True, trains: bool = False, **kwargs: Any
) -> Call:
    """Make a call of a method of what `make` returns."""

    def bound(world: World) -> tuple[Callable[..., Any], dict[Any, Any]]:
        given = {**dict(enumerate(args)), **kwargs}
        arguments = {key: value(world) if callable(value) else value for key, value in given.items()}
        owner = make(world)
        return getattr(owner, name), arguments

    return Call(bound, looks, trains)


@cache
def _explanation() -> Any:
    return ecospa_fx.explain(_template("plain"), example_inputs=(X,))


def explained(world: World) -> Any:
    return _explanation()


CALLS: dict[str, Call] = {
    "compile": right(False, ecospa_fx.compile, model, example_inputs=call, example_kwargs=nothing, regions="auto",
                     experiments=False, execution="graph"),
    "explain": right(True, ecospa_fx.explain, model, example_inputs=call, example_kwargs=nothing, regions="root",
                     experiments=False, execution="graph"),
    "couplings": right(True, ecospa_fx.couplings, model),
    "plan": right(True, ecospa_fx.plan, model),
    "diff": right(True, ecospa_fx.diff, model),
    "summary": right(True, ecospa_fx.summary, model, example_inputs=call, example_kwargs=nothing, depth=2),
    "verify": right(True, ecospa_fx.verify, model, example_inputs=call, example_kwargs=nothing, seed=1),
    "shrink": right(False, ecospa_fx.shrink, model, lambda w: w.keep(), optimizer=lambda w: w.optimizer, also=(),
                    absorb=None),
    "compress": right(False, ecospa_fx.compress, model, lambda w: [X] * 4, 0.7, among="all", kinds=None,
                      cost="parameters", uniform=None, loss=None, steps=1, heal=None),
    "restore": right(False, ecospa_fx.restore, model, example_inputs=call, example_kwargs=nothing),
    "rewire": right(False, ecospa_fx.rewire, model, lambda w: lambda m: m),
    "rotate": right(False, ecospa_fx.rotate, model, None, keep=None, grams=None, optimizer=lambda w: w.optimizer,
                    also=()),
    "save": right(True, ecospa_fx.save, model, lambda w: w.directory / "run", optimizer=lambda w: w.optimizer,
                  trainer=None, scheduler=None, scaler=None, also=None),
    "load": right(True, ecospa_fx.load, lambda w: _saved(w), lambda w: Tiny, device=None),
    "resume": right(False, ecospa_fx.resume, lambda w: _saved(w), model, optimizer=lambda w: w.optimizer, trainer=None,
                    scheduler=None, scaler=None, also=None, rng=False),
    "export": right(True, ecospa_fx.export, model, call, nothing, dynamic_shapes=None),
    "save_pretrained": right(True, ecospa_fx.save_pretrained, model, lambda w: w.directory / "hf"),
    "save_unshrunk": right(True, ecospa_fx.save_unshrunk, model, lambda w: w.directory / "hf", mark=False),
    "from_pretrained": right(True, ecospa_fx.from_pretrained, lambda w: w.directory / "hf"),
    "cut_gguf": right(True, ecospa_fx.cut_gguf, lambda w: w.directory / "a", lambda w: w.directory / "b", zeros=False,
                      per_layer=False, heads=False, round_to=1, architecture=None),
    "trainer": right(True, ecospa_fx.EcoSpaTrainer, model, lambda w: w.optimizer, target=0.5, cost="parameters",
                     among="all", policy="paper", preset="pretrain", top_k=None, theta=None, interval=100, start=0,
                     end=None,
                     shape="linear", shrinks=None, unit="steps", score="fisher", index_score="norms", decay=None,
                     window=None, seed=0, spike=0.1, min_keep=1, round_to=1, head_dims="per_head",
                     equal_head_dims=False, frozen=(), before_shrink=None, also=(), absorb=None, rotate=None),
    "adaptive trainer": right(True, ecospa_fx.EcoSpaTrainer, model, lambda w: w.optimizer, target=0.5,
                              policy="adaptive", end=50, start=1, shrinks=3, absorb=None, rotate=None, unit="steps"),
    "trainer.step": method(lambda w: w.trainer(), "step", looks=False, loss=None),
    "trainer.load_state_dict": method(lambda w: w.trainer(), "load_state_dict", lambda w: w.trainer().state_dict()),
    "estimator": right(True, ecospa_fx.CoupledEstimator, model, "fisher", decay=None, window=None,
                       optimizer=lambda w: w.optimizer, seed=0),
    "estimator.accumulate": method(lambda w: ecospa_fx.CoupledEstimator(w.model), "accumulate"),
    "estimator.entries": method(lambda w: ecospa_fx.CoupledEstimator(w.model), "entries",
                                 lambda w: ecospa_fx.couplings(w.model)[0], by_context=False),
    "estimator.attach_backward": method(lambda w: ecospa_fx.CoupledEstimator(w.model), "attach_backward", 1),
    "estimator.load_state_dict": method(lambda w: ecospa_fx.CoupledEstimator(w.model), "load_state_dict",
                                         lambda w: ecospa_fx.CoupledEstimator(w.model).state_dict()),
    "sparsifier": right(True, ecospa_fx.CoupledSparsifier, model, target=0.5, top_k=0.3, theta=0.9, constraints=None,
                        cost="parameters", among="all", optimizers=()),
    "sparsifier.decide": method(lambda w: ecospa_fx.CoupledSparsifier(w.model), "decide", lambda w: dict.fromkeys(
        ecospa_fx.couplings(w.model), 1.0)),
    "constraints": right(True, ecospa_fx.Constraints, min_keep=1, round_to=1, head_dims="per_head",
                         equal_head_dims=False, frozen=()),
    "grams": right(True, ecospa_fx.Grams, model, rows=None, ridge=1e-3, training=False, mask="attention_mask"),
    "latency": right(True, ecospa_fx.Latency, call, nothing, repeats=2, clock=lambda w: time.perf_counter,
                     measure=None),
    "watch": right(True, ecospa_fx.Watch, lambda w: w.trainer(), steps=5, lines=None, tensorboard=None, multiple=None),
    "watch.step": method(lambda w: ecospa_fx.Watch(w.trainer()), "step", 0.5, looks=False),
    "why": method(explained, "why", "a.weight", "b.weight"),
    "why_not": method(explained, "why_not", "c"),
    "explanation.report": method(explained, "report", lambda w: w.directory / "r.html", training=None),
    "savings": method(explained, "savings"),
    "coupling.why": method(lambda w: ecospa_fx.couplings(w.model)[0], "why", "a.weight", "b.weight"),
    "plan.from_json": right(True, ecospa_fx.Plan.from_json, lambda w: ecospa_fx.Plan().to_json()),
    "plan.mask": method(lambda w: ecospa_fx.plan(w.model), "mask", "a.weight", 0),
    "plan.shape": method(lambda w: ecospa_fx.plan(w.model), "shape", "a.weight"),
    "logs": right(True, ecospa_fx.logs.set_logs, "-capture"),
    "state_rule": right(True, ecospa_fx.state_rule, "nope.NoOptimizer"),
    "score_named": right(True, ecospa_fx.scores.score_named, "fisher"),
}  # fmt: skip


def _saved(world: World) -> Path:
    path = world.directory / "saved"
    if not path.exists():
        source = world.model if world.state in ("compiled", "shrunk", "module") else _template("compiled")
        ecospa_fx.save(source, path)
    return path


THEIRS = {("rewire", 1), ("load", 1), ("latency", "measure")}  # functions of the caller, whose own errors come through
LATE = {("compress", "heal")}  # and of these, those that are called when the model has changed already
