"""ecospa_fx: make any neural network smaller while it trains.

>>> model = ecospa_fx.compile(model)
>>> trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5)
"""

from . import errors, logs
from .api import compile, couplings, diff, plan, shrink
from .checkpoint import load, resume, save
from .constraints import Constraints
from .coupling import Coupling, Member, Refusal
from .cut import Cut, cut_gguf
from .diff import ModuleDiff
from .estimator import CoupledEstimator
from .explanation import Explanation, explain
from .grams import Grams
from .latency import Latency
from .optimizers import state_rule
from .outgoing import export
from .plan import Plan
from .pretrained import from_pretrained, save_pretrained
from .restore import restore
from .rewire import rewire
from .rotation import Rotation, rotate
from .shrinkable import ShrinkableLinear
from .sparsifier import CoupledSparsifier
from .summary import Summary, summary
from .trainer import EcoSpaTrainer
from .unshrunk import save_unshrunk
from .verification import Verification, verify
from .watch import Watch

__all__ = [
    "Constraints",
    "CoupledEstimator",
    "CoupledSparsifier",
    "Coupling",
    "Cut",
    "EcoSpaTrainer",
    "Explanation",
    "Grams",
    "Latency",
    "Member",
    "ModuleDiff",
    "Plan",
    "Refusal",
    "Rotation",
    "ShrinkableLinear",
    "Summary",
    "Verification",
    "Watch",
    "compile",
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
    "shrink",
    "state_rule",
    "summary",
    "verify",
]

logs.read_environment()
