"""Scores of weights and of groups, and what a score may look at."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gossamer as gs
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups
from gossamer.masks import MaskedTensor
from gossamer.scores import SCORES, View, as_score
from gossamer.structure import NM, Block, Element
from gossamer.targets import Target


def masked(shape=(4, 6), seed=0, with_gradient=True):
    generator = torch.Generator().manual_seed(seed)
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.randn(shape, generator=generator))
    if with_gradient:
        owner.weight.grad = torch.randn(shape, generator=generator)
    return MaskedTensor(Target("layer.weight", ((owner, "weight"),), 1))


def groups_of(tensor, structure=None):
    return Groups(tensor, structure or Element())


def no_state(tensor):
    return {}


FORMULAS = {
    "magnitude": lambda w, g, m: abs(w),
    "gradient": lambda w, g, m: abs(g),
    "momentum": lambda w, g, m: abs(m),
    "movement": lambda w, g, m: -w * g,
}


def test_every_score_has_a_formula_here():
    assert set(SCORES) == set(FORMULAS)


@pytest.mark.parametrize("name", list(FORMULAS))
@pytest.mark.parametrize("part", [None, [5, 0, 23, 7]], ids=["all", "some"])
def test_score_is_its_formula_and_a_new_tensor(name, part):
    tensor = masked()
    momentum = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    index = None if part is None else torch.tensor(part)
    view = View(tensor, {"exp_avg": momentum}, index)
    score = SCORES[name](view)
    triples = zip(*(x.flatten().tolist() for x in (tensor.parameter, tensor.parameter.grad, momentum)), strict=True)
    expected = [FORMULAS[name](*triple) for triple in triples]
    expected = expected if part is None else [expected[i] for i in part]
    assert score.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert score.shape == view.weight.shape
    before = [tensor.parameter.clone(), tensor.parameter.grad.clone(), momentum.clone()]
    score.fill_(7.0)
    assert all(x.equal(y) for x, y in zip(before, (tensor.parameter, tensor.parameter.grad, momentum), strict=True))


def test_movement_is_positive_where_a_step_makes_a_weight_larger():
    tensor = masked()
    movement = SCORES["movement"](View(tensor, {}))
    after = tensor.parameter.detach() - 1e-3 * tensor.parameter.grad
    assert ((movement > 0) == (after.abs() > tensor.parameter.detach().abs())).all()


@pytest.mark.parametrize("name", ["gradient", "movement"])
def test_score_by_a_gradient_that_is_missing_is_refused(name):
    with pytest.raises(
        ConfigurationError, match=r"layer.weight: has no gradient, which its score needs: it took no part"
    ):
        groups_of(masked(with_gradient=False)).scores(as_score(name), no_state)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p, lr=0.1), "exp_avg"),
        (lambda p: torch.optim.Adamax(p, lr=0.1), "exp_avg"),
    ],
)
def test_momentum_is_the_running_mean_the_optimizer_keeps(make, key):
    tensor = masked()
    optimizer = make([tensor.parameter])
    with pytest.raises(ConfigurationError, match="and has made a step; the state here has nothing"):
        View(tensor, optimizer.state.get(tensor.parameter, {})).momentum  # noqa: B018 - reading it raises
    optimizer.step()
    state = optimizer.state[tensor.parameter]
    assert View(tensor, state).momentum.equal(state[key])
    assert state[key].ne(0).any()


def test_momentum_of_an_optimizer_that_keeps_none_is_refused():
    tensor = masked()
    optimizer = torch.optim.RMSprop([tensor.parameter], lr=0.1)
    optimizer.step()
    with pytest.raises(
        ConfigurationError, match=r"layer.weight: score 'momentum' needs .* the state here has \['square_avg'"
    ):
        groups_of(tensor).scores(as_score("momentum"), lambda tensor: optimizer.state[tensor.parameter])


@pytest.mark.parametrize("structure", [Element(), NM(1, 3), Block(2, 3)], ids=str)
@given(p=st.sampled_from([1.0, 2.0, 3.0]), seed=st.integers(0, 50), name=st.sampled_from(["gradient", "movement"]))
def test_group_score_is_the_norm_of_the_scores_of_its_weights_or_their_sum_where_signed(structure, p, seed, name):
    tensor = masked(seed=seed)
    score = as_score(name)
    weights = score(View(tensor, {}))
    groups = groups_of(tensor, structure)
    whole = groups.scores(score, no_state, p)
    if isinstance(structure, Block):
        blocks = [weights[r : r + 2, c : c + 3] for r in (0, 2) for c in (0, 3)]
        signed = [block.sum() for block in blocks]
        norms = [block.abs().pow(p).sum().pow(1 / p) for block in blocks]
        torch.testing.assert_close(whole, torch.stack(signed if name == "movement" else norms))
    else:
        assert whole.equal(weights.flatten())  # single weights keep their sign
    index = torch.tensor([groups.total - 1, 0, 1])
    assert groups.scores(score, no_state, p, index).equal(whole[index])


def test_blocks_that_training_shrinks_are_worth_less_than_those_it_grows():
    tensor = masked()
    with torch.no_grad():
        tensor.parameter.grad.copy_(tensor.parameter)  # a step makes every weight smaller
        tensor.parameter.grad[:2, :3].neg_()  # but not those of the first block
    scores = groups_of(tensor, Block(2, 3)).scores(as_score("movement"), no_state)
    assert scores[0] > 0
    assert (scores[1:] < 0).all()


@pytest.mark.parametrize("structure", [Element(), NM(1, 3), Block(2, 3)], ids=str)
def test_ranking_by_the_weights_themselves_does_not_change_them(structure):
    tensor = masked()
    before = tensor.parameter.detach().clone()
    for score in (lambda view: view.weight, lambda view: view.gradient):
        groups_of(tensor, structure).scores(score, no_state).fill_(7.0)
    assert tensor.parameter.equal(before)


@pytest.mark.parametrize("index", [None, torch.tensor([0, 5])], ids=["all", "some"])
def test_score_of_another_shape_is_refused(index):
    with pytest.raises(ConfigurationError, match=r"layer.weight: its score has shape \(\), expected \((4, 6|2,)\)"):
        groups_of(masked()).scores(lambda view: view.weight.sum(), no_state, index=index)


def test_score_may_be_a_function_of_a_view():
    def distance_to_one(view):
        assert view.name == "layer.weight"
        return -(view.weight - 1).abs()

    assert as_score(distance_to_one) is distance_to_one
    tensor = masked()
    expected = -(tensor.parameter.detach() - 1).abs().flatten()
    assert groups_of(tensor).scores(distance_to_one, no_state).equal(expected)


def test_unknown_score_lists_the_known():
    with pytest.raises(
        ConfigurationError, match=r"score: got 'magnitud'; allowed are 'magnitude', .*did you mean 'magnitude'"
    ):
        as_score("magnitud")


@pytest.mark.parametrize("score", ["gradient", "movement"])
def test_pruning_by_gradient_before_any_backward_is_refused_and_changes_nothing(score):
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with pytest.raises(ConfigurationError, match="weight: has no gradient, which its score needs"):
        gs.prune(model, 0.5, score=score)
    assert model.weight.equal(before)
    model(torch.ones(2, 4)).sum().backward()
    assert gs.prune(model, 0.5, score=score).totals["targets_active"] == 8


def test_pruning_by_momentum_without_an_optimizer_is_refused():
    with pytest.raises(ConfigurationError, match="weight: score 'momentum' needs an optimizer"):
        gs.prune(nn.Linear(4, 4), 0.5, score="momentum")
