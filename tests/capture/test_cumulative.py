"""Batch norms whose statistics average over all batches, as `update_bn` makes them, beside plain and smaller ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import ecospa_fx


class WithActivation(nn.BatchNorm2d):
    """Has its own forward, as the layers of libraries that fuse an activation have."""

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        training = self.training or self.running_mean is None
        return F.relu(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, factor, self.eps)
        )


def convolutions(norm, width=16, wider=24):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), norm(width), nn.ReLU(), nn.Conv2d(width, wider, 3), norm(wider), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wider, 5),
    )  # fmt: skip


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6 - i, 3, 9, 9, generator=generator) for i in range(count)]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, WithActivation])
@pytest.mark.parametrize("execution", ["graph", "module"])
def test_statistics_of_an_average_are_those_of_a_smaller_model(norm, execution):
    torch.manual_seed(0)
    model = ecospa_fx.compile(convolutions(norm), example_inputs=(batches(1)[0],), execution=execution)
    average = AveragedModel(model)
    kept = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}
    assert len(kept) == 2
    ecospa_fx.shrink(model, kept, also=[average])
    small = convolutions(norm, 8, 12)
    small.load_state_dict(average.module.state_dict())
    update_bn(batches(4), average)
    update_bn(batches(4), small)
    assert_close(state(average.module), state(small))
    average.eval(), small.eval()
    torch.testing.assert_close(average(batches(1)[0]), small(batches(1)[0]))


def test_gradients_go_through_and_statistics_do_not():
    torch.manual_seed(0)
    plain = convolutions(nn.BatchNorm2d)
    for norm in (plain[1], plain[4]):
        norm.momentum = None
    twin = copy.deepcopy(plain)
    model = ecospa_fx.compile(plain, example_inputs=(batches(1)[0],))
    for x in batches(3):
        for each in (model, twin):
            each(x).square().mean().backward()
    assert_close(state(model), state(twin))
    assert_close(*({n: p.grad for n, p in each.named_parameters()} for each in (model, twin)))
    assert len(ecospa_fx.couplings(model)) == 2 and model[1].momentum is None
    assert ecospa_fx.verify(model, example_inputs=(batches(1)[0],)).ok
