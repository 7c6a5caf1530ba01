"""The `dst` names over the engine: golden counts, tables as the pack prints them, each step as specified."""

import copy
import io
from math import floor

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.compat import dst
from gossamer.structure import as_structure
from gossamer.zoo import cifar_wrn

SUM_TABLE = """\
+--------------------+---------------------+--------------------+--------------------------------+----------+
| # total parameters | # sparse parameters | # dense parameters | # nonzero parameters in sparse | sparsity |
+--------------------+---------------------+--------------------+--------------------------------+----------+
|            1467610 |             1451520 |              16090 |                         130671 |   0.9000 |
+--------------------+---------------------+--------------------+--------------------------------+----------+"""

STATS_TABLE = """\
+---------------------+---------+-----------+----------+
|    Parameter tensor | # total | # nonzero | sparsity |
+---------------------+---------+-----------+----------+
|   model.conv.weight |     216 |        81 |   0.6250 |
| model.linear.weight |     720 |       360 |   0.5000 |
+---------------------+---------+-----------+----------+"""


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = dst.DSConv2d(3, 8, 3, structure="filter")
        self.linear = dst.DSLinear(72, 10)
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.head(torch.tanh(self.linear(x.flatten(1))))


def batch(step):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps, reparameterize=True):
    for step in steps:
        model(batch(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if reparameterize:
            model.reparameterize()


def assert_zeros(model):
    for (name, parameter), mask in zip(model.named_sparse_parameters(), model.handle.masks().values(), strict=True):
        assert not parameter[~mask].any(), name


@pytest.fixture
def small():
    return gs.DSModel(Small(), target_sparsity=0.5, pruning_threshold=0.05)


# -- golden -----------------------------------------------------------------------------------------------------------


def test_wide_resnet_has_the_counts_and_the_table_of_the_pack():
    model = gs.DSModel(cifar_wrn(depth=28, width=2), target_sparsity=0.9)
    assert (model.np_total, model.np_sparse, model.np_dense) == (1_467_610, 1_451_520, 16_090)
    assert model.np_nonzero == floor(0.1 * 1_467_610) - 16_090 == 130_671
    assert model.sum_table == SUM_TABLE
    assert len(list(model.sparse_parameters())) == 24
    sizes = [parameter.numel() for parameter in model.sparse_parameters()]
    assert sizes == [4608, *[9216] * 7, 18432, *[36864] * 7, 73728, *[147456] * 7]  # the rows of the pack's table


def test_budget_is_exact_after_a_thousand_reparameterizations():
    torch.manual_seed(0)
    model = gs.DSModel(cifar_wrn(depth=28, width=2), target_sparsity=0.9)
    generator = torch.Generator().manual_seed(0)
    threshold, pruned, shares = model.pruning_threshold, [], set()
    model.handle.on_update(lambda update: pruned.append(sum(row["pruned"] for row in update.rows)))
    for _ in range(1000):
        with torch.no_grad():  # what training would make of newly grown weights, which are zero
            for parameter, tensor in zip(model.sparse_parameters(), model.handle.methods[0].tensors, strict=True):
                where = torch.randint(parameter.numel(), (300,), generator=generator)
                parameter.view(-1)[where] = torch.randn(300, generator=generator) * (tensor.mask.view(-1)[where] != 0)
        model.reparameterize()
        assert model.np_nonzero == 130_671
        shares.add(tuple(tensor.active for tensor in model.handle.methods[0].tensors))
    assert sum(int(mask.sum()) for mask in model.handle.masks().values()) == 130_671
    assert model.pruning_threshold != threshold
    assert sum(pruned) > 100_000
    assert len(shares) > 500


def test_tables_print_as_those_of_the_pack():
    model = gs.DSModel(Small(), target_sparsity=0.5, targets=["conv*", "linear*"], distribution="uniform")
    model.handle.update("resize", sparsity=0.5)
    rows = [["model.conv.weight", 216, 81, "0.6250"], ["model.linear.weight", 720, 360, "0.5000"]]
    assert dst._table(["Parameter tensor", "# total", "# nonzero", "sparsity"], rows) == STATS_TABLE
    printed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in model.stats_table.splitlines()[3:-1]]
    assert printed == [
        [f"model.{row['name']}", str(row["total"]), str(row["active"]), f"{row['sparsity']:.4f}"]
        for row in model.handle.summary().rows
    ]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_three_steps_compose_to_a_reparameterization(small):
    other = copy.deepcopy(small)
    small.prune_by_threshold()
    assert small.np_nonzero < other.np_nonzero
    small.adjust_pruning_threshold()
    small.reallocate_free_parameters()
    other.reparameterize()
    assert small.np_nonzero == other.np_nonzero
    assert small.pruning_threshold == other.pruning_threshold
    for name, mask in small.handle.masks().items():
        assert mask.equal(other.handle.masks()[name])


@pytest.mark.parametrize(("threshold", "factor"), [(10.0, 0.5), (1e-9, 2.0)])
def test_threshold_halves_where_too_many_were_pruned_and_doubles_where_too_few(threshold, factor):
    model = gs.DSModel(Small(), 0.5, pruning_threshold=threshold)
    model.prune_by_threshold()
    assert model.pruning_threshold == threshold
    model.adjust_pruning_threshold()
    assert model.pruning_threshold == factor * threshold


def test_threshold_stays_within_the_tolerance():
    model = gs.DSModel(Small(), 0.5, target_fraction_to_prune=0.01, pruning_threshold=0.1, structure="element")
    sizes = (
        torch.cat([parameter[parameter != 0].detach().abs() for parameter in model.sparse_parameters()]).sort().values
    )
    intended = round(0.01 * model.np_total)
    model.handle.methods[0].threshold = exact = float((sizes[intended - 1] + sizes[intended]) / 2)
    before = model.np_nonzero
    model.prune_by_threshold()
    assert before - model.np_nonzero == intended
    model.adjust_pruning_threshold()
    assert model.pruning_threshold == exact


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9, None])
def test_prune_or_grow_reaches_the_sparsity_exactly_and_keeps_the_largest(small, sparsity):
    before = [parameter.detach().clone() for parameter in small.sparse_parameters()]
    wanted = 0.5 if sparsity is None else sparsity
    small.prune_or_grow_to_sparsity(sparsity)
    left = floor((1 - wanted) * small.np_total + 1e-9) - small.np_dense
    assert left - 27 < small.np_nonzero <= left  # filters have 27 weights
    assert small.target_sparsity == wanted
    pruned = small.np_nonzero < sum(int(each.count_nonzero()) for each in before)
    for parameter, was in zip(small.sparse_parameters(), before, strict=True):
        kept = (parameter != 0) & (was != 0)
        assert parameter[kept].equal(was[kept])
        if pruned and was.dim() == 2:
            assert was[kept].abs().min() >= was[(was != 0) & ~kept].abs().max()
    small.reparameterize()
    assert left - 27 < small.np_nonzero <= left


def test_random_thinning_leaves_so_many_groups_of_every_tensor(small):
    before = small.handle.masks()
    small.randomly_thin_to_group_sparsity(0.75)
    conv, linear = small.handle.masks().values()
    assert conv.flatten(1).any(1).sum() == 2  # of 8 filters
    assert linear.sum() == 180
    for name, mask in small.handle.masks().items():
        assert not (mask & ~before[name]).any()
    count = small.np_nonzero
    small.randomly_thin_to_group_sparsity(0.1)
    assert small.np_nonzero == count  # sparser tensors stay as they are
    small.reparameterize()
    assert small.np_nonzero <= count


def test_shuffle_moves_the_structure_and_keeps_the_counts(small):
    before, rows = small.handle.masks(), small.update_stats()
    small.shuffle_structure()
    assert small.update_stats() == rows
    assert any((mask != before[name]).any() for name, mask in small.handle.masks().items())
    assert_zeros(small)


def test_shuffle_after_a_pruning_leaves_the_budget_to_be_filled(small):
    count = small.np_nonzero
    small.prune_by_threshold()
    assert small.np_nonzero < count
    small.shuffle_structure()
    small.reallocate_free_parameters()
    assert count - 27 < small.np_nonzero <= count


# -- training ---------------------------------------------------------------------------------------------------------


def test_modules_are_sparse_by_their_own_structures_through_training(small):
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01, weight_decay=0.1)
    budget = small.np_nonzero
    for step in range(10):
        train(small, optimizer, range(step, step + 1))
        assert_zeros(small)
        assert budget - 27 < small.np_nonzero <= budget
        filters = small.handle.masks()["conv.weight"].flatten(1)
        assert filters.any(1).equal(filters.all(1))
    assert [name for name, _ in small.named_sparse_parameters()] == ["model.conv.weight", "model.linear.weight"]
    assert small.model.head.weight.all()


@pytest.mark.parametrize(
    ("cell", "weights"), [(dst.DSRNNCell, 1), (dst.DSLSTMCell, 4), (dst.DSGRUCell, 3)], ids=["rnn", "lstm", "gru"]
)
@pytest.mark.parametrize("structure", ["element", "iss"])
def test_recurrent_cells_are_sparse(cell, weights, structure):
    over = "all" if structure == "element" else "targets"
    model = gs.DSModel(nn.ModuleDict({"cell": cell(6, 8, structure=structure)}), 0.5, over=over)
    assert [name for name, _ in model.named_sparse_parameters()] == ["model.cell.weight_ih", "model.cell.weight_hh"]
    assert model.np_sparse == weights * 8 * (6 + 8)
    model.reparameterize()
    assert 0 < model.np_nonzero < model.np_sparse


def test_transposed_convolution_is_sparse():
    model = gs.DSModel(nn.Sequential(dst.DSConvTranspose2d(4, 6, 3, structure="filter")), 0.5)
    mask = model.handle.masks()["0.weight"]
    assert mask.any(3).any(2).any(0).sum() == 2  # (1 − 0.5) · 222 − 6 biases = 105 weights, 36 in a filter
    assert mask.sum() == 72


def test_saved_state_goes_on_where_it_was(small):
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    train(small, optimizer, range(3))
    file = io.BytesIO()
    torch.save([small.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    other = gs.DSModel(Small(), target_sparsity=0.5, pruning_threshold=0.05)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    for part, state in zip((other, other_optimizer), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(small, optimizer, range(3, 6))
    train(other, other_optimizer, range(3, 6))
    for parameter, copied in zip(small.parameters(), other.parameters(), strict=True):
        assert parameter.equal(copied)
    assert small.pruning_threshold == other.pruning_threshold
    assert small.stats_table == other.stats_table


def test_copy_of_model_and_optimizer_goes_on_alone(small):
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    train(small, optimizer, range(2))
    other, other_optimizer = copy.deepcopy((small, optimizer))
    train(other, other_optimizer, range(2, 5))
    assert_zeros(other)
    count = small.np_nonzero
    train(small, optimizer, range(2, 5))
    assert_zeros(small)
    assert small.np_nonzero == count
    for parameter, copied in zip(small.parameters(), other.parameters(), strict=True):
        assert parameter.equal(copied)


# -- heuristics and bad input -----------------------------------------------------------------------------------------


def test_heuristics_are_those_of_the_pack():
    total, before, left = 100, 40, 30
    shares = {each: each(total, before, left) for each in dst.ReallocationHeuristics}
    assert list(shares.values()) == [30, 10, 70]
    for each in dst.ReallocationHeuristics:
        model = gs.DSModel(Small(), 0.5, heuristic=each)
        assert model.handle.methods[0].heuristic == each.value
        model.reparameterize()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_sparsity": 1.0}, r"DSModel: target_sparsity: expected a number in \[0, 1\), got 1\.0"),
        ({"target_sparsity": 0.9999}, r"leaves .* active weights"),
        (
            {"target_sparsity": 0.5, "target_fraction_to_prune": 0},
            r"DSModel: target_fraction_to_prune: expected",
        ),
        ({"target_sparsity": 0.5, "pruning_threshold": 0}, r"threshold"),
        ({"target_sparsity": 0.5, "heuristic": "papers"}, r"heuristic: got 'papers'.*did you mean 'paper'"),
        ({"target_sparsity": 0.5, "targets": "nothing*"}, r"targets: 'nothing\*' matches no weight"),
        ({"target_sparsity": 0.5, "model": None}, r"model: expected a torch\.nn\.Module, got NoneType"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(gs.ConfigurationError, match=message):
        gs.DSModel(**{"model": Small()} | arguments)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, "0.9", 0.9999])
def test_a_sparsity_that_cannot_be_reached_changes_nothing(small, sparsity):
    masks, target = small.handle.masks(), small.target_sparsity
    for step in (small.prune_or_grow_to_sparsity, small.randomly_thin_to_group_sparsity):
        if sparsity == 0.9999 and step == small.randomly_thin_to_group_sparsity:
            continue  # leaves one group a tensor
        with pytest.raises(gs.ConfigurationError, match="sparsity"):
            step(sparsity)
    assert small.target_sparsity == target
    for name, mask in small.handle.masks().items():
        assert mask.equal(masks[name])


def test_cells_have_one_sparsity():
    model = gs.DSModel(nn.Sequential(nn.Linear(8, 8)), None, structure="2:4", over="targets")
    assert model.np_nonzero == 32
    masks = model.handle.masks()
    for step in (model.prune_or_grow_to_sparsity, model.randomly_thin_to_group_sparsity):
        with pytest.raises(gs.ConfigurationError, match="structure 2:4 says how many weights live"):
            step(0.9)
    assert model.handle.masks()["0.weight"].equal(masks["0.weight"])
    model.shuffle_structure()
    model.reparameterize()
    assert model.handle.masks()["0.weight"].view(-1, 4).sum(1).eq(2).all()


def test_unknown_structure_of_a_module_is_refused():
    with pytest.raises(gs.ConfigurationError, match="structure: got 'filters'; allowed are"):
        dst.DSLinear(4, 4, structure="filters")


def test_one_module_takes_one_structure():
    with pytest.raises(gs.ConfigurationError, match="structure: got a mapping for one DSLinear"):
        dst.DSLinear(4, 4, structure={"*": "row"})


def test_modules_of_one_structure_may_be_n_of_m():
    model = gs.DSModel(nn.Sequential(dst.DSLinear(8, 8, structure="2:4"), dst.DSLinear(8, 8, structure="2:4")), None)
    for mask in model.handle.masks().values():
        assert mask.view(-1, 4).sum(1).eq(2).all()


def test_tied_modules_are_one_sparse_weight():
    first, second = dst.DSLinear(6, 6, structure="row"), dst.DSLinear(6, 6, structure="row")
    second.weight = first.weight
    model = gs.DSModel(nn.Sequential(first, second), 0.5, over="targets")
    assert [name for name, _ in model.named_sparse_parameters()] == ["model.0.weight"]
    assert model.np_nonzero == 18
    second.structure = as_structure("column")
    with pytest.raises(gs.ConfigurationError, match=r"0\.weight: is tied, with structure row.*column"):
        gs.DSModel(nn.Sequential(first, second), 0.5)


def test_names_of_modules_are_no_globs():
    layers = nn.ModuleDict({"a[0]": dst.DSLinear(4, 6, structure="row"), "a0": dst.DSLinear(4, 6, structure="column")})
    model = gs.DSModel(layers, 0.5, over="targets")
    masks = model.handle.masks()
    assert all(row.all() or not row.any() for row in masks["a[0].weight"])
    assert all(column.all() or not column.any() for column in masks["a0.weight"].T)


@pytest.mark.parametrize(
    "change",
    [lambda model: model.prune_or_grow_to_sparsity(0.7), lambda model: model.randomly_thin_to_group_sparsity(0.8)],
    ids=["resized", "thinned"],
)
def test_saved_state_has_the_budget_that_was_changed_by_hand(small, change):
    change(small)
    other = gs.DSModel(Small(), target_sparsity=0.5, pruning_threshold=0.05)
    other.load_state_dict(small.state_dict())
    assert other.target_sparsity == small.target_sparsity
    other.reparameterize()
    assert other.np_nonzero == small.np_nonzero
    with pytest.raises(gs.StateError, match="attach with the sparsity the state was saved with"):
        gs.DSModel(Small(), target_sparsity=0.4).load_state_dict(small.state_dict())


@pytest.mark.parametrize("step", ["resize", "thin", "shuffle"])
def test_frozen_layers_keep_their_masks_in_every_step(small, step):
    small.model.conv.weight.requires_grad_(False)
    before, active = small.handle.masks(), small.np_nonzero
    {
        "resize": lambda: small.prune_or_grow_to_sparsity(0.6),
        "thin": lambda: small.randomly_thin_to_group_sparsity(0.7),
        "shuffle": small.shuffle_structure,
    }[step]()
    after = small.handle.masks()
    assert after["conv.weight"].equal(before["conv.weight"])
    assert not after["linear.weight"].equal(before["linear.weight"])
    expected = {"resize": floor(0.4 * small.np_total) - small.np_dense, "thin": 81 + 216, "shuffle": active}
    assert small.np_nonzero == expected[step]
    small.reparameterize()
    assert small.handle.masks()["conv.weight"].equal(before["conv.weight"])


def test_update_before_the_first_step_gives_grown_weights_fresh_state(small):
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    train(small, optimizer, range(3))
    other = gs.DSModel(Small(), target_sparsity=0.5, pruning_threshold=0.05)
    other.load_state_dict(small.state_dict())
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    saved = copy.deepcopy(optimizer.state_dict())
    small.reparameterize()
    other.reparameterize()
    other_optimizer.load_state_dict(saved)  # only now, with moments from when the weights that grew were active
    for model, each in ((small, optimizer), (other, other_optimizer)):
        train(model, each, range(3, 4), reparameterize=False)
    for parameter, copied in zip(small.parameters(), other.parameters(), strict=True):
        assert parameter.equal(copied)


# -- parameters for modules of one's own ------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, hashed=False, structure="row"):
        super().__init__()
        torch.manual_seed(0)
        first = torch.randn(12, 10) / 3
        dense = dst.HashedParameter(first, 40, seed=1) if hashed else dst.StructuredDenseParameter(first)
        self.weight = dst.StructuredSparseParameter(dense, structure)
        self.head = dst.StructuredSparseParameter(torch.randn(4, 12) / 3, "block:2x3")

    def forward(self, x):
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, self.weight())), self.head())


def both(weight):
    rows = dst.StructuredSparseParameter(weight, "row")
    return [rows, dst.StructuredSparseParameter(rows.dense, "column")]


@pytest.mark.parametrize("hashed", [False, True], ids=["dense", "hashed"])
def test_own_modules_are_sparse_by_their_groupings(hashed):
    own = Own(hashed)
    model = gs.DSModel(own, 0.5, pruning_threshold=0.3, over="targets")
    assert (model.np_total, model.np_sparse, model.np_dense) == (168, 168, 0)
    assert [name for name, _ in model.named_sparse_parameters()] == [
        "model.weight.dense.weight",
        "model.head.dense.weight",
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    bank = own.weight.dense.parameter
    assert tuple(bank.shape) == ((40,) if hashed else (12, 10))
    for step in range(10):
        before = bank.detach().clone()
        model(torch.randn(8, 10, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not bank.equal(before)
        model.reparameterize()
        rows, blocks = own.weight.mask, own.head.mask.view(2, 2, 4, 3).transpose(1, 2).reshape(8, 6)
        assert all(row.all() or not row.any() for row in rows)
        assert all(block.all() or not block.any() for block in blocks)
        assert 84 - 6 < int(rows.sum() + blocks.sum()) <= 84
        assert not own.weight()[~rows].any()
        assert not own.head()[~own.head.mask].any()
        assert own.weight.sparsity == 1 - int(rows.sum()) / 120


@pytest.mark.parametrize("hashed", [False, True], ids=["dense", "hashed"])
def test_groups_of_a_parameter_have_counts_sizes_and_norms(hashed):
    own = Own(hashed)
    (groups,) = own.weight.groups()
    assert (groups.total, groups.size) == (12, 10)
    torch.testing.assert_close(own.weight.norms(), own.weight().detach().norm(dim=1))
    torch.testing.assert_close(own.weight.norms(1.0), own.weight().detach().abs().sum(1))
    both = dst.StructuredSparseParameter(own.weight.dense, "row+column")
    assert [(each.total, each.size) for each in both.groups()] == [(12, 10), (10, 12)]
    weight = own.weight().detach()
    torch.testing.assert_close(both.norms(), torch.cat([weight.norm(dim=1), weight.norm(dim=0)]))
    assert own.weight.mask.all()
    assert own.weight.sparsity == 0


def test_a_hashed_model_is_saved_and_goes_on_where_it_was():
    def make():
        model = gs.DSModel(Own(hashed=True), 0.5, pruning_threshold=0.3, over="targets")
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def train(model, optimizer, steps):
        for step in steps:
            model(torch.randn(8, 10, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.reparameterize()

    unbroken, broken = make(), make()
    train(*unbroken, range(6))
    train(*broken, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in broken], file)
    file.seek(0)
    broken = make()
    for part, state in zip(broken, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*broken, range(3, 6))
    for mine, other in zip(unbroken[0].parameters(), broken[0].parameters(), strict=True):
        assert mine.equal(other)
    assert unbroken[0].stats_table == broken[0].stats_table


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dst.StructuredDenseParameter(torch.randn(4)),
            r"weight: got \(4,\), torch.float32",
        ),
        (
            lambda: dst.StructuredDenseParameter(torch.ones(4, 4, dtype=torch.int64)),
            "torch.int64, torch.strided, cpu",
        ),
        (lambda: dst.StructuredSparseParameter([[1.0]]), "weight: got list"),
        (
            lambda: dst.StructuredSparseParameter(torch.ones(2, 2).to_sparse()),
            r"torch\.sparse_coo, cpu",
        ),
        (lambda: dst.StructuredSparseParameter(torch.ones(2, 2, device="meta")), "meta; expected"),
        (lambda: dst.StructuredSparseParameter(torch.ones(2, 0)), r"got \(2, 0\)"),
        (
            lambda: gs.DSModel(nn.ModuleList(both(torch.ones(4, 4))), 0.5),
            r"0\.dense\.weight: is tied, with",
        ),
        (lambda: dst.HashedParameter(torch.randn(4, 4), 17), "size: expected"),
        (lambda: dst.StructuredSparseParameter(torch.randn(4, 5), "2:4"), "2:4 needs a number of inputs"),
        (lambda: dst.StructuredSparseParameter(torch.randn(4, 5), "iss"), "structure 'iss' is for RNN"),
        (lambda: dst.StructuredSparseParameter(torch.randn(4, 5), {"*": "row"}), "got a mapping for one"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(gs.ConfigurationError, match=message):
        make()


def test_a_heuristic_may_be_given_for_once(small):
    """By hand: what each tensor lost comes back to it, though the model's own heuristic would share it."""
    before = [row["nonzero"] for row in small.update_stats()]
    small.prune_by_threshold()
    small.reallocate_free_parameters(dst.ReallocationHeuristics.within_param)
    assert [row["nonzero"] for row in small.update_stats()] == before
    assert small.handle.methods[0].heuristic == "paper"
    small.reparameterize(heuristic=dst.ReallocationHeuristics.within_param)
    assert [row["nonzero"] for row in small.update_stats()] == before
    masks = small.handle.masks()
    with pytest.raises(gs.ConfigurationError, match="heuristic: got 'papers'"):  # and nothing was pruned for it
        small.reparameterize("papers")
    assert all(mask.equal(masks[name]) for name, mask in small.handle.masks().items())


def test_tables_can_be_asked_for_their_text(small):
    assert small.sum_table.get_string() == small.sum_table
    assert [line.split("|")[1].strip() for line in small.stats_table.get_string().splitlines()[3:5]] == [
        "model.conv.weight",
        "model.linear.weight",
    ]


# -- copies, several models, interrupted steps ----------------------------------------------------------------------


def test_two_models_under_one_optimizer_are_refused_before_anything_is_trained():
    models = [gs.DSModel(Small(), 0.5) for _ in range(2)]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    sum(model(batch(0)).square().sum() for model in models).backward()
    with pytest.raises(gs.OrderError, match="trains weights of 2 handles"):
        optimizer.step()
    for model in models:
        assert_zeros(model)


def test_two_optimizers_are_followed_where_the_handle_is_told(small):
    halves = (small.model.conv.parameters(), [*small.model.linear.parameters(), *small.model.head.parameters()])
    optimizers = [torch.optim.SGD(half, lr=0.05) for half in halves]
    small(batch(0)).square().sum().backward()
    with pytest.raises(gs.OrderError, match=r"model\.handle\.follow"):
        optimizers[0].step()
    small.handle.follow(optimizers)
    for optimizer in optimizers:
        optimizer.step()
    assert_zeros(small)


@pytest.mark.parametrize("whole", [True, False], ids=["of the object", "of its model"])
def test_an_average_gets_the_masks_of_now(small, whole):
    average = torch.optim.swa_utils.AveragedModel(small if whole else small.model)
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    for step in range(4):
        train(small, optimizer, range(step, step + 1))
        average.update_parameters(small if whole else small.model)
    small.project(average)
    masks = small.handle.masks()
    averaged = average.module.model if whole else average.module
    for name, mask in masks.items():
        assert not averaged.get_parameter(name)[~mask].any()
    if whole:
        small.load_state_dict(average.module.state_dict())
        assert all(mask.equal(masks[name]) for name, mask in small.handle.masks().items())
    small.handle.project(average)  # finds the names behind what wrappers put before them


@pytest.mark.parametrize("targets", ["linear.weight", ["linear.weight"], ("conv.weight", "linear.weight")], ids=str)
def test_modules_keep_their_structures_where_targets_choose_some(targets):
    rows = {row["name"]: row for row in gs.DSModel(Small(), 0.3, targets=targets).handle.summary().rows}
    assert rows["linear.weight"]["structure"] == "element"
    if "conv.weight" in rows:
        assert rows["conv.weight"]["structure"] == "row"
    assert gs.DSModel(Small(), 0.01, targets=nn.Conv2d).handle.summary().rows[0]["structure"] == "row"  # or filter


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.Rprop])
def test_an_update_between_loading_and_stepping_survives_another_stop(small, optimizer_class):
    def reload(model, optimizer):
        other = gs.DSModel(Small(), target_sparsity=0.5, pruning_threshold=0.05)
        other_optimizer = optimizer_class(other.parameters(), lr=0.01)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return other, other_optimizer

    optimizer = optimizer_class(small.parameters(), lr=0.01)
    train(small, optimizer, range(4))
    first = reload(small, optimizer)
    small.reparameterize()
    first[0].reparameterize()
    second = reload(*first)
    runs = [(small, optimizer), first, second]
    for run in runs:
        train(*run, range(4, 6))
    for one, two, three in zip(*(model.parameters() for model, _ in runs), strict=True):
        assert one.equal(two)
        assert one.equal(three)


@pytest.mark.parametrize("key", ["sparsity", "budget", "asked", "begun"])
def test_damaged_state_is_refused_and_changes_nothing(small, key):
    state = copy.deepcopy(small.state_dict())
    saved = state["_extra_state"] if key == "begun" else state["_extra_state"]["methods"][0]["state"]
    if key == "budget":
        saved[key] = 10**9
    else:
        del saved[key]
    before = small.handle.state_dict()["methods"][0]["state"]
    with pytest.raises(gs.StateError):
        small.load_state_dict(state)
    after = small.handle.state_dict()["methods"][0]["state"]
    assert before.pop("generator").equal(after.pop("generator"))
    assert before == after


def test_thinning_after_a_pruning_leaves_the_rest_of_the_budget_to_be_filled(small):
    budget = small.np_nonzero
    small.prune_by_threshold()
    pruned = budget - small.np_nonzero
    assert pruned
    small.randomly_thin_to_group_sparsity(0.0)
    small.reallocate_free_parameters()
    assert small.np_nonzero == budget


def test_weights_pruned_in_two_steps_do_not_grow_in_the_next(small):
    small.prune_or_grow_to_sparsity(0.7)
    before = small.handle.masks()
    small.prune_by_threshold()
    small.handle.methods[0].threshold *= 1.5
    small.prune_by_threshold()
    gone = {name: before[name] & ~mask for name, mask in small.handle.masks().items()}
    assert any(mask.any() for mask in gone.values())
    small.reallocate_free_parameters()
    assert not any((gone[name] & mask).any() for name, mask in small.handle.masks().items())


def test_masks_go_where_the_model_is_moved_to(small):
    small.to("meta")
    assert {mask.device.type for mask in small.handle.masks().values()} == {"meta"}


def test_what_cannot_be_asked_of_a_phase_is_named(small):
    with pytest.raises(gs.ConfigurationError, match="update: phase 'prune' of dst: got an unexpected keyword"):
        small.handle.update("prune", sparsity=0.5)
    with pytest.raises(gs.ConfigurationError, match="update: phase 'resize' of dst: missing a required argument"):
        small.handle.update("resize")
    given = gs.DSModel(Small(), None, distribution={"*": 0.5}, over="targets")
    with pytest.raises(gs.ConfigurationError, match="the distribution says how many weights live"):
        given.prune_or_grow_to_sparsity(0.7)
    small.model.requires_grad_(False)
    with pytest.raises(gs.ConfigurationError, match="train the layers that are frozen"):
        small.prune_or_grow_to_sparsity(0.9)


def test_a_wrapper_around_two_networks_is_refused_and_the_one_that_is_meant_is_taken():
    class Twin(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.first, self.second = make(), make()

    twin = Twin(lambda: gs.DSModel(Small(), 0.5))
    average = torch.optim.swa_utils.AveragedModel(twin)
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(gs.ConfigurationError, match="the copy holds 2 DSModels; give the one that is meant"):
        twin.first.project(average)
    plain = Twin(Small)
    sparsity = gs.attach(plain.first, gs.Static(0.5))
    with pytest.raises(gs.ConfigurationError, match=r"holds 2 networks with these parameters, as 'module\.first' and"):
        sparsity.project(torch.optim.swa_utils.AveragedModel(plain))
    for name, value in average.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert value.equal(before[name])
    twin.first.shuffle_structure()
    twin.first.project(average.module.first)
    for name, mask in twin.first.handle.masks().items():
        assert not average.module.first.model.get_parameter(name)[~mask].any()
    with pytest.raises(gs.ConfigurationError, match="project: the copy is not one of this DSModel"):
        twin.first.project(gs.DSModel(nn.Linear(3, 3), 0.5))


@pytest.mark.parametrize("change", ["resize", "thin"])
def test_what_is_to_be_pruned_follows_the_budget(change):
    def make(sparsity):
        torch.manual_seed(0)
        return gs.DSModel(nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100)), sparsity, over="targets")

    model = make(0.5)
    model.prune_or_grow_to_sparsity(0.992) if change == "resize" else model.randomly_thin_to_group_sparsity(0.992)
    assert model.handle.methods[0].intended == make(0.992).handle.methods[0].intended
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(30):
        model(torch.randn(8, 100, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.reparameterize()
    assert model.pruning_threshold < 10
    assert model.np_nonzero == 160
    other = make(0.5)
    other.load_state_dict(model.state_dict())
    assert other.handle.methods[0].intended == model.handle.methods[0].intended


@pytest.mark.parametrize("structure", ["element", "2:4"])
def test_layers_frozen_after_a_pruning_keep_their_masks(structure):
    layers = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 16))
    sparsity = None if structure == "2:4" else 0.5
    model = gs.DSModel(layers, sparsity, pruning_threshold=0.2, structure=structure, over="targets")
    budget = model.np_nonzero
    model.prune_by_threshold()
    model.model[0].requires_grad_(False)
    before = model.handle.masks()["0.weight"]
    model.reallocate_free_parameters()
    assert model.handle.masks()["0.weight"].equal(before)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.model[0].requires_grad_(True)
    model.reparameterize()
    assert model.np_nonzero == budget


def test_a_budget_that_does_not_fit_is_told_as_it_was_asked_for(small):
    small.prune_or_grow_to_sparsity(0.6)
    # 976 parameters, 40 of them dense: 488 − 40 and 390 − 40
    with pytest.raises(gs.StateError, match="the saved budget is 448 active weights, the attached one 350; attach"):
        gs.DSModel(Small(), 0.6).load_state_dict(small.state_dict())


def test_names_of_layers_are_not_taken_for_arguments():
    layers = nn.ModuleDict({"threshold": nn.Linear(4, 4)}).requires_grad_(False)
    with pytest.raises(gs.ConfigurationError, match=r"DSModel: threshold\.weight: is frozen"):
        gs.DSModel(layers, 0.5)


def test_n_of_m_beside_another_structure_is_refused_by_the_weight():
    layers = nn.Sequential(dst.DSLinear(8, 8, structure="2:4"), dst.DSLinear(8, 8, structure="row"))
    with pytest.raises(gs.ConfigurationError, match=r"DSModel: 0\.weight: has structure 2:4, and other weights"):
        gs.DSModel(layers, None)


@pytest.mark.parametrize("hashed", [False, True], ids=["dense", "hashed"])
def test_masks_of_parameters_in_an_average_are_those_of_now(hashed):
    own = Own(hashed)
    model = gs.DSModel(own, 0.5, over="targets")
    average = torch.optim.swa_utils.AveragedModel(own)
    model.prune_or_grow_to_sparsity(0.7)
    model.project(average)
    assert average.module.weight.mask.equal(own.weight.mask)
    assert average.module.weight.sparsity == own.weight.sparsity
    assert not average.module.weight()[~own.weight.mask].any()


def test_an_average_is_found_though_a_masked_name_recurs_deeper_in_the_network():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    sparsity = gs.attach(model, gs.Static(0.5, targets=["0.weight"]))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.module[0].weight.detach().fill_(1.0)
    sparsity.project(average)
    assert (average.module[0].weight != 0).equal(sparsity.masks()["0.weight"])
    assert average.module[1][0].weight.all()


def test_parameters_beside_a_copy_keep_their_masks():
    model, teacher = gs.DSModel(Own(), 0.5, over="targets"), gs.DSModel(Own(), 0.25, over="targets", seed=3)
    before = teacher.model.weight.mask.clone()
    copied = copy.deepcopy(model.model)
    model.shuffle_structure()
    model.project(nn.ModuleDict({"ema": copied, "other": nn.ModuleDict({"weight": teacher.model.weight})}))
    assert copied.weight.mask.equal(model.model.weight.mask)
    assert teacher.model.weight.mask.equal(before)


def test_a_wrapper_with_a_weight_of_the_same_name_is_not_taken_for_the_copy():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsity = gs.attach(model, gs.Static(0.5, targets=["0.weight"]))
    around = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(model))
    around[1][0].weight.detach().fill_(1.0)
    sparsity.project(around)
    assert around[0].weight.all()
    assert (around[1][0].weight != 0).equal(sparsity.masks()["0.weight"])
