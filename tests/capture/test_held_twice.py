"""Parameters that a module holds twice: as its own, and in a dict, a list or an object that the forward reads."""

import copy

import pytest
import torch
from torch import nn

import ecospa_fx


class Keyed(nn.Module):
    """Reads a parameter from a dict."""

    def __init__(self, name="gain"):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.gain, self.other = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.weights = {"gain": getattr(self, name)}

    def forward(self, x):
        return x + self.b(self.a(x).relu() * self.weights["gain"] + self.other)


class Listed(nn.Module):
    """Reads parameters from lists in a list, and has one in an attribute of another name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))
        self.layers = [[self.a, None], [self.b, None]]
        self.last = {"b": self.b}
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(x @ self.layers[0][0]).relu()
        return x + (y @ self.layers[1][0] if self.training else y @ self.last["b"])


class Scale:
    """An object of a class that torch does not know, with a parameter."""

    def __init__(self, gain):
        self.gain = gain

    def __call__(self, x):
        return x * self.gain


class Objects(Keyed):
    """Reads a parameter from an object in a list."""

    def __init__(self):
        super().__init__()
        self.scales = [Scale(self.gain)]

    def forward(self, x):
        return x + self.b(self.scales[0](self.a(x).relu()) + self.other)


MODELS = {
    "object": lambda: Objects(),
    "dict": lambda: Keyed(),
    "list": lambda: Listed(),
    "equal blocks": lambda: nn.Sequential(Keyed(), Keyed()),
    "blocks that hold different ones": lambda: nn.Sequential(Keyed(), Keyed("other")),
}


def without(twin, keeps):
    """Zero what a shrink takes from a copy at full size."""
    for coupling, keep in keeps.items():
        for member in coupling.members:
            gone = (member.index >= 0) & ~torch.isin(member.index, keep)
            twin.get_parameter(member.parameter).data.index_fill_(member.dim, gone.nonzero().flatten(), 0.0)


@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize("name", MODELS)
def test_a_parameter_held_twice_takes_part(name, execution):
    """Outputs and gradients are those of the plain model, before a shrink and after, also of modes first met then."""
    torch.manual_seed(0)
    plain = MODELS[name]().double()
    model = ecospa_fx.compile(copy.deepcopy(plain), execution=execution)
    x = torch.randn(3, 6).double()
    for shrunk in (False, True):
        for training in (True, False) if shrunk else (True,):
            outputs = []
            for each in (model, plain):
                each.train(training).zero_grad()
                torch.manual_seed(1)
                outputs.append(each(x))
                outputs[-1].square().sum().backward()
            torch.testing.assert_close(*outputs)
            for (where, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None), where
                if a.grad is not None and a.shape == b.shape:
                    torch.testing.assert_close(a.grad, b.grad)
        if not shrunk:
            couplings = ecospa_fx.couplings(model)
            assert {member.parameter.rpartition(".")[2] for c in couplings for member in c.members} >= (
                {"a", "b"} if name == "list" else {"gain", "other", "weight"}
            )
            keeps = {coupling: torch.arange(0, coupling.size, 3) for coupling in couplings if coupling.kind == "ffn"}
            assert keeps
            without(plain, keeps)
            # No generator draws the same dropout for fewer entries.
            for each in (model, plain):
                for module in each.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = 0.0
            ecospa_fx.shrink(model, keeps)
