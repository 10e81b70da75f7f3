"""Bad input: one clear error of our own type each, and the model bit for bit as before."""

import copy

import pytest
import torch
from failing_assignments import fail_at
from torch import nn
from zoo_refused import centred

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.passes import rules


class MLP(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x, show_hidden=False):
        hidden = torch.relu(self.up(x))
        return (self.down(hidden), hidden) if show_hidden else self.down(hidden)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def snapshot(model, optimizer=None):
    """All there is of a model and an optimizer, by value, and the identity of its parameters and classes."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    moments = copy.deepcopy(optimizer.state_dict()) if optimizer else None
    return state, grads, [id(p) for p in model.parameters()], [type(m) for m in model.modules()], moments


def assert_untouched(model, before, optimizer=None):
    state, grads, identities, classes, moments = before
    after = snapshot(model, optimizer)
    assert identities == after[2]
    assert classes == after[3]
    assert state.keys() == after[0].keys() and all(torch.equal(state[k], after[0][k]) for k in state)
    assert all(
        (g is None) == (after[1][k] is None) and (g is None or torch.equal(g, after[1][k])) for k, g in grads.items()
    )
    if moments is not None:
        torch.testing.assert_close(moments, after[4], rtol=0, atol=0)


def trained(model=None, optimizer_class=torch.optim.AdamW):
    model = ecospa_fx.compile(model or MLP(), example_inputs=(X,))
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_no_inputs_and_none_derivable():
    with pytest.raises(errors.NoInputsError) as caught:
        ecospa_fx.explain(MLP())
    assert str(caught.value) == (
        "there are no inputs to capture MLP with: pass the arguments of one call as example_inputs=(x,) or "
        "example_kwargs={...}"
    )
    with pytest.raises(errors.NoInputsError) as caught:
        ecospa_fx.couplings(ecospa_fx.compile(MLP()))
    assert str(caught.value) == (
        "MLP is compiled but has not been called yet, so its couplings are not known; call it once, or compile it with "
        "example_inputs=(x,). Only its forward counts: what another method computes needs a module around it whose "
        "forward calls that"
    )


def test_not_compiled():
    with pytest.raises(errors.EcoSpaError, match=r"MLP is not compiled; call ecospa_fx.compile\(model\) first"):
        ecospa_fx.couplings(MLP())


def test_no_coupling_that_a_rule_could_find():
    class Running(nn.Linear):
        def forward(self, x):
            return centred(super().forward(x))

    with pytest.raises(errors.NoCouplingError) as caught:
        ecospa_fx.compile(Running(6, 6), example_inputs=(X,))
    assert str(caught.value) == (
        "Running has no coupling that can shrink, and is left as it was. No axis rule is known for specimens.centred; "
        "axes that these touch stay full size"
    )
    with pytest.raises(errors.NoCouplingError, match=r"is left as it was. No axis of a weight leads to another weight"):
        ecospa_fx.compile(nn.Linear(6, 6), example_inputs=(X,))


def test_weights_that_are_made_of_all_entries_of_others_are_named_with_the_op():
    class Unitary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return x @ torch.linalg.qr(self.a).Q.T @ torch.linalg.qr(self.b.T).Q

    with pytest.raises(errors.NoCouplingError) as caught:
        ecospa_fx.compile(Unitary(), example_inputs=(X,))
    said = "a[0] (8): aten.linalg_qr: every entry of a matrix counts in every entry of the result (test_errors.py:"
    assert f"No axis of a weight leads to another weight: {said}" in str(caught.value)


def test_inputs_that_do_not_fit_the_model(caplog):
    with pytest.raises(
        errors.CaptureError, match=r"torch.export cannot capture the model \(MLP\): .* same reduction dim"
    ):
        ecospa_fx.compile(MLP(), example_inputs=(X[:, :5],))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(self.up(x).cumsum(-1))


@pytest.mark.parametrize("lazily", [False, True])
def test_no_coupling(lazily):
    model = Running()
    before = snapshot(model)
    now = {} if lazily else {"example_inputs": (X,)}
    with pytest.raises(errors.NoCouplingError) as caught:
        ecospa_fx.compile(model, **now)(X)
    message = str(caught.value)
    assert message.startswith("Running has no coupling that can shrink, and is left as it was. Refused: up.weight[0], ")
    assert "aten.cumsum: results along the axis depend on other entries along it (test_errors.py" in message
    assert_untouched(model, before)
    assert model(X).shape == X.shape  # and it still runs
    with pytest.raises(errors.EcoSpaError, match="Running is not compiled"):
        ecospa_fx.couplings(model)


def test_a_first_call_that_is_wrong_leaves_the_model_waiting():
    model = ecospa_fx.compile(MLP())
    before = snapshot(model)
    with pytest.raises(errors.CaptureError, match="same reduction dim"):
        model(X[:, :5])
    assert_untouched(model, before)
    assert model(X).shape == X.shape
    assert [coupling.name for coupling in ecospa_fx.couplings(model)] == ["ffn"]


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("theta", 0.0, "theta=0.0 is out of range; it is a share, above 0 and at most 1"),
        ("theta", 1.5, "theta=1.5 is out of range; it is a share, above 0 and at most 1"),
        ("top_k", -0.1, "top_k=-0.1 is out of range; it is a share, above 0 and at most 1"),
        ("target", 0, "target=0 is out of range; it is a share, above 0 and at most 1"),
        ("target", 50, "target=50 is out of range; it is a share, above 0 and at most 1"),
        ("min_keep", -1, "min_keep=-1 is out of range; it is a whole number, at least 0"),
        ("interval", 0, "interval=0 is out of range; it is a whole number of steps, at least 1"),
        ("start", -1, "start=-1 is out of range; it is a whole number of steps, at least 0"),
        ("end", 0, "end=0 is not after start=0"),
        (
            "score",
            "fischer",
            "score='fischer' is none of 'fisher', 'gradient', 'taylor', 'taylor_squared', 'taylor_positions', "
            "'magnitude', 'adam', 'activation', 'attention_entropy', 'reap', 'frequency', 'random', nor a function of "
            "a weight and its gradient",
        ),
    ],
)
def test_settings_out_of_range(setting, value, words):
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.raises(errors.TargetError) as caught:
        ecospa_fx.EcoSpaTrainer(model, optimizer, **{setting: value})
    assert str(caught.value) == words
    assert_untouched(model, before, optimizer)


def test_target_below_what_can_be_reached():
    model, optimizer = trained()
    with pytest.raises(errors.TargetError) as caught:
        ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.1)
    assert str(caught.value) == (
        "target=0.1 of 136 parameters is 14, but the couplings reach down to 19 only; the smallest reachable "
        "target is 0.14 with min_keep=1"
    )
    ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.14)  # what it says is so


def test_optimizer_of_another_model():
    model, _ = trained()
    stranger = torch.optim.AdamW(MLP().parameters())
    before = snapshot(model)
    words = "this AdamW holds 4 parameters, none of them of this MLP; pass the one made from model.parameters()"
    with pytest.raises(errors.OptimizerError) as caught:
        ecospa_fx.EcoSpaTrainer(model, stranger)
    assert str(caught.value) == words
    (coupling,) = ecospa_fx.couplings(model)
    with pytest.raises(errors.OptimizerError) as caught:
        ecospa_fx.shrink(model, {coupling: torch.arange(3)}, optimizer=stranger)
    assert str(caught.value) == words
    assert_untouched(model, before)


class Shampoo(torch.optim.SGD):
    """Holds a preconditioner of rows by rows."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["left"] = torch.eye(len(p))


def test_optimizer_state_that_cannot_follow():
    model, optimizer = trained(optimizer_class=Shampoo)
    before = snapshot(model, optimizer)
    (coupling,) = ecospa_fx.couplings(model)
    with pytest.raises(errors.OptimizerError) as caught:
        ecospa_fx.shrink(model, {coupling: torch.arange(3)}, optimizer=optimizer)
    assert str(caught.value) == (
        "Shampoo holds `left` of shape (10, 10) for `up.weight` of shape (10, 6): which of it belongs to which row or "
        "column is not known, so it cannot shrink along. Say it with @ecospa_fx.state_rule(Shampoo), or use an "
        "optimizer with elementwise state (AdamW, SGD with momentum)"
    )
    assert_untouched(model, before, optimizer)


def test_an_optimizer_that_a_shrink_was_not_told_of():
    model, optimizer = trained()
    told, without_state = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.optim.SGD(model.parameters())
    told.step()
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(3)}, optimizer=told)
    model(X).square().sum().backward()
    told.step()
    without_state.step()
    before = snapshot(model)
    with pytest.raises(errors.OptimizerError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "this AdamW holds `exp_avg` of `up.weight` at the sizes (10, 6), and a shrink made the parameter (3, 6) "
        "without it. Nothing can be taken out of that state now: give every shrink the optimizers of the model, "
        "shrink(model, selection, optimizer=...), or make this optimizer anew here"
    )
    assert_untouched(model, before)
    torch.optim.AdamW(model.parameters()).step()


class Preconditioned(torch.optim.SGD):
    """Holds columns by columns, which for a square matrix has its shape."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            if p.ndim == 2:
                self.state[p]["right"] = torch.eye(p.shape[1])


def test_state_of_a_shape_that_a_parameter_had_may_have_followed():
    @ecospa_fx.state_rule(Preconditioned)
    def follow(state, parameter, keep):
        named = {"right": state["right"]} if "right" in state else {}
        return {name: ecospa_fx.optimizers.take(value, keep, dims=(1, 1)) for name, value in named.items()}

    model, optimizer = trained(MLP(6, 6), Preconditioned)
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(3)}, optimizer=optimizer)
    assert optimizer.state[model.up.weight]["right"].shape == (6, 6)  # up.weight was of that shape, and is (3, 6)
    model(X).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (
            torch.tensor([], dtype=torch.long),
            "cannot shrink `ffn` to nothing; at least one of its 10 entries must stay, unless "
            "constraints=Constraints(min_keep=0) lets the last one go",
        ),
        (torch.tensor([0, 10]), "cannot shrink `ffn`: keep reaches from 0 to 10, and it has entries 0 to 9 now"),
        (torch.tensor([-1, 3]), "cannot shrink `ffn`: keep reaches from -1 to 3, and it has entries 0 to 9 now"),
        (torch.tensor([3, 1]), "cannot shrink `ffn`: keep is not increasing; keep is a sorted LongTensor of positions "
                               "that stay, sort it and drop repeats"),
        (torch.tensor([1, 1]), "cannot shrink `ffn`: keep is not increasing; keep is a sorted LongTensor of positions "
                               "that stay, sort it and drop repeats"),
        (torch.ones(10, dtype=torch.bool), "cannot shrink `ffn`: keep is torch.bool of shape (10,); keep is a sorted "
                                           "LongTensor of positions that stay"),
        ([0, 1], "cannot shrink `ffn`: keep is list; keep is a sorted LongTensor of positions that stay"),
    ],
)  # fmt: skip
def test_selection_that_makes_no_sense(keep, words):
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.raises(errors.ShrinkError) as caught:
        ecospa_fx.shrink(model, {"ffn": keep}, optimizer=optimizer)
    assert str(caught.value) == words
    assert_untouched(model, before, optimizer)


def test_coupling_of_another_model():
    model, _ = trained()
    (coupling,) = ecospa_fx.couplings(ecospa_fx.compile(nn.Sequential(MLP()), example_inputs=(X,)))
    with pytest.raises(errors.NoCouplingError) as caught:
        ecospa_fx.shrink(model, {coupling: torch.arange(3)})
    assert str(caught.value) == "the model has no coupling `0.ffn`; it has ffn"


def test_call_that_pins_an_axis_already_shrunk():
    model, optimizer = trained()
    ecospa_fx.shrink(model, {"ffn": torch.arange(4)}, optimizer=optimizer)
    out = model(X)
    before = snapshot(model, optimizer)
    with pytest.raises(errors.PinnedAxisError) as caught:
        model(X, show_hidden=True)
    message = str(caught.value)
    assert message.startswith(
        "this call needs all 10 entries of an axis that has shrunk to 4 (up.weight[0], up.bias[0], down.weight[1])"
    )
    assert "it leaves the region as output 1" in message
    assert "The call differs from earlier ones: the arguments are structured differently." in message
    assert_untouched(model, before, optimizer)
    assert torch.equal(model(X), out)


def test_axis_pinned_by_another_call_before_the_shrink():
    model, _ = trained()
    model(X, show_hidden=True)
    assert ecospa_fx.couplings(model) == ()  # so it is no longer offered


def test_rule_that_fails_in_the_middle_of_a_rewrite(monkeypatch):
    model, optimizer = trained(Deep())
    before = snapshot(model, optimizer)
    plan = ecospa_fx.plan(model)
    relu = torch.ops.aten.relu.default
    seen = []

    def follow(site):
        seen.append(site)
        if len(seen) == 3:
            raise IndexError("made to fail")

    monkeypatch.setitem(rules.OPS, relu, rules.OpInfo(rules.OPS[relu].axes, follow))
    keeps = {coupling: torch.arange(4) for coupling in ecospa_fx.couplings(model)}
    assert len(keeps) == 3
    with pytest.raises(errors.RuleError) as caught:
        ecospa_fx.shrink(model, keeps, optimizer=optimizer)
    assert str(caught.value).startswith("the sizes of aten.relu (")
    assert str(caught.value).endswith(
        "cannot follow a shrink: its rule failed with IndexError: made to fail; this is a bug in the rule, "
        "nothing was changed"
    )
    assert len(seen) == 3
    assert_untouched(model, before, optimizer)
    assert ecospa_fx.plan(model) == plan


def test_commit_that_fails_half_way(monkeypatch):
    model, optimizer = trained(Deep())
    before = snapshot(model, optimizer)
    fail_at(monkeypatch, 4)
    with pytest.raises(MemoryError):
        ecospa_fx.shrink(model, {c: torch.arange(4) for c in ecospa_fx.couplings(model)}, optimizer=optimizer)
    assert_untouched(model, before, optimizer)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        return self.mlp(x) if float(x.sum()) > 0 else x


def test_capture_that_fails_says_where():
    model = Branching()
    before = snapshot(model)
    with pytest.raises(errors.CaptureError, match=r"torch.export cannot capture the model \(Branching\): "):
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    assert_untouched(model, before)


class Cache:
    """Holds tensors and changes from call to call, as a cache of keys and values does."""

    def __init__(self) -> None:
        self.seen = []


class Remembering(Deep):
    def forward(self, x, cache=None):
        cache = Cache() if cache is None else cache
        for layer in self.layers:
            x = x + layer(x)
            cache.seen.append(x)
        return x, cache


class Told(MLP):
    def forward(self, x, cache):
        cache.seen.append(x)
        return super().forward(x)


def test_objects_that_no_graph_can_hold():
    model = Remembering()
    before = snapshot(model)
    with pytest.raises(errors.CaptureError) as caught:
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    assert str(caught.value) == (
        "the model (Remembering) returns a Cache, which cannot go in or out of a graph: call it so that it does not, "
        "or turn off the option that makes it (for a cache, usually `use_cache=False`)"
    )
    assert_untouched(model, before)
    ecospa_fx.compile(model, example_inputs=(X,))  # its blocks have nothing to do with it
    assert len(model(X)[1].seen) == 3
    cache = Cache()
    with pytest.raises(
        errors.CaptureError, match=r"\(Told\) is called with a Cache, .* it changes `seen` of a Cache itself"
    ):
        ecospa_fx.compile(Told(), example_inputs=(X, cache), regions="root")
    assert cache.seen == []


def test_unknown_regions():
    with pytest.raises(errors.CaptureError, match=r"regions='nonsense' is none of 'auto', 'blocks', 'joined', 'root'"):
        ecospa_fx.compile(MLP(), example_inputs=(X,), regions="nonsense")
    with pytest.raises(
        errors.CaptureError, match=r"regions: Deep has no submodule `layers.7`; see model.named_modules()"
    ):
        ecospa_fx.compile(Deep(), example_inputs=(X,), regions=["layers.7"])
    with pytest.raises(
        errors.CaptureError, match=r"regions: `layers` is not called in a forward of the model; name another"
    ):
        ecospa_fx.compile(Deep(), example_inputs=(X,), regions=["layers"])


class Lying(nn.Module):
    """Takes another path when traced, as some real models do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        return self.mlp(x) * (2.0 if torch.compiler.is_exporting() else 1.0)


def test_graph_that_differs_from_eager_is_not_trusted():
    model = Lying()
    before = snapshot(model)
    with pytest.raises(errors.CaptureError) as caught:
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    assert str(caught.value) == (
        "the model was captured, but output 0 of the graph differs from eager by 1.0e+00; it is left as it is"
    )
    assert_untouched(model, before)
