"""Settings: the groups of a trainer's settings beside `Schedule`, `Constraints` and `CompensationSettings`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import nn
from torch.optim import Optimizer

from ecospa_fx.errors import TargetError
from ecospa_fx.model.cost import Cost
from ecospa_fx.score.estimator import CoupledEstimator
from ecospa_fx.score.scores import Score, ScoreFunction

from .latency import Latency
from .schedule import Schedule
from .targets import Target, check_target

Among = Literal["all", "prunable"]
Gradients = Literal["step", "optimizer", "backward"]
Preset = Literal["pretrain", "finetune"]
PolicyName = Literal["paper", "adaptive"]
AnyScore: TypeAlias = str | ScoreFunction | Score


class Defaults(NamedTuple):
    """The settings of a preset: the two shares of the paper's rule, see `DecisionSettings`, and its scores."""

    top_k: float
    theta: float
    score: str
    index_score: str


PRESETS: dict[Preset, Defaults] = {
    "pretrain": Defaults(0.3, 0.9, "fisher", "norms"),
    "finetune": Defaults(0.1, 0.95, "taylor_positions", "taylor_positions"),
}
"""Settings by the advice of the paper: from scratch its own; a model that is already trained loses less at a time.

In a trained model weights do not tell what flows through them: on SmolLM2-135M the paper's order of entries does worse
than a random one (docs/absorption.md), so that there it is activations and their gradients that decide.
"""


@dataclass(frozen=True)
class DecisionSettings:
    """How far a model shrinks, and by which shares at a time.

    Attributes:
        target: share of the model's original cost that remains at the end; or of the entries of kinds, see `Target`.
        cost: what that is a share of: `"parameters"`, `"flops"` or `"bytes"`, see `CostModel`; or a `Latency`.
        among: `"all"`, or `"prunable"`: the share is of what lies on some coupling; embeddings, say, do not count.
        top_k: share of the couplings that shrink at a sparsification step, the least important ones.
        theta: share of a coupling's score that is kept when it shrinks.

    Raises:
        TargetError: a share is out of range.
    """

    target: Target = 0.5
    cost: Cost | Latency = "parameters"
    among: Among = "all"
    top_k: float = PRESETS["pretrain"].top_k
    theta: float = PRESETS["pretrain"].theta

    def __post_init__(self) -> None:
        check_target(self.target)
        for name, value in (("top_k", self.top_k), ("theta", self.theta)):
            if not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise TargetError(f"{name}={value!r} is out of range; it is a share, above 0 and at most 1")

    def check(self) -> None:
        """Refuse options that do not exist.

        Raises:
            TargetError: naming the setting, its value and the options.
        """
        if not isinstance(self.cost, Latency):
            check_option("cost", self.cost, get_args(Cost))
        check_option("among", self.among, get_args(Among))
        if isinstance(self.target, Mapping) and (self.cost != "parameters" or self.among != "all"):
            raise TargetError(
                "a target of kinds is a share of their entries; leave cost= and among= out, or pass one number"
            )

    @property
    def latency(self) -> Latency | None:
        """The measurements that the cost is, where it is measured."""
        return self.cost if isinstance(self.cost, Latency) else None

    def described(self) -> dict[str, Any]:
        """Return plain values, to be written down."""
        cost = "latency" if isinstance(self.cost, Latency) else self.cost
        target = dict(self.target) if isinstance(self.target, Mapping) else self.target
        return {
            "target": target, "cost": cost, "among": self.among, "top_k": self.top_k, "theta": self.theta,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class ScoreSettings:
    """How couplings and their entries are scored; see `CoupledEstimator`.

    Attributes:
        score: importance of a coupling: a name, or a function of a weight and its gradient.
        index_score: order in which the entries of a coupling go: a score, or `"norms"`; or the scores of some kinds,
            the others by `"norms"`.
        decay: see `CoupledEstimator`.
        window: see `CoupledEstimator`.
        seed: of `"random"` scores.
    """

    score: AnyScore
    index_score: AnyScore | Mapping[str, AnyScore]
    decay: float | None = None
    window: int | None = None
    seed: int = 0

    def estimator(self, model: nn.Module, score: AnyScore, optimizers: Sequence[Optimizer]) -> CoupledEstimator:
        """Make an estimator of one of the two scores."""
        return CoupledEstimator(
            model, score, decay=self.decay, window=self.window, optimizer=optimizers, seed=self.seed
        )


def check_option(name: str, value: object, options: Collection[str]) -> None:
    """Refuse a value that is not one of the options.

    Raises:
        TargetError: naming the setting, its value and the options.
    """
    if not isinstance(value, str) or value not in options:
        raise TargetError(f"{name}={value!r} is none of {', '.join(map(repr, options))}")


def check_options(policy: PolicyName | None, preset: Preset, gradients: Gradients) -> None:
    """Refuse options of a trainer that do not exist.

    Raises:
        TargetError: naming the setting, its value and the options.
    """
    if policy is not None:
        check_option("policy", policy, get_args(PolicyName))
    check_option("preset", preset, PRESETS)
    check_option("gradients", gradients, get_args(Gradients))


def chosen_policy(
    policy: PolicyName | None, preset: Preset, schedule: Schedule, given: Mapping[str, object]
) -> PolicyName:
    """Return the policy of a trainer that is given none: in fine-tuning by a schedule `"adaptive"`, else the paper's.

    Args:
        policy: the policy, if one is given.
        preset: the preset.
        schedule: the schedule.
        given: settings of the paper's rule, None where they are not given.
    """
    if policy is not None:
        return policy
    ends = schedule.end is not None or schedule.shape == "one_shot"
    own = any(value is not None for value in given.values())
    return "adaptive" if preset == "finetune" and ends and not own else "paper"


def check_adaptive(schedule: Schedule, given: Mapping[str, object]) -> None:
    """Refuse settings that the adaptive policy does not read, or a schedule without an end.

    Args:
        schedule: the schedule.
        given: settings of the paper's rule, None where they are not given.

    Raises:
        TargetError: naming the setting.
    """
    own = {"score": PRESETS["pretrain"].score, "index_score": PRESETS["pretrain"].index_score}
    for name, value in given.items():
        if value is not None and not (isinstance(value, str) and value == own.get(name)):
            raise TargetError(f'policy="adaptive" weighs couplings and entries itself; leave {name}={value!r} out')
    if schedule.end is None and schedule.shape != "one_shot":
        raise TargetError('policy="adaptive" needs an end to be reached; pass end=')
