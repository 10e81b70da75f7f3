"""Verification: the numeric proof that removal equals masking, coupling by coupling and all together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.arguments import CALL, MODULE, WHOLE, takes
from ecospa_fx.errors import NoInputsError, VerificationError
from ecospa_fx.model.full_size import unshrunk
from ecospa_fx.model.joint_offers import atoms_at_edges
from ecospa_fx.model.lookup import check_values, plan, regions_of, state_of, try_call
from ecospa_fx.model.region import Region
from ecospa_fx.model.whole import held_whole
from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.axes.selection import Selected, entries, per_context_or_shared, whole
from ecospa_fx.passes.capture.record import record
from ecospa_fx.passes.graph.tensors import dequantized, join, named_tensors
from ecospa_fx.passes.rewrite.verify import Comparison, compare
from ecospa_fx.ranks.wrappers import looks_inside
from ecospa_fx.text import plural

from .explanation import example_call


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        by_coupling: a comparison per coupling alone, and `all of <region>` per region for all its couplings together. A
            coupling across regions is compared in each of them, with what goes in and comes out.
    """

    by_coupling: dict[str, Comparison]

    @property
    def ok(self) -> bool:
        """True if something was compared, and every comparison is within tolerance."""
        return bool(self.by_coupling) and all(comparison.ok for comparison in self.by_coupling.values())

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest error.

        Raises:
            VerificationError: nothing was compared.
        """
        if not self.by_coupling:
            raise VerificationError("nothing was compared, so no comparison is the worst")
        return max(self.by_coupling.values(), key=lambda c: max(c.output_error, c.gradient_error))

    def __str__(self) -> str:
        if not self.by_coupling:
            return "NOT exact: nothing was compared"
        verdict = "exact" if self.ok else "NOT exact"
        worst = self.worst
        return (
            f"{verdict}: {len(self.by_coupling)} comparisons of shrunk with masked, worst {worst.coupling}: output "
            f"{worst.output_error:.1e}, gradient {worst.gradient_error:.1e} (tolerance {worst.tolerance:.0e})"
        )

    def raise_if_failed(self) -> None:
        """Raise if any comparison failed.

        Raises:
            VerificationError: names every coupling that failed.
        """
        if not self.by_coupling:
            raise VerificationError("nothing was compared")
        failed = [c for c in self.by_coupling.values() if not c.ok]
        if failed:
            raise VerificationError(
                "; ".join(
                    f"`{c.coupling}` with {c.removed} entries removed differs from masking: output "
                    f"{c.output_error:.1e}, gradient {c.gradient_error:.1e} of {c.worst_gradient or 'nothing'}"
                    for c in failed
                )
            )


@takes(model=MODULE, **CALL, seed=WHOLE)
@looks_inside
def verify(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Verification:
    """Check numerically that shrinking equals masking, for each coupling alone and for all of a region together.

    Works on a copy of every tensor, at original sizes and in eval mode; the model is left as it is. About half of each
    coupling is removed, at random, and another half in each context (head) where it may differ; all of one that has no
    entry left. Of a model that FSDP2
    shards every rank must call this, and holds all weights meanwhile.

    Args:
        model: a compiled model.
        example_inputs: positional arguments of a call; by default those that the model itself offers.
        example_kwargs: keyword arguments of a call.
        seed: seed of the random selections, and of the noise that replaces entries removed earlier.

    Raises:
        NoInputsError: no inputs are given, and the model neither offers any nor can be called without.
        VerificationError: the call runs no region of the model, so that there is nothing to compare.
    """
    plan(model)  # raises where the model is not compiled
    args, kwargs = _arguments(model, example_inputs, example_kwargs)
    check_values(model, "compare")
    modes = {module: module.training for module in model.modules()}
    try:
        # Dropout would draw other masks at other sizes; entry by entry, train and eval mode agree.
        model.eval()
        with held_whole(model, regions_of(model)):
            try_call(model, args, kwargs)  # captures regions that have not been called so far
            results = sorted(comparisons(model, args, kwargs, seed), key=lambda c: c.coupling.startswith("all of "))
        if not results:
            number = plural(len(state_of(model).regions), "region")
            raise VerificationError(
                f"this call of {type(model).__name__} runs none of its {number}, so nothing was compared; pass the "
                "example_inputs of a call that does"
            )
        return Verification({c.coupling: c for c in results})
    finally:
        for module, training in modes.items():
            module.training = training


def _arguments(
    model: nn.Module, inputs: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        return example_call(model, inputs or None, kwargs or None)
    except NoInputsError:
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise
        return (), {}


def comparisons(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> Iterator[Comparison]:
    """Iterate over comparisons as they are made: the couplings of a region together, then each alone.

    Args:
        model: a compiled model, in eval mode.
        args: positional arguments of a call.
        kwargs: keyword arguments of that call.
        seed: as for `verify`.
    """
    compiled = state_of(model)
    generator = torch.Generator().manual_seed(seed)
    offered = {coupling.name for coupling in compiled.couplings()}
    halves = {
        joint.name: _half(Atom(0, joint.size), None, generator)
        for joint in compiled.state.joints
        if joint.name in offered
    }
    calls = record(model, args, kwargs, set(compiled.regions))
    for name, region in compiled.regions.items():
        if name not in calls:
            continue
        module = model.get_submodule(name)
        program, inputs = region.program_for(module, *calls[name])
        tensors = _originals(region, module, generator)
        axis_facts = program.axis_facts
        of_program = {c.key: c for c in region.discovery_of(program).couplings}
        couplings = [of_program[c.key] for c in region.naming_graph.discovery.couplings if c.key in of_program]
        kept = {c.atom: _half(c.atom, c.context, generator, c.least) for c in couplings}
        gone = [atom for atom, choice in region.kept(program).items() if not entries(choice)]
        kept |= {c.atom: ~whole(c.atom) for c in couplings if c.last_stays is None and c.atom in gone}
        across = {
            joint.name: dict.fromkeys(atoms_at_edges(axis_facts, joint), halves[joint.name])
            for joint in compiled.state.joints
            if joint.name in halves
        }
        kept |= {atom: half for atoms in across.values() for atom, half in atoms.items()}
        yield compare(axis_facts, kept, module, tensors, inputs, f"all of {name or 'the model'}")
        for coupling in couplings:
            alone = {coupling.atom: kept[coupling.atom]}
            yield compare(axis_facts, alone, module, tensors, inputs, join(name, coupling.name))
        for joint, selected in across.items():
            if selected:
                yield compare(axis_facts, selected, module, tensors, inputs, f"{joint} in {name}")


def _half(atom: Atom, context: Atom | None, generator: torch.Generator, least: int = 1) -> Selected:
    """Select a random half of the entries of `atom`, or as many as it needs; another in each entry of its context."""
    rows = torch.stack([torch.randperm(atom.size, generator=generator) for _ in range(context.size if context else 1)])
    masks = rows < max(least, atom.size // 2)
    return masks[0] if context is None else per_context_or_shared(context, masks, whole(context))


def _originals(region: Region, module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the parameters and buffers of a region at original sizes, removed entries filled with noise."""
    plan = region.state.plan
    tensors = {}
    for name, held in named_tensors(module).items():
        tensor = dequantized(held)
        full = join(region.name, name)
        if full in plan.original_shapes:
            original = unshrunk(tensor, plan, full).detach()
            removed = ~unshrunk(torch.ones_like(tensor), plan, full).bool()
            scale = tensor.detach().abs().mean() if tensor.numel() else 1.0
            noise = torch.randn(original.shape, generator=generator).to(original) * scale
            tensor = torch.where(removed, noise.abs(), original)
        tensors[name] = tensor
    return tensors
