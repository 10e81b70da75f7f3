"""ecospa_fx: make any neural network smaller while it trains.

>>> model = ecospa_fx.compile(model)
>>> trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5)
"""

from .api import compile, couplings, plan, shrink
from .coupling import Coupling, Member, Refusal
from .plan import Plan

__all__ = ["Coupling", "Member", "Plan", "Refusal", "compile", "couplings", "plan", "shrink"]
from .verification import Verification, verify
__all__ += ["Verification", "verify"]
