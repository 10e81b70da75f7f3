"""ecospa_fx: make any neural network smaller while it trains.

>>> model = ecospa_fx.compile(model)
>>> trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5)
"""

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
from ecospa_fx.train.latency import Latency
from ecospa_fx.train.sparsifier import CoupledSparsifier
from ecospa_fx.train.trainer import EcoSpaTrainer

from . import errors, logs
from . import graphs as graphs
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
    "shrink",
    "state_rule",
    "summary",
    "verify",
]

logs.read_environment()
