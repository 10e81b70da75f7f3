"""Plans as JSON: readable, back to the same plan, and refused word for word where they contradict themselves."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ecospa_fx
from ecospa_fx import errors

UP = "up.weight"


@st.composite
def plans(draw):
    plan = ecospa_fx.Plan()
    for name in draw(st.lists(st.text(min_size=1), unique=True, max_size=4)):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        dims = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
        plan.original_shapes[name] = shape
        for dim in dims:
            positions = draw(st.sets(st.integers(0, shape[dim] - 1)))  # none where all have gone
            plan.kept[name, dim] = torch.tensor(sorted(positions), dtype=torch.long)
    return plan


@given(plans())
def test_a_plan_comes_back(plan):
    assert ecospa_fx.Plan.from_json(plan.to_json()) == plan


def test_a_plan_is_readable():
    plan = ecospa_fx.Plan({(UP, 0): torch.tensor([0, 2, 11])}, {UP: (12, 8)})
    assert json.loads(plan.to_json()) == {
        "format": 1,
        "original_shapes": {UP: [12, 8]},
        "axes": [{"parameter": UP, "dim": 0, "kept": [0, 2, 11]}],
    }


def plan(shape=(12, 8), dim=0, kept=(0, 2), **more):
    document = {"format": 1, "original_shapes": {UP: shape}, "axes": [{"parameter": UP, "dim": dim, "kept": kept}]}
    return json.dumps(document | more)


NOT_INCREASING = f"the plan's positions of `{UP}` dim 0 are not increasing within 0..11"
NO_SHAPE = "the plan's original shape of `up.weight`, {}, is not a shape of a tensor"
AXIS = {"parameter": UP, "dim": 0, "kept": [0, 1]}
REFUSED = {
    "beyond": (plan(kept=[3, 12]), NOT_INCREASING),
    "negative position": (plan(kept=[-1, 3]), NOT_INCREASING),
    "twice": (plan(kept=[3, 3]), NOT_INCREASING),
    "unsorted": (plan(kept=[3, 2]), NOT_INCREASING),
    "nothing, as a word": (plan(kept="none"), NOT_INCREASING),
    "booleans": (plan(kept=[False, True]), NOT_INCREASING),
    "numbers with a point": (plan(kept=[0.0, 1.0]), NOT_INCREASING),
    "one axis twice": (plan(axes=[AXIS, AXIS]), f"the plan keeps entries of `{UP}` dim 0 twice"),
    "one axis twice, spelt apart": (
        plan(axes=[AXIS, {**AXIS, "dim": False}]),
        f"the plan keeps entries of `{UP}` dim False, but has no original shape for it",
    ),
    "no such dim": (plan(dim=2), f"the plan keeps entries of `{UP}` dim 2, but has no original shape for it"),
    "negative dim": (plan(dim=-1), f"the plan keeps entries of `{UP}` dim -1, but has no original shape for it"),
    "dim no number": (plan(dim="0"), f"the plan keeps entries of `{UP}` dim 0, but has no original shape for it"),
    "no shape": (
        plan(original_shapes={}), f"the plan keeps entries of `{UP}` dim 0, but has no original shape for it",
    ),
    "negative size": (plan((-12, 8)), NO_SHAPE.format([-12, 8])),
    "size with a point": (plan((12.7, 8)), NO_SHAPE.format([12.7, 8])),
    "size a text": (plan(("12", 8)), NO_SHAPE.format(["12", 8])),
    "shape a text": (plan("12"), NO_SHAPE.format("12")),
    "infinite": (plan().replace("12", "1e999"), NO_SHAPE.format("[inf, 8]")),
    "more than any memory": (plan((2**62, 8)), NO_SHAPE.format([2**62, 8])),
    "more than a number": (plan((0, 10**30)), NO_SHAPE.format([0, 10**30])),
    "other version": (plan(format=2), "the plan has format 2; this version reads 1"),
    "no object": ("[]", "this is not a plan: TypeError: list indices must be integers or slices, not str"),
    "no JSON": ("", "the plan cannot be read: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    "no number": ('{"format": NaN}', "the plan cannot be read: ValueError: NaN is not a number in JSON"),
    "a name twice": (
        '{"format": 1, "original_shapes": {"a": [2], "a": [3]}}',
        "the plan cannot be read: ValueError: the key 'a' appears twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_contradicts_itself_is_refused(how):
    text, words = REFUSED[how]
    with pytest.raises(errors.CheckpointError) as caught:
        ecospa_fx.Plan.from_json(text)
    assert str(caught.value) == words


def test_endless_nesting_is_refused():
    with pytest.raises(errors.CheckpointError, match="the plan cannot be read: RecursionError: "):
        ecospa_fx.Plan.from_json("[" * 10**5)


def test_a_plan_that_is_read_within_a_device_context_has_values():
    plan = ecospa_fx.Plan({("w", 0): torch.tensor([0, 2])}, {"w": (4, 3)})
    with torch.device("meta"):
        read = ecospa_fx.Plan.from_json(plan.to_json())
        assert read.mask("w", 0).tolist() == [True, False, True, False] and read.mask("w", 1).all()
    assert read == plan
