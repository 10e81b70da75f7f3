"""Nested tensors, which torch's own encoders make of padded batches in evaluation, through regions that have shrunk."""

import copy

import pytest
import torch
from torch import nn
from twin import kept_positions, zeroed

import ecospa_fx
from ecospa_fx.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch warns of its own use of it

X = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(7) >= torch.tensor([7, 4, 2, 4, 1])[:, None]


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("shrunk", [False, True])
def test_a_padded_batch_in_evaluation(shrunk):
    plain = encoder()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,))
    if shrunk:
        keeps = {c: torch.arange(1, c.size, 2) for c in ecospa_fx.couplings(model)}
        assert {c.kind for c in keeps} == {"heads", "qk", "vo", "ffn"}
        plain = zeroed(plain, kept_positions(plain, keeps))
        ecospa_fx.shrink(model, keeps)
    with torch.no_grad():
        mine = model.eval()(X, src_key_padding_mask=PADDING)
        theirs = plain.eval()(X, src_key_padding_mask=PADDING)
    assert bool((theirs[PADDING] == 0).all())  # torch has made nested tensors
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(X, src_key_padding_mask=PADDING)[~PADDING], theirs[~PADDING], rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    def __init__(self, hidden=48):
        super().__init__()
        self.up, self.down = nn.Linear(32, hidden), nn.Linear(hidden, 32)

    def forward(self, x, y=None):
        h = self.down(torch.relu(self.up(x)))
        return h if y is None else h + y


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_samples_of_their_own_lengths_train(layout):
    torch.manual_seed(0)
    model = ecospa_fx.compile(Block(), example_inputs=(X,))
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 3) for c in ecospa_fx.couplings(model)})
    small = Block(16)
    small.load_state_dict(model.state_dict())
    rows = [torch.randn(n, 32) for n in (3, 5, 3, 2)]
    for each in (model, small):
        out = each(torch.nested.nested_tensor(rows, layout=layout))
        assert out.is_nested and out.layout is layout
        sum((part.square().sum() for part in out.unbind()), torch.zeros(())).backward()
        parts = [part.detach() for part in out.unbind()]
        if each is model:
            mine = parts
    torch.testing.assert_close(mine, parts)
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in small.parameters()])


def test_what_belongs_to_which_sample_must_be_known():
    model = ecospa_fx.compile(Block(), example_inputs=(X, X))
    ecospa_fx.shrink(model, {c: torch.arange(4) for c in ecospa_fx.couplings(model)})
    with pytest.raises(CaptureError, match="pad them, or make all of them nested"):
        model(torch.nested.nested_tensor([X[0], X[1, :3]]), X[:2])
    with pytest.raises(CaptureError, match="nested tensors of no samples"):
        model(torch.nested.nested_tensor([]))
