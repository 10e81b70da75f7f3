"""Document: the content of a report's page, as plain values: modules, couplings with proofs, refusals, savings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.why import Path
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.see.findings import Findings
from ecospa_fx.see.fold import Fold, fold_couplings, fold_refusals
from ecospa_fx.see.graphs import COLOURS
from ecospa_fx.see.savings import Savings
from ecospa_fx.see.tables import size_of
from ecospa_fx.text import size as in_words


def document_of(findings: Findings) -> dict[str, Any]:
    """Collect everything that the page shows."""
    savings = findings.savings()
    folds = fold_couplings(findings.couplings)
    proof_of = {coupling.name: i for i, fold in enumerate(folds) for coupling in fold.couplings}
    return {
        "title": findings.title,
        "model": findings.model,
        "parameters": savings.parameters,
        "size": in_words(savings.bytes),
        "flops": savings.flops,
        "colours": COLOURS,
        "modules": _modules(findings),
        "couplings": [_coupling(c, savings, proof_of[c.name]) for c in findings.couplings],
        "proofs": [_proof(fold) for fold in folds],
        "refusals": [
            {"members": list(r.members), "size": r.size, "reasons": list(r.reasons), "times": times}
            for r, times in fold_refusals(findings.refusals)
        ],
        "missing": findings.missing_rules,
        "experiments": findings.experiments,
        "given_up": {name or "the model": why for name, why in findings.not_captured.items()},
        "figures": None,
        "latency": None,
    }


def _modules(findings: Findings) -> list[dict[str, Any]]:
    """List the modules in order, with the couplings (by number) and refusals along each dim of their parameters."""
    along: dict[str, dict[int, list[int]]] = {}
    for number, coupling in enumerate(findings.couplings):
        for member in coupling.members:
            numbers = along.setdefault(member.parameter, {}).setdefault(member.dim, [])
            if number not in numbers:
                numbers.append(number)
    refused: dict[str, dict[int, list[str]]] = {}
    for refusal in findings.refusals:
        for axis in refusal.members:
            parameter, _, dim = axis.rpartition("[")
            refused.setdefault(parameter, {}).setdefault(int(dim[:-1]), []).extend(refusal.reasons)
    parameters_of: dict[str, list[dict[str, Any]]] = {}
    for name, (shape, _) in findings.snapshot.tensors.items():
        module, _, tail = name.rpartition(".")
        dims = [
            {"size": size, "couplings": along.get(name, {}).get(i, []), "refused": refused.get(name, {}).get(i, [])}
            for i, size in enumerate(shape)
        ]
        parameters_of.setdefault(module, []).append(
            {"name": tail, "dims": dims, "tied": findings.snapshot.ties.get(name)}
        )
    return [
        {"path": path, "class": cls, "parameters": parameters_of.get(path, [])}
        for path, cls in findings.snapshot.modules.items()
    ]


def _coupling(coupling: Coupling, savings: Savings, proof: int) -> dict[str, Any]:
    saving = savings[coupling]
    return {
        "name": coupling.name,
        "kind": coupling.kind,
        "size": size_of(coupling),
        "linear": coupling.linear,
        "members": list(dict.fromkeys(str(member) for member in coupling.members)),
        "proof": proof,
        "entry": [saving.parameters, saving.bytes, saving.flops],
        "most": [saving.most_parameters, saving.most_bytes, saving.most_flops],
    }


def _proof(fold: Fold) -> dict[str, Any]:
    """Collect the paths of the first coupling of a fold, from each matrix to the next; the others have equal ones."""
    first = fold.couplings[0]
    names = list(dict.fromkeys(member.parameter for member in first.members if member.matrix))
    pairs = list(pairwise(names)) or [(names[0], names[0])] if names else []
    paths = []
    for a, b in pairs:
        try:
            paths.append(_path(first.why(a, b)))
        except NoCouplingError:  # one weight that is never multiplied by itself
            continue
    return {"of": first.name, "times": len(fold.couplings), "paths": paths}


def _path(path: Path) -> dict[str, Any]:
    steps = [{"op": s.op, "after": s.after, "because": s.because, "where": s.where, "code": s.code} for s in path.steps]
    return {"start": path.start, "end": path.end, "steps": steps}
