"""What the engine promises to methods that learn, and that go from soft to hard masks: a toy method that does both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrize

import gossamer as gs
from gossamer import targets
from gossamer.masks import Change, MaskedTensor
from gossamer.method import Proposal, StateOf


class Gate(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.linspace(-1, 1, shape.numel()).view(shape))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.sigmoid(self.temperature * self.scores)


class Toy(gs.Method):
    """Sigmoid gates that become hard masks at step `hard_at`."""

    name = "toy"

    def __init__(self, hard_at: int = 10**9, rate: float | None = None) -> None:
        self.hard_at, self.rate, self.steps = hard_at, rate, []
        self.tensors: list[MaskedTensor] = []

    def bind(self, model: nn.Module, masks: Any) -> None:
        self.targets = targets.select(model, None)

    def claims(self) -> list[targets.Target]:
        return self.targets

    def install(self) -> None:
        for target in self.targets:
            gate = Gate(target.parameter.shape)
            for owner, attribute in target.places:
                parametrize.register_parametrization(owner, attribute, gate)

    def gates(self) -> list[Gate]:
        places = [target.places[0] for target in self.targets]
        return [owner.parametrizations[attribute][0] for owner, attribute in places]

    def param_groups(self) -> list[dict[str, Any]]:
        group: dict[str, Any] = {"params": [gate.scores for gate in self.gates()], "weight_decay": 0.0}
        return [group if self.rate is None else group | {"lr": self.rate}]

    def loss_term(self) -> Tensor:
        return torch.stack([gate.scores.sigmoid().sum() for gate in self.gates()]).sum()

    def due(self, step: int) -> bool:
        return step == self.hard_at

    def harden(self) -> None:
        self.tensors = [MaskedTensor(target) for target in self.targets]

    def update(self, step: int, state: StateOf) -> Proposal:
        self.harden()
        masks = [(gate.scores > 0).to(torch.int8).neg_() for gate in self.gates()]
        return Proposal([Change(t, m) for t, m in zip(self.tensors, masks, strict=True)])

    def after_step(self, step: int) -> None:
        self.steps.append(step)
        for gate in self.gates():
            gate.temperature.fill_(1.5**step)

    def learned(self) -> list[dict[str, Any]]:
        if not parametrize.is_parametrized(self.targets[0].places[0][0]):
            return []
        rows = zip(self.targets, self.gates(), strict=True)
        return [{"name": target.name, "gate": gate.scores.mean().item()} for target, gate in rows]

    def state_dict(self) -> dict[str, Any]:
        return {"hard": bool(self.tensors)}

    def load_state_dict(self, state: Any) -> None:
        self.tensors = []
        if state["hard"]:
            self.harden()

    def finalize(self) -> None:
        for target in self.targets:
            for owner, attribute in target.places:
                parametrize.remove_parametrizations(owner, attribute)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def train(model: nn.Module, optimizer: optim.Optimizer, sparsity: gs.Sparsity, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        (model(x).square().mean() + 1e-3 * sparsity.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_learned_parameters_are_trained_without_weight_decay_in_the_documented_order():
    model = net()
    sparsity = gs.attach(model, Toy(rate=0.5))
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
    sparsity.follow(optimizer)
    learned = {id(p) for p in sparsity.param_groups()[0]["params"]}
    groups = [group for group in optimizer.param_groups if any(id(p) in learned for p in group["params"])]
    assert [(g["weight_decay"], g["lr"], {id(p) for p in g["params"]}) for g in groups] == [(0.0, 0.5, learned)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_learned_parameters_do_not_go_to_muon():
    model = net()
    sparsity = gs.attach(model, Toy())
    weights = [p for n, p in model.named_parameters() if n.endswith("original")]
    others = [p for n, p in model.named_parameters() if n.endswith("bias")]
    muon, adamw = optim.Muon(weights, lr=0.01), optim.AdamW(others, lr=0.01)
    sparsity.follow([muon, adamw])
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(others) + 2


def test_masks_that_become_hard_midway_are_in_force_from_then_on():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsity = gs.attach(model, Toy(hard_at=3), optimizer)
    train(model, optimizer, sparsity, 2)
    assert not sparsity.masks()
    train(model, optimizer, sparsity, 6)
    masks = sparsity.masks()
    assert set(masks) == {"0.weight", "2.weight"}
    for layer in (model[0], model[2]):
        original = layer.parametrizations.weight.original
        mask = masks["0.weight" if layer is model[0] else "2.weight"]
        assert 0 < int(mask.sum()) < mask.numel()
        assert not original[~mask].any()
    expected = sparsity.finalize()
    assert expected is model
    assert set(model.state_dict()) == set(net().state_dict())


def test_hard_masks_of_a_learning_method_are_restored():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, Toy(hard_at=2), optimizer)
    train(model, optimizer, sparsity, 4)
    state = copy.deepcopy((model.state_dict(), sparsity.state_dict()))
    other = net()
    restored = gs.attach(other, Toy(hard_at=2), optimizer := None)
    restored.follow(optim.SGD(other.parameters(), lr=0.1))
    other.load_state_dict(state[0])
    restored.load_state_dict(state[1])
    assert all(mask.equal(sparsity.masks()[name]) for name, mask in restored.masks().items())
    assert len(restored.masks()) == 2


def test_a_saved_mask_that_no_method_claims_is_refused():
    model = net()
    sparsity = gs.attach(model, gs.SET(0.5), optim.SGD(model.parameters(), lr=0.1))
    state = sparsity.state_dict()
    state["masks"]["9.weight"] = state["masks"]["0.weight"]
    with pytest.raises(gs.StateError, match=r"has a mask of 9\.weight"):
        sparsity.load_state_dict(state)


def test_steps_are_told_once_each_also_where_a_fused_optimizer_skips_them():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
    sparsity = gs.attach(model, Toy(), optimizer)
    for overflow in (0.0, 1.0, 0.0):
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.found_inf = torch.tensor(overflow)
        optimizer.grad_scale = torch.tensor(1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert sparsity.methods[0].steps == [1, 2]


def test_nan_at_one_pruned_weight_is_an_error_for_n_of_m_too():
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.RigL(structure="2:4", every=2), optimizer)
    model(torch.randn(4, 32)).sum().backward()
    model[0].weight.grad[~sparsity.masks()["0.weight"]] = torch.nan
    before = sparsity.masks()["0.weight"]
    with pytest.raises(gs.NonFiniteError, match=r"0\.weight: its scores contain NaN"):
        sparsity.update()
    assert sparsity.masks()["0.weight"].equal(before)


def test_a_failed_update_is_made_at_the_next_step_and_changes_no_other_method():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    methods = [gs.DSR(0.5, every=2, threshold=1e-6, targets="0.*"), gs.RigL(0.5, every=2, targets="1.*")]
    sparsity = gs.attach(model, methods, optimizer)
    updates: list[gs.MaskUpdate] = []
    sparsity.on_update(updates.append)
    for step in range(1, 4):
        model(torch.randn(4, 16)).sum().backward()
        if step == 2:
            state = sparsity.state_dict()
            good = model[1].weight.grad.clone()
            model[1].weight.grad.fill_(torch.nan)
            with pytest.raises(gs.NonFiniteError):
                optimizer.step()
            after = sparsity.state_dict()
            assert after["step"] == state["step"] == 1
            assert after["methods"][0]["state"]["threshold"] == state["methods"][0]["state"]["threshold"]
            generators = [each["methods"][0]["state"]["generator"] for each in (state, after)]
            assert generators[0].equal(generators[1])
            model[1].weight.grad.copy_(good)
        optimizer.step()
        optimizer.zero_grad()
    assert [(update.step, update.method) for update in updates] == [(2, "dsr"), (2, "rigl")]


def test_a_subclass_that_calls_its_base_class_counts_a_step_once():
    class Mine(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = nn.Sequential(nn.Linear(8, 8))
    optim.SGD(model.parameters(), lr=0.1)
    optimizer = Mine(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.SET(0.5, every=2), optimizer)
    for _ in range(5):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    assert sparsity.step == 5


def test_dense_training_is_noticed_where_the_handle_was_dropped_or_weights_were_added_to_another_optimizer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    gs.attach(model, gs.Static(0.5, targets="0.*"))
    optimizer = optim.SGD(model[1].parameters(), lr=0.1)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(gs.OrderError, match=r"0\.weight: has a mask, but no sparsity\.follow"):
        optimizer.step()


def test_pruning_a_model_with_live_masks_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsity = gs.attach(model, gs.Static(0.5))
    with pytest.raises(gs.OrderError, match=r"0\.weight: already has a mask"):
        gs.prune(model, 0.9)
    sparsity.detach()
    gs.prune(model, 0.9)


def test_rigl_decays_its_drop_fraction_to_the_end_of_a_schedule():
    every = gs.schedule.EpochPeriods({0: 2}, steps_per_epoch=10, until=4)
    by_schedule, by_until = gs.RigL(0.5, every=every), gs.RigL(0.5, every=2, until=40)
    assert [by_schedule.fraction(step) for step in (2, 20, 38)] == [by_until.fraction(step) for step in (2, 20, 38)]
    assert by_schedule.fraction(38) < 0.01


def test_blocks_are_ranked_by_the_sum_of_a_score_that_has_a_sign():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    model[0].weight.grad = torch.tensor([[5.0, 5.0], [-1.0, -1.0]])  # the first row moves to zero, the second away
    gs.prune(model, 0.5, score="movement", structure="block:1x2", distribution="uniform")
    assert model[0].weight.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_a_score_that_returns_the_gradient_itself_leaves_it_whole():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight.grad = torch.randn(4, 4)
    before = model[0].weight.grad.clone()
    gs.prune(model, 0.5, score=lambda view: view.gradient, distribution="uniform")
    assert model[0].weight.grad.equal(before)


def test_a_budget_over_all_parameters_is_for_one_method_alone():
    model = net()
    methods = [gs.SET(0.5, targets="0.*", over="all"), gs.SET(0.5, targets="2.*")]
    with pytest.raises(gs.ConfigurationError, match="over='all' counts every other weight as dense"):
        gs.attach(model, methods)


class Renewal(gs.Static):
    """Moves the mask of the first row to the second, and lets the third begin anew at a value."""

    def due(self, step: int) -> bool:
        return step == 3

    def update(self, step: int, state: StateOf) -> Proposal:
        (tensor,) = self.tensors
        mask, renewed = tensor.mask[[1, 0, 2]], torch.zeros_like(tensor.mask)
        renewed[2] = -1
        values = torch.full(tensor.shape, 0.25)
        return Proposal([Change(tensor, mask, renewed, values)])


@pytest.mark.parametrize("fused", [False, True])
def test_a_method_can_renew_active_weights_and_give_grown_ones_a_value(fused: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]])
    optimizer = optim.Adam(model.parameters(), lr=0.0, fused=fused)
    sparsity = gs.attach(model, Renewal(), optimizer, masks={"0.weight": mask})
    updates: list[gs.MaskUpdate] = []
    sparsity.on_update(updates.append)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    weight, moment = model[0].weight.detach(), optimizer.state[model[0].weight]["exp_avg"]
    assert weight[:2].eq(torch.tensor([[0, 0, 0.25, 0.25], [0.25, 0.25, 0, 0]])).all()
    assert weight[2].eq(torch.tensor([0.25, 0.25, 0, 0])).all()
    gradient = model[0].weight.grad
    fresh = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]) != 0
    assert torch.allclose(moment[fresh], 0.1 * gradient[fresh])  # one step since they began
    (row,) = updates[0].rows
    assert (row["pruned"], row["grown"], row["active"]) == (4, 4, 6)


def test_what_was_learned_is_in_the_summary():
    sparsity = gs.attach(net(), [Toy()])
    summary = sparsity.summary()
    assert [(row["method"], row["name"]) for row in summary.learned] == [("toy", "0.weight"), ("toy", "2.weight")]
    assert "gate" in str(summary)
    assert summary.as_dict()["learned"] == summary.learned


# -- weights that are claimed before their masks are hard ------------------------------------------------------------


def test_an_optimizer_without_the_weights_of_a_learning_method_is_refused():
    model = net()
    sparsity = gs.attach(model, Toy())
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    with pytest.raises(gs.OrderError, match=r"0\.weight: is in 0 of the 1 optimizers"):
        sparsity.follow(optim.SGD(biases, lr=0.1))


def test_a_frozen_weight_of_a_learning_method_is_refused():
    model = net()
    model[0].weight.requires_grad_(False)
    with pytest.raises(gs.ConfigurationError, match=r"0\.weight: is frozen"):
        gs.attach(model, Toy())
    assert not parametrize.is_parametrized(model[0])


def test_an_unfollowed_optimizer_of_a_learning_method_is_noticed():
    model = net()
    sparsity = gs.attach(model, Toy())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gs.OrderError, match=r"0\.weight: has a mask, but no sparsity\.follow"):
        train(model, optimizer, sparsity, 1)


def test_the_summary_counts_soft_weights_as_active_and_learned_parameters_not_at_all():
    plain = sum(parameter.numel() for parameter in net().parameters())
    model = net()
    sparsity = gs.attach(model, Toy(hard_at=1), optimizer := optim.SGD(model.parameters(), lr=0.1))
    before = sparsity.summary()
    assert [(row["structure"], row["active"]) for row in before.rows] == [("soft", 48), ("soft", 32)]
    assert (before.totals["all_total"], before.totals["all_nonzero"], sparsity.density()) == (plain, plain, 1.0)
    train(model, optimizer, sparsity, 1)
    after = sparsity.summary()
    assert [row["structure"] for row in after.rows] == ["element", "element"]
    active = sum(int(mask.sum()) for mask in sparsity.masks().values())
    assert after.totals["all_nonzero"] == plain - 80 + active
    sparsity.finalize()
    assert sparsity.summary().totals == after.totals


def test_a_tied_weight_is_gated_wherever_it_is_used():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    sparsity = gs.attach(model, Toy())
    (target,) = sparsity.methods[0].targets
    assert [owner for owner, _ in target.places] == [model[0], model[2]]
    assert all(parametrize.is_parametrized(layer, "weight") for layer in (model[0], model[2]))


def test_a_saved_state_decides_whether_masks_are_hard():
    def make() -> tuple[nn.Sequential, optim.Optimizer, gs.Sparsity]:
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, gs.attach(model, Toy(hard_at=2), optimizer)

    model, optimizer, sparsity = make()
    train(model, optimizer, sparsity, 1)
    soft = copy.deepcopy(sparsity.state_dict())
    train(model, optimizer, sparsity, 2)
    hard = copy.deepcopy(sparsity.state_dict())
    assert (len(soft["masks"]), len(hard["masks"])) == (0, 2)
    sparsity.load_state_dict(soft)
    assert not sparsity.masks()
    sparsity.load_state_dict(hard)
    assert len(sparsity.masks()) == 2

    damaged = copy.deepcopy(hard)
    damaged["masks"]["0.weight"] = damaged["masks"]["0.weight"][:3]
    other = make()[2]
    with pytest.raises(gs.StateError, match=r"the mask of 0\.weight is for shape"):
        other.load_state_dict(damaged)
    assert not other.masks()
    assert other.step == 0


# -- completed steps -------------------------------------------------------------------------------------------------


class Snapshots(gs.Static):
    """Notes the weights after every completed step."""

    def install(self) -> None:
        super().install()
        self.notes: list[tuple[int, Tensor]] = []

    def after_step(self, step: int) -> None:
        self.notes.append((step, torch.cat([p.detach().flatten() for p in self.model.parameters()])))

    def bind(self, model: nn.Module, masks: Any) -> None:
        super().bind(model, masks)
        self.model = model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_step_is_complete_when_the_last_optimizer_has_stepped():
    model = nn.Sequential(nn.Linear(6, 4))
    optimizers = [optim.SGD([model[0].weight], lr=0.1), optim.SGD([model[0].bias], lr=0.1)]
    sparsity = gs.attach(model, Snapshots(0.5), optimizers)
    for step in range(1, 4):
        model(torch.ones(2, 6)).sum().backward()
        optimizers[0].step()
        assert len(sparsity.methods[0].notes) == step - 1
        optimizers[1].step()
        assert sparsity.methods[0].notes[-1][0] == step
        assert sparsity.methods[0].notes[-1][1].equal(flat(model))


def test_a_step_whose_last_optimizer_was_left_out_is_told_before_the_next_and_before_saving():
    model = nn.Sequential(nn.Linear(6, 4))
    optimizers = [optim.SGD([model[0].weight], lr=0.1), optim.SGD([model[0].bias], lr=0.1)]
    sparsity = gs.attach(model, Snapshots(0.5), optimizers)
    for skipped in (True, False, True):
        model(torch.ones(2, 6)).sum().backward()
        optimizers[0].step()
        if not skipped:
            optimizers[1].step()
    assert [step for step, _ in sparsity.methods[0].notes] == [1, 2]
    sparsity.state_dict()
    assert [step for step, _ in sparsity.methods[0].notes] == [1, 2, 3]


# -- the end, and other ways to begin ----------------------------------------------------------------------------------


class Late(gs.Static):
    """Writes negative zeros when it is finalized, as a product with a mask does."""

    detached = False

    def finalize(self) -> None:
        for tensor in self.tensors:
            tensor.parameter.mul_(-1)

    def detach(self) -> None:
        self.detached = True


def test_zeros_are_enforced_after_a_method_was_finalized_and_it_is_not_detached_as_well():
    model = nn.Sequential(nn.Linear(6, 4))
    sparsity = gs.attach(model, Late(0.5), optim.SGD(model.parameters(), lr=0.1))
    sparsity.finalize()
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()
    assert not sparsity.methods[0].detached


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_optimizer_that_steps_can_be_followed_of_itself(fused: bool):
    model = net()
    sparsity = gs.attach(model, gs.SET(0.5, every=2), optimizer="auto")
    zeros = [(parameter == 0).sum() for parameter in model.parameters()]
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    for _ in range(5):
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        assert [(parameter == 0).sum() for parameter in model.parameters()] >= zeros
        assert all(not parameter[~mask].any() for parameter, mask in _masked(model, sparsity))
    assert sparsity.step == 5
    other = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        gs.OrderError, match=r"0\.weight: has a mask, and sparsity\.follow was called with SGD, not with"
    ):
        other.step()


def _masked(model: nn.Module, sparsity: gs.Sparsity) -> list[tuple[nn.Parameter, Tensor]]:
    return [(model.get_parameter(name), mask) for name, mask in sparsity.masks().items()]


class Thin(gs.Static):
    """Offers a phase with an argument."""

    def phases(self) -> dict[str, Any]:
        return {"keep_rows": self.keep_rows}

    def keep_rows(self, step: int, state: StateOf, rows: int) -> Proposal:
        (tensor,) = self.tensors
        mask = tensor.mask.clone()
        mask[rows:] = 0
        return Proposal([Change(tensor, mask)])


def test_a_phase_can_take_arguments():
    model = nn.Sequential(nn.Linear(6, 4))
    sparsity = gs.attach(model, Thin(0.0))
    sparsity.update("keep_rows", rows=1)
    assert sparsity.masks()["0.weight"].sum(1).tolist() == [6, 0, 0, 0]
    assert sparsity.density() == 0.25


def test_an_update_by_hand_that_fails_changes_no_other_method():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsity = gs.attach(model, [gs.DSR(0.5, threshold=0.05, targets="0.*"), gs.RigL(0.5, targets="1.*")])
    before = copy.deepcopy(sparsity.state_dict())
    with pytest.raises(gs.ConfigurationError, match="no weight has a gradient"):
        sparsity.update()
    after = sparsity.state_dict()
    for one, two in zip(before["methods"], after["methods"], strict=True):
        assert one["state"].pop("generator").equal(two["state"].pop("generator"))
        assert one["state"] == two["state"]


@pytest.mark.parametrize("options", [{"prune_fraction": 0.9}, {"prune_count": 2}])
def test_the_threshold_stays_finite_where_nothing_is_left_to_prune(options: dict[str, Any]):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    sparsity = gs.attach(model, gs.DSR(0.97, gain=1e10, **options))
    for _ in range(50):
        sparsity.update()
    assert 0 < sparsity.methods[0].threshold < float("inf")
    sparsity.load_state_dict(sparsity.state_dict())
