"""Going out: a shrunk model as a program of torch.export and in ONNX gives what it gives here."""

import pytest
import torch
from test_training import Stack
from torch import nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx
from ecospa_fx.errors import EcoSpaError

X = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.second(torch.relu(self.norm(self.first(x))))
        return self.head(torch.relu(x).mean((2, 3)))


def shrunk(model, **call):
    ecospa_fx.compile(model.eval(), **call)
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)})
    return model


CASES = {
    "blocks": (lambda: Stack(), (X,), {}, ({0: Dim.AUTO, 1: Dim.AUTO},)),
    "root": (Convolutions, (torch.randn(2, 3, 9, 9),), {}, ({0: Dim.AUTO},)),
    # Its blocks get a mask in an export, which they have never met before.
    "transformers": (llama, (), {"input_ids": TOKENS}, {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_shrunk_model_goes_out_and_gives_what_it_gives_here(case, tmp_path):
    make, args, kwargs, dynamic = CASES[case]
    torch.manual_seed(0)
    model = shrunk(make(), example_inputs=args, example_kwargs=kwargs)
    program = ecospa_fx.export(model, args, kwargs, dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert sum(t.numel() for t in loaded.state_dict().values()) == sum(t.numel() for t in model.state_dict().values())

    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [held.name for held in session.get_inputs()]
    for cut in (slice(None), slice(1)):
        few = [tensor[cut] for tensor in (*args, *kwargs.values())]
        if case != "root":
            few = [tensor[:, : 5 if cut.stop else None] for tensor in few]
        call = (few, {}) if args else ([], dict(zip(kwargs, few)))
        with torch.no_grad():
            expected, found = (each(*call[0], **call[1]) for each in (model, loaded))
        expected, found = (each if isinstance(each, torch.Tensor) else each.logits for each in (expected, found))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        (outside, *_) = session.run(None, dict(zip(names, (tensor.numpy() for tensor in few))))
        torch.testing.assert_close(torch.from_numpy(outside), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_loaded_goes_out_without_a_call_before(tmp_path):
    model = shrunk(llama(), example_kwargs={"input_ids": TOKENS})
    ecospa_fx.save(model, tmp_path / "run")
    loaded = ecospa_fx.load(tmp_path / "run").eval()
    program = ecospa_fx.export(loaded, (), {"input_ids": TOKENS})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    # What was met on the way is known like any other call: the model shrinks on.
    ecospa_fx.shrink(loaded, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(loaded) if c.kind == "glu"})
    assert ecospa_fx.verify(loaded, example_kwargs={"input_ids": TOKENS}).ok


def test_what_cannot_go_out_is_refused():
    with pytest.raises(EcoSpaError, match=r"is not compiled; call ecospa_fx\.compile"):
        ecospa_fx.export(Stack(), (X,))
    with pytest.raises(EcoSpaError, match="is compiled but has not been called yet"):
        ecospa_fx.export(ecospa_fx.compile(Stack()), (X,))
