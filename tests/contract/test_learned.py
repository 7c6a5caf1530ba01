"""The invariants of methods that learn masks, over the methods, structures and layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrize

import gossamer as gs

from .tables import LEARNED, LearnedRow, TinyNet, bits, snapshot

CASES = [pytest.param(row, s, id=f"{row.id}-{s}") for row in LEARNED for s in row.structures]
ROWS = [pytest.param(row, id=row.id) for row in LEARNED]
# A handful of steps is too few to steer by, and what is tested here is not how near that comes.
pytestmark = pytest.mark.filterwarnings("ignore:continuous. steering ended:UserWarning")
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


class Run:
    def __init__(self, method: Any, optimizer: str = "sgd", scatter: float = 0.0) -> None:
        self.model = TinyNet()
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.sparsity = gs.attach(self.model, method, self.optimizer)
        generator = torch.Generator().manual_seed(0)
        for scores in (p for group in self.sparsity.param_groups() for p in group["params"]):
            scores.data += scatter * torch.randn(scores.shape, generator=generator)
        self.forward: Any = self.model

    def step(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 4, 4, 4, generator=generator), torch.randint(4, (8,), generator=generator)
        loss = nn.functional.cross_entropy(self.forward(x), y) + self.sparsity.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def train(self, steps: range | int) -> Run:
        for number in range(steps) if isinstance(steps, int) else steps:
            self.step(number)
        return self

    def everything(self) -> Any:
        return snapshot([self.model.state_dict(), self.optimizer.state_dict(), self.sparsity.state_dict()])


def probe(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(7)))
    model.train()
    return found


@pytest.mark.parametrize(("row", "structure"), CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finalize_leaves_a_plain_model_with_the_same_outputs_and_exact_zeros(
    row: LearnedRow, structure: str, optimizer: str
) -> None:
    run = Run(row.make(structure), optimizer, row.scatter)
    plain = TinyNet()
    run.train(row.steps)
    before = probe(run.model)
    run.sparsity.finalize()
    assert bits(probe(run.model)).equal(bits(before))
    assert list(run.model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in run.model.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in run.model.parameters()}
    assert set(run.optimizer.state) <= set(run.model.parameters())
    masks = run.sparsity.masks()
    for name, mask in masks.items():
        weight = run.model.get_parameter(name)
        assert not bits(weight)[~mask].any()
    assert 0 < run.sparsity.density() < 1
    assert run.sparsity.density() == sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@pytest.mark.parametrize(("row", "structure"), CASES)
def test_a_run_resumed_at_every_step_is_bit_equal_to_one_that_was_not(row: LearnedRow, structure: str) -> None:
    whole = Run(row.make(structure), "adamw", row.scatter).train(row.steps)
    run = Run(row.make(structure), "adamw", row.scatter)
    for number in range(row.steps):
        saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.sparsity.state_dict()))
        run = Run(row.make(structure), "adamw", row.scatter)
        probe(run.model)
        run.model.load_state_dict(saved[0])
        run.optimizer.load_state_dict(saved[1])
        run.sparsity.load_state_dict(saved[2])
        run.step(number)
    assert run.everything() == whole.everything()


@pytest.mark.parametrize("row", ROWS)
def test_copies_made_in_any_phase_train_alike(row: LearnedRow) -> None:
    run = Run(row.make(), scatter=row.scatter)
    for number in range(row.steps):
        run.step(number)
        model, optimizer, sparsity = copy.deepcopy((run.model, run.optimizer, run.sparsity))
        twin = Run.__new__(Run)
        twin.model = twin.forward = model
        twin.optimizer, twin.sparsity = optimizer, sparsity
        before = run.everything()
        twin.step(number + 1)
        assert run.everything() == before
    assert twin.everything() == run.train(range(row.steps, row.steps + 1)).everything()


@pytest.mark.parametrize("row", ROWS)
def test_a_compiled_model_trains_alike_and_is_compiled_once(row: LearnedRow) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    plain, compiled = Run(row.make(), scatter=row.scatter).train(row.steps), Run(row.make(), scatter=row.scatter)
    torch._dynamo.reset()
    compiled.forward = torch.compile(compiled.model, backend=count, fullgraph=True)
    compiled.train(row.steps)
    assert graphs == 1
    for (name, there), here in zip(plain.model.state_dict().items(), compiled.model.state_dict().values(), strict=True):
        torch.testing.assert_close(here, there, msg=name)


@pytest.mark.parametrize("row", ROWS)
def test_gates_work_under_autocast_and_in_half_precision(row: LearnedRow) -> None:
    run = Run(row.make(), scatter=row.scatter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run.forward(torch.randn(2, 4, 4, 4)).float().square().sum()
    (loss + run.sparsity.penalty()).backward()
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in run.model.parameters())

    half = TinyNet().to(torch.bfloat16)
    sparsity = gs.attach(half, row.make(), optim.SGD(half.parameters(), lr=0.1))
    assert half(torch.randn(2, 4, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for g in sparsity.param_groups() for p in g["params"])


@pytest.mark.parametrize("row", ROWS)
def test_scores_are_trained_without_weight_decay_at_their_own_rate(row: LearnedRow) -> None:
    run = Run(row.make(lr=0.5))
    own, learned = run.optimizer.param_groups
    assert own["weight_decay"]
    assert not learned["weight_decay"]
    assert (own["lr"], learned["lr"]) == (0.1, 0.5)
    scores = {id(p) for p in learned["params"]}
    assert scores == {id(p) for name, p in run.model.named_parameters() if ".scores." in name}
    assert scores.isdisjoint(id(p) for p in own["params"])


@pytest.mark.parametrize("row", ROWS)
def test_detaching_leaves_weights_as_they_acted(row: LearnedRow) -> None:
    run = Run(row.make(), scatter=row.scatter).train(3)
    before = probe(run.model)
    run.sparsity.detach()
    torch.testing.assert_close(probe(run.model), before, rtol=0, atol=0)
    assert list(run.model.state_dict()) == list(TinyNet().state_dict())
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in run.model.parameters()}


@pytest.mark.parametrize("row", ROWS)
def test_an_evaluation_under_hard_masks_changes_nothing(row: LearnedRow) -> None:
    run = Run(row.make(), scatter=row.scatter).train(3)
    before, soft = run.everything(), probe(run.model)
    with run.sparsity.hardened():
        hard = probe(run.model)
    assert run.everything() == before
    assert probe(run.model).equal(soft)
    with warnings.catch_warnings(action="ignore"):
        run.sparsity.finalize()
    assert bits(probe(run.model)).equal(bits(hard))


class Layers(nn.Module):
    """One layer of every kind that has weights, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 8, 3, padding=2, groups=2, dilation=2, bias=True)
        self.transposed = nn.ConvTranspose1d(8, 8, 2, groups=2)
        self.rnn = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(torch.relu(self.conv(x))).transpose(1, 2)
        y = self.cell(self.rnn(x)[0].sum(1))[:, None]
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.second(torch.tanh(self.first(y))).squeeze(1)


@pytest.mark.parametrize("row", ROWS)
def test_every_kind_of_layer_acts_with_its_gated_weight(row: LearnedRow) -> None:
    model, plain = Layers(), Layers()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, row.make(), optimizer)
    x = torch.randn(3, 4, 5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".scores." in name}
    for _ in range(2):
        (model(x).square().sum() + sparsity.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        copy.deepcopy((model, optimizer, sparsity))
    for name, p in model.named_parameters():
        assert ".scores." not in name or not p.equal(before[name]), f"{name} was not trained"

    model.eval()
    plain.eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner, _, attribute = name.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(owner), attribute))
        torch.testing.assert_close(model(x), plain(x))
    assert model.second.weight.equal(model.first.weight)
    with warnings.catch_warnings(action="ignore"):
        sparsity.finalize()
    assert model.second.weight is model.first.weight
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    model(x)
    copy.deepcopy(model)


STRUCTURES: dict[str, Callable[[Tensor], list[Tensor]]] = {  # the dimensions of a group's weights, last
    "filter": lambda m: [m.flatten(1)],
    "channel": lambda m: [m.transpose(0, 1).flatten(1)],
    "kernel": lambda m: [m.flatten(2).flatten(0, 1)],
    "block:2x4": lambda m: [m.unfold(0, 2, 2).unfold(1, 4, 4).flatten(0, -3).flatten(1)],
    "filter*block:2x4": lambda m: [m.unfold(1, 4, 4).flatten(0, -2)],
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_of_a_group_live_or_die_together_by_one_score(structure: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    method = gs.ContinuousSparsification(rounds=1, length=1, structure=structure)
    sparsity = gs.attach(model, method, optimizer)
    (scores,) = (p for name, p in model.named_parameters() if ".scores." in name)
    scores.data.copy_(torch.arange(len(scores)) % 3 - 1.0)
    sparsity.update("ticket")
    (groups,) = STRUCTURES[structure](sparsity.masks()["0.weight"])
    assert len(groups) == len(scores)
    assert (groups.all(1) | ~groups.any(1)).all()
    assert int(groups.any(1).sum()) == sum(i % 3 == 2 for i in range(len(scores)))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(6, 8, num_layers=2), lambda: nn.GRU(6, 8), lambda: nn.RNN(6, 8)])
def test_a_hidden_unit_has_one_score_for_its_weights_in_all_gates_and_layers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.ContinuousSparsification(rounds=1, length=1, structure="iss"), optimizer)
    scores = sparsity.param_groups()[0]["params"]
    assert [len(each) for each in scores] == [8] * (2 if isinstance(model, nn.LSTM) else 1)
    for each in scores:
        each.data.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0]))
    sparsity.update("ticket")
    lives = scores[0] > 0
    for name, mask in sparsity.masks().items():
        rows = mask.view(-1, 8, mask.shape[1])
        own_columns = name != "weight_ih_l0"
        expected = lives[None, :, None] & (
            lives[None, None, :] if own_columns else torch.ones(1, 1, 6, dtype=torch.bool)
        )
        assert rows.equal(expected.expand_as(rows)), name
    model(torch.randn(3, 2, 6))[0].sum().backward()
    optimizer.step()
    sparsity.finalize()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_under_a_ticket_pruned_weights_stay_zero_whatever_they_and_their_gradients_are(optimizer: str) -> None:
    row = LEARNED[0]
    runs = [Run(row.make(), optimizer, row.scatter).train(row.steps) for _ in range(2)]
    for number, run in enumerate(runs):
        masks = run.sparsity.masks()
        run.model.zero_grad()
        x = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(3))
        run.model(x).square().sum().backward()
        for name, mask in masks.items():
            owner, _, attribute = name.rpartition(".")
            weight = run.model.get_submodule(owner).parametrizations[attribute].original
            if number:
                pruned = int((~mask).sum())
                weight.data[~mask] = torch.tensor([float("nan"), float("inf"), -0.0, 1.0]).repeat(pruned)[:pruned]
                weight.grad[~mask] = -3.0
        run.optimizer.step()
        for name, mask in masks.items():
            owner, _, attribute = name.rpartition(".")
            weight = run.model.get_submodule(owner).parametrizations[attribute].original
            assert not bits(weight)[~mask].any()
    weights = [[p for name, p in run.model.named_parameters() if ".scores." not in name] for run in runs]
    assert all(a.equal(b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("row", ROWS)
def test_what_cannot_have_gates_is_refused_and_nothing_has_changed(row: LearnedRow) -> None:
    name = row.method.__name__

    def attach(model: nn.Module, **options: Any) -> None:
        keys = list(model.state_dict())
        try:
            gs.attach(model, row.make(**options.pop("method", {})), **options)
        finally:
            assert list(model.state_dict()) == keys

    with pytest.raises(gs.ConfigurationError, match=f"{name}: no weight to make sparse in Sequential"):
        attach(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(gs.ConfigurationError, match="'nothing' matches no weight"):
        attach(TinyNet(), method={"targets": "nothing"})
    frozen = TinyNet()
    frozen.head.weight.requires_grad_(False)
    with pytest.raises(gs.ConfigurationError, match=r"head.weight: is frozen .*targets=\['!head.weight'\]"):
        attach(frozen)
    with pytest.raises(gs.ConfigurationError, match=f"{name}: masks: they are learned here"):
        attach(TinyNet(), masks="zeros")
    with pytest.raises(gs.ConfigurationError, match=f"{name}: masks: they are learned here"):
        attach(TinyNet(), masks={"head.weight": torch.ones(4, 16)})
    with pytest.raises(gs.ConfigurationError, match="belongs to both"):
        gs.attach(TinyNet(), [row.make(), gs.SET(0.5, targets="head*")])
    hashed = TinyNet()
    gs.nn.hash_weight(hashed.hidden, "weight", size=64)
    with pytest.raises(gs.ConfigurationError, match=r"hidden\.weight: is computed from other numbers"):
        attach(hashed)
    with pytest.raises(gs.ConfigurationError, match=f"{name}: penalty: .*-1"):
        row.make(penalty=-1.0)
    with pytest.raises(gs.ConfigurationError, match=f"{name}: lr: .*-1"):
        row.make(lr=-1.0)


@pytest.mark.parametrize("row", ROWS)
def test_a_hard_method_beside_it_keeps_its_masks(row: LearnedRow) -> None:
    run = Run([row.make(targets="hidden*"), gs.SET(0.5, every=2, targets=["conv*", "head*"], distribution="uniform")])
    run.train(row.steps)
    masks = run.sparsity.masks()
    for name in ("conv.weight", "head.weight"):
        assert int((~masks[name]).sum()) == masks[name].numel() // 2
        assert not bits(run.model.get_parameter(name))[~masks[name]].any()


@pytest.mark.parametrize("row", ROWS)
def test_a_damaged_state_is_refused_and_changes_nothing(row: LearnedRow) -> None:
    run = Run(row.make(), scatter=row.scatter).train(row.steps)
    saved, before = run.sparsity.state_dict(), run.everything()
    for key in saved["methods"][0]["state"]:
        broken = copy.deepcopy(saved)
        broken["methods"][0]["state"][key] = "nonsense"
        with pytest.raises(gs.StateError, match=f"^{row.method.name}: "):
            run.sparsity.load_state_dict(broken)
        assert run.everything() == before
