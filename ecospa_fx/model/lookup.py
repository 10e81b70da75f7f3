"""Look-up: the state, regions and couplings of a compiled model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ecospa_fx.arguments import MODULE, takes
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import CaptureError, EcoSpaError, NoInputsError, OptimizerError, WrapperError
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.tensors import named_tensors, parameters_of
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.fsdp2 import reshard
from ecospa_fx.ranks.shards import is_sharded
from ecospa_fx.ranks.wrappers import looks_inside

from .compiled import MODEL, REGION, CompiledModel
from .region import Region


def compiled_state(model: nn.Module) -> CompiledModel:
    """Return the state of a compiled model, whether it has been called or not.

    Raises:
        EcoSpaError: the model is not compiled; the message names what is, in it or around it.
    """
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    if compiled is not None:
        return compiled
    kind = type(model).__name__
    inside = [(name, each) for name, each in model.named_modules() if MODEL in each.__dict__]
    if inside:
        names = ", ".join(f"`{name}` ({type(each).__name__})" for name, each in inside[:3])
        raise EcoSpaError(
            f"{kind} is not compiled, but {names} in it is: pass that, model.get_submodule({inside[0][0]!r}), and not "
            f"the {kind} around it"
        )
    if REGION in model.__dict__:
        raise EcoSpaError(
            f"{kind} is `{model.__dict__[REGION].name}` of a compiled model: pass that model, and not a part of it"
        )
    raise EcoSpaError(f"{kind} is not compiled; call ecospa_fx.compile(model) first")


def state_of(model: nn.Module) -> CompiledModel:
    """Return the state of a compiled and captured model.

    Raises:
        EcoSpaError: the model is not compiled, or weights were tied that have shrunk apart.
        NoInputsError: the model is compiled, and has not been called yet.
    """
    compiled = compiled_state(model)
    if not compiled.captured:
        raise NoInputsError(
            f"{type(model).__name__} is compiled but has not been called yet, so its couplings are not known; call it "
            "once, or compile it with example_inputs=(x,). Only its forward counts: what another method computes needs "
            "a module around it whose forward calls that"
        )
    compiled.follow(model)
    return compiled


def is_captured(model: nn.Module) -> bool:
    """Decide whether a model is compiled and has been called, so that its couplings are known."""
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    return compiled is not None and compiled.captured


def regions_of(model: nn.Module) -> dict[str, Region]:
    """Return the regions of a compiled model by name; none before its first call, unless it was loaded."""
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    return {} if compiled is None else compiled.regions


@takes(model=MODULE)
@looks_inside
def couplings(model: nn.Module) -> tuple[Coupling, ...]:
    """Return the couplings of a compiled model, at their sizes now.

    Raises:
        NoInputsError: the model has not been called yet.
    """
    return state_of(model).couplings()


@takes(model=MODULE)
@looks_inside
def plan(model: nn.Module) -> Plan:
    """Return a copy of the plan: the entries of the original model that are left.

    Raises:
        EcoSpaError: the model is not compiled.
    """
    return compiled_state(model).plan.copy()


def try_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a call that changes nothing in a model but the graphs that it has.

    Raises:
        CaptureError: the model cannot be called so.
    """
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    loaded = compiled is not None and compiled.regions and not compiled.captured and compiled.execution == "module"
    try:
        with isolated(model):
            if compiled is not None and loaded:  # it runs its own Python, and a call without gradients captures nothing
                compiled.capture_again(model, args, kwargs)
            else:
                with torch.no_grad():
                    model(*args, **kwargs)
    except EcoSpaError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise CaptureError(
            f"{type(model).__name__} cannot be called with these inputs, it fails with {type(error).__name__}: {line}"
        ) from error


def check_ready(model: nn.Module) -> None:
    """Refuse a model whose parameters have no sizes yet, or can take no gradients.

    Raises:
        CaptureError: it has such parameters.
    """
    check_sizes(model)
    for name, parameter in parameters_of(model):
        if parameter.is_inference():
            raise CaptureError(
                f"`{name}` of {type(model).__name__} was made in torch.inference_mode, where no gradients are known; "
                "make the model outside of it"
            )


def check_sizes(model: nn.Module) -> None:
    """Refuse a model whose parameters have no sizes yet.

    Raises:
        CaptureError: it has such parameters.
    """
    for name, parameter in parameters_of(model):
        if is_lazy(parameter):
            raise CaptureError(
                f"`{name}` of {type(model).__name__} has no sizes before the first call of its lazy layer; call the "
                "model once before"
            )


def check_values(model: nn.Module, what: str) -> None:
    """Refuse a model on the meta device.

    Raises:
        EcoSpaError: it has no values.
    """
    if any(p.is_meta for p in model.parameters()):
        raise EcoSpaError(f"{type(model).__name__} is on the meta device and has no values to {what}")


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse a model whose weights lie on several ranks.

    Raises:
        WrapperError: they do.
    """
    reshard(model)
    for name, tensor in named_tensors(model).items():
        if is_sharded(tensor):
            raise WrapperError(
                f"`{name}` of {type(model).__name__} is sharded over ranks, and {what} takes whole weights. Gather "
                "them on rank 0, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
                "torch.distributed.checkpoint.state_dict, or save it by all ranks, ecospa_fx.save, and load it in one "
                "process; see docs/distributed.md"
            )


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that holds none of the model's parameters.

    Raises:
        OptimizerError: it holds none.
    """
    reshard(model)
    of_model = {id(p) for p in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in of_model for p in parameters):
        raise OptimizerError(
            f"this {type(optimizer).__name__} holds {len(parameters)} parameters, none of them of this "
            f"{type(model).__name__}; pass the one made from model.parameters()"
        )
