"""Shared memory: tied weights as pairs of storages say, and in one pass over a deep model."""

import torch
from torch import nn

import ecospa_fx
from ecospa_fx.passes.graph import shared_memory
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import named_tensors


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(depth))
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def by_pairs(model, region):
    named = named_tensors(model)
    same = lambda a, b: named[a].untyped_storage().data_ptr() == named[b].untyped_storage().data_ptr()  # noqa: E731
    inside = [name for name in named if name.startswith(f"{region}.")]
    outside = [name for name in named if name not in inside]
    found = {a: [b for b in outside if same(a, b)] for a in inside}
    return {a.removeprefix(f"{region}."): f"as `{others[0]}`" for a, others in found.items() if others}


def test_ties_are_those_of_pairs_of_storages():
    model = Net()
    model.head.weight = model.table.weight
    model.blocks[1][0].weight = model.blocks[0][0].weight
    model.blocks[2][0].bias.data = model.blocks[2][2].weight.data.view(-1)[:6]
    model.register_buffer("seen", model.blocks[0][2].bias.data[1:])
    memory = SharedMemory(named_tensors(model))
    for region in ("blocks.0", "blocks.1", "blocks.2", "table", "head", "blocks"):
        assert memory.outside(region) == by_pairs(model, region), region
    assert memory.outside("") == {}
    assert memory.outside("blocks.1") == {"0.weight": "as `blocks.0.0.weight`"}
    assert memory.tied("blocks.2", ["2.weight", "0.weight", "0.bias"]) == {"0.bias": "2.weight"}
    assert memory.tied("blocks.2", ["0.bias", "0.weight"]) == {}
    assert memory.tied("", ["head.weight", "table.weight", "blocks.1.0.weight"]) == {"table.weight": "head.weight"}


def test_one_look_at_a_deep_model_reads_each_tensor_once(monkeypatch):
    model, ids = Net(depth=12), torch.arange(5)[None]
    ecospa_fx.compile(model, example_inputs=(ids,), regions="blocks")
    reads = []
    key = shared_memory.storage_key
    monkeypatch.setattr(shared_memory, "storage_key", lambda tensor: reads.append(1) or key(tensor))
    assert len(ecospa_fx.couplings(model)) == 12
    assert len(reads) == len(named_tensors(model))
