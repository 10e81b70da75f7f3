"""Scores of experts that tokens pick: equal to those that plain Python computes, token by token, beside the graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import zoo_experts
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import EcoSpaError, TargetError
from ecospa_fx.score.judging import index_scores
from ecospa_fx.score.saliency import Saliency

CALL = {"input_ids": torch.tensor([[3, 8, 5, 1, 9, 2], [7, 4, 4, 6, 3, 8]]), "use_cache": False}


def mixtral() -> Any:
    config = hf.MixtralConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, num_local_experts=6, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(config).double().train()


def by_hooks(model: Any, weighted: bool) -> list[Tensor]:
    """Compute REAP's equation in the experts' own loop: of the tokens of an expert, the mean of gate times norm."""
    found = []

    def see(experts: Any, given: tuple[Tensor, ...], _: Tensor) -> None:
        hidden, chosen, gates = given
        each = []
        for e in range(len(experts.down_proj)):
            token, place = torch.where(chosen == e)
            gate, up = (hidden[token] @ experts.gate_up_proj[e].T).chunk(2, -1)
            norms = ((F.silu(gate) * up) @ experts.down_proj[e].T).norm(dim=-1)
            each.append((gates[token, place] * norms).mean() if weighted else torch.tensor(len(token) / chosen.numel()))
        found.append(torch.stack(each).detach().double().nan_to_num(0.0))

    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(see)
    model(**CALL)
    return found


@pytest.mark.parametrize(("regions", "how"), [("blocks", "batched_mm"), ("root", "grouped_mm")])
def test_reap_and_frequency_are_those_of_hooks_on_the_plain_model(regions: str, how: str) -> None:
    model = mixtral() if how == "batched_mm" else mixtral().float()
    expected = {score: by_hooks(copy.deepcopy(model), score == "reap") for score in ("reap", "frequency")}
    model.set_experts_implementation(how)
    ecospa_fx.compile(model, example_inputs=(), example_kwargs=CALL, regions=regions)
    estimators = {score: ecospa_fx.CoupledEstimator(model, score) for score in expected}
    with torch.no_grad():
        model(**CALL)  # not read
    assert all(estimator.empty for estimator in estimators.values())
    model(**CALL)
    for score, estimator in estimators.items():
        experts = [coupling for coupling in ecospa_fx.couplings(model) if coupling.kind == "experts"]
        assert len(experts) == 2 and set(estimator.importance()) == set(experts)
        for coupling, values in zip(experts, expected[score], strict=True):
            torch.testing.assert_close(estimator.entries(coupling), values, rtol=1e-5, atol=1e-7)
        resumed = ecospa_fx.CoupledEstimator(model, score)
        resumed.load_state_dict(estimator.state_dict())
        torch.testing.assert_close(resumed.entries(experts[0]), expected[score][0], rtol=1e-5, atol=1e-7)


class Joined(zoo_experts.Experts):
    """The outputs of all experts come from one product over experts and hidden units, which sees gates before it."""

    def mix(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        gates = torch.zeros(*tokens.shape[:-1], self.E, dtype=tokens.dtype).scatter(-1, experts, weights)
        hidden = torch.einsum("td,efd->tef", tokens, self.gate_up_matrix).chunk(2, dim=-1)[0].relu()
        return (hidden * gates[..., None]).flatten(1) @ self.down_matrix.transpose(1, 2).flatten(0, 1)


class Resorted(zoo_experts.Experts):
    """Rows in the order of their experts meet gates behind that order, and have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(self.E, self.D))

    def mix(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        gate, up = torch.einsum("rd,rfd->rf", tokens[order // self.K], self.gate_up_matrix[chosen[order]]).chunk(2, -1)
        rows = torch.einsum("rf,rdf->rd", F.silu(gate) * up, self.down_matrix[chosen[order]]) + self.bias[chosen[order]]
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
        return (rows[back].view(-1, self.K, self.D) * weights[..., None]).sum(1)


CLASSES = [
    zoo_experts.picked_experts, zoo_experts.dense_experts, zoo_experts.dispatched_experts,
    zoo_experts.experts_in_groups, Joined, Resorted,
]  # fmt: skip


def alone(model: Any, x: Tensor) -> Tensor:
    """Return what each expert adds to each token, `[experts, tokens, dims]`: the output less that without it."""
    with torch.no_grad():
        whole, added = model(x), []
        for e in range(model.E):
            without = copy.deepcopy(model)
            for weight in (without.down_matrix, *([without.bias] if hasattr(model, "bias") else [])):
                weight[e] = 0
            added.append((whole - without(x)).flatten(0, 1))
    return torch.stack(added)


def test_groups_that_kept_other_experts_are_read_as_they_are_now() -> None:
    torch.manual_seed(0)
    model, x = zoo_experts.experts_in_groups().double(), torch.randn(2, 5, 6).double()
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    inner = next(coupling for coupling in ecospa_fx.couplings(model) if coupling.contexts == 2)
    ecospa_fx.shrink(model, {inner: torch.tensor([[0, 2, 3], [1, 2, 3]])})
    (inner,) = (coupling for coupling in ecospa_fx.couplings(model) if coupling.contexts == 2)
    twin = zoo_experts.experts_in_groups(2, 3).double()
    twin.load_state_dict(model.state_dict())
    norms = alone(twin, x).norm(dim=-1)
    scores = ecospa_fx.CoupledEstimator(model, "reap")
    model(x)
    expected = (norms.sum(1) / (norms > 1e-9).sum(1)).nan_to_num(0.0).view(2, 3)
    torch.testing.assert_close(scores.entries(inner, by_context=True), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_an_expert_adds_is_found_however_tokens_and_experts_meet(cls: Any) -> None:
    torch.manual_seed(0)
    model, x, direction = cls().double(), torch.randn(2, 3, 6).double(), torch.randn(2, 3, 6).double()
    added = alone(model, x)
    norms, gradient = added.norm(dim=-1), (2 * model(x) * direction).detach().flatten(0, 1)
    reap = (norms.sum(1) / (norms > 1e-9).sum(1)).nan_to_num(0.0)
    gates = (added * gradient).sum(-1)
    expected = {"graph": gates.square().sum(1), "module": gates.sum(1).square()}  # by position, and by step
    for execution, squares in expected.items():
        own = ecospa_fx.compile(copy.deepcopy(model), example_inputs=(x,), regions="root", execution=execution)
        experts = [coupling for coupling in ecospa_fx.couplings(own) if coupling.kind == "experts"][-1]
        saliency = Saliency(own)
        scores = ecospa_fx.CoupledEstimator(own, "reap") if execution == "graph" else None
        (own(x).square() * direction).sum().backward()
        saliency.accumulate()
        torch.testing.assert_close(saliency.entries(experts, by_context=True).flatten(), squares, rtol=1e-5, atol=1e-6)
        if scores is not None:
            torch.testing.assert_close(scores.entries(experts, by_context=True).flatten(), reap, rtol=1e-6, atol=1e-9)


def test_a_trainer_removes_the_experts_that_reap_or_frequency_finds_weak() -> None:
    for score in ("reap", "frequency"):
        torch.manual_seed(0)
        model = zoo_experts.picked_experts()
        with torch.no_grad():
            model.router.bias.copy_(torch.tensor([0.0, 9, 9, 0, 9, 0, 0, 9]))  # 1, 2, 4 and 7 have all tokens
        bias, x = model.router.bias.detach().clone(), torch.randn(8, 4, 6)
        ecospa_fx.compile(model, example_inputs=(x,), regions="root")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = ecospa_fx.EcoSpaTrainer(
            model, optimizer, target={"experts": 0.5}, policy="paper", score=score, index_score=score, interval=1, end=6
        )
        for _ in range(7):
            model(x).square().mean().backward()
            trainer.step()
            optimizer.step()
            optimizer.zero_grad()
        assert {c.name: c.size for c in ecospa_fx.couplings(model)} == {"experts": 4, "glu": 10}
        torch.testing.assert_close(model.router.bias, bias[[1, 2, 4, 7]])


def test_experts_go_by_reap_and_all_else_by_norms_in_one_trainer() -> None:
    torch.manual_seed(0)
    model, x = zoo_experts.picked_experts(), torch.randn(8, 4, 6)
    with torch.no_grad():
        model.router.weight[:4] *= 5  # their norms are large, whatever they make
    bias, down = model.router.bias.detach().clone(), model.down_matrix.detach().clone()
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target={"experts": 0.5, "glu": 0.5}, policy="paper", index_score={"experts": "reap"},
        start=3, shape="one_shot", top_k=1.0, theta=0.01,
    )  # fmt: skip
    scores = ecospa_fx.CoupledEstimator(model, "reap")
    experts, glu = (next(c for c in ecospa_fx.couplings(model) if c.kind == kind) for kind in ("experts", "glu"))
    expected = []
    for _ in range(5):
        model(x).square().mean().backward()
        if len(model.router.bias) == 8:
            expected = [scores.entries(experts), index_scores(model, experts), index_scores(model, glu)]
        trainer.step()
        optimizer.step()
        optimizer.zero_grad()
    by_reap, by_norms, units = (each.topk(len(each) // 2).indices.sort().values for each in expected)
    assert {c.name: c.size for c in ecospa_fx.couplings(model)} == {"experts": 4, "glu": 5}
    assert not torch.equal(by_reap, by_norms)
    torch.testing.assert_close(model.router.bias, bias[by_reap])
    torch.testing.assert_close(model.down_matrix, down[by_reap][:, :, units])
    with pytest.raises(TargetError, match=r"index_score={'glu': 'reap'}: it judges experts only"):
        ecospa_fx.EcoSpaTrainer(model, optimizer, policy="paper", index_score={"glu": "reap"})
    with pytest.raises(TargetError, match=r"kinds='expert' is none of"):
        ecospa_fx.EcoSpaTrainer(model, optimizer, policy="paper", index_score={"expert": "reap"})


def test_experts_have_no_scores_of_their_own_where_the_models_own_python_runs() -> None:
    x = torch.randn(2, 3, 6)
    model = ecospa_fx.compile(zoo_experts.picked_experts(), example_inputs=(x,), execution="module")
    with pytest.raises(EcoSpaError, match="execution='module' the model's own Python runs; use another score"):
        ecospa_fx.CoupledEstimator(model, "reap")


def test_compress_orders_experts_by_the_score_that_it_is_given() -> None:
    torch.manual_seed(0)
    model = zoo_experts.picked_experts()
    batches = [torch.randn(2, 8, 6) for _ in range(8)]
    added = sum(norms.sum(1) for norms in (alone(model, x).norm(dim=-1) for x in batches[:7]))
    sent = sum((alone(model, x).norm(dim=-1) > 1e-6).sum(1) for x in batches[:7])
    bias = model.router.bias.detach().clone()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    for score, worth in (("reap", added / sent), ("frequency", sent)):
        small = copy.deepcopy(model)
        report = ecospa_fx.compress(small, batches, {"experts": 0.5}, loss=loss, scores={"experts": score})
        assert report.removed == {"experts": (8, 4)} and not report.notes[1:]
        torch.testing.assert_close(small.router.bias, bias[worth.topk(4).indices.sort().values])
    for kind, score, why in (
        ("glu", "reap", "it reads experts, and compress has none of these for glu"),
        ("experts", "activation", "it reads activations"),
        ("experts", "best", "scores\\['experts'\\]='best' is none of"),
    ):
        with pytest.raises(TargetError, match=why):
            ecospa_fx.compress(model, batches, scores={kind: score})


class Switched(zoo_experts.Experts):
    """One expert to a token, whose rows stay apart to the end: no sum, but another weight."""

    K = 1

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.D, 3)

    def mix(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        chosen = experts.squeeze(-1)
        gate, up = torch.einsum("td,tfd->tf", tokens, self.gate_up_matrix[chosen]).chunk(2, -1)
        return torch.einsum("tf,tdf->td", F.silu(gate) * up, self.down_matrix[chosen]) * weights

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x).relu()).mean(1)


class Overwritten(Switched):
    """What the experts add is overwritten by its sum with the stream."""

    def forward(self, x: Tensor) -> Tensor:
        out = zoo_experts.Experts.forward(self, x)
        out += x
        return self.head(out)


def test_contributions_that_are_overwritten_by_their_sum_train_on() -> None:
    torch.manual_seed(0)
    model, x = Overwritten().double(), torch.randn(2, 3, 6).double()
    plain = copy.deepcopy(model)
    added = alone(plain, x).norm(dim=-1)
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    saliency, scores = Saliency(model), ecospa_fx.CoupledEstimator(model, "reap")
    for each in (model, plain):
        each(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    saliency.accumulate()
    (experts,) = (coupling for coupling in ecospa_fx.couplings(model) if coupling.kind == "experts")
    assert saliency.judges(experts)  # by step
    assert torch.equal(scores.entries(experts) > 0, added.sum(1) > 1e-9)


def test_an_expert_alone_with_its_token_adds_what_it_makes() -> None:
    torch.manual_seed(0)
    model, x = Switched().double(), torch.randn(2, 3, 6).double()
    shares, chosen = model.router(x).softmax(-1).max(-1)
    gate, up = torch.einsum("bsd,bsfd->bsf", x, model.gate_up_matrix[chosen]).chunk(2, -1)
    made = torch.einsum("bsf,bsdf->bsd", F.silu(gate) * up, model.down_matrix[chosen]) * shares[..., None]
    expected = torch.stack([made[chosen == e].norm(dim=-1).mean() for e in range(8)]).nan_to_num(0.0)
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    scores, saliency = ecospa_fx.CoupledEstimator(model, "reap"), Saliency(model)
    made.retain_grad()
    model.head(made.relu()).mean(1).square().sum().backward()
    squares = (made * made.grad).sum(-1).square()
    model(x).square().sum().backward()
    saliency.accumulate()
    (experts,) = (coupling for coupling in ecospa_fx.couplings(model) if coupling.kind == "experts")
    torch.testing.assert_close(scores.entries(experts), expected.detach())
    torch.testing.assert_close(
        saliency.entries(experts), torch.stack([squares[chosen == e].sum() for e in range(8)]), rtol=1e-6, atol=1e-12
    )
