"""Which weights are targets: the default, globs, types, predicates, names, and every refusal."""

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from gossamer.checks import closest
from gossamer.errors import ConfigurationError
from gossamer.targets import local, named_weights, parameter_count, plain_name, select


def names(model, selection=None):
    return [target.name for target in select(model, selection)]


def small():
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "norm": nn.BatchNorm2d(8),
            "body": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
            "words": nn.Embedding(10, 8),
            "head": nn.Linear(8, 4),
        }
    )


ALL_OF_SMALL = ["stem.weight", "body.0.weight", "body.2.weight", "head.weight"]


class Tied(nn.Module):
    """A language model's head that shares its weight with the embedding, made in either order."""

    def __init__(self, head_first):
        super().__init__()
        for name in ("head", "words") if head_first else ("words", "head"):
            setattr(self, name, nn.Linear(4, 10, bias=False) if name == "head" else nn.Embedding(10, 4))
        self.words.weight = self.head.weight
        self.inner = nn.Linear(4, 4)


# -- the default ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 4), ["weight"]),
        (nn.Conv1d(2, 3, 3), ["weight"]),
        (nn.Conv2d(2, 4, 3, groups=2), ["weight"]),
        (nn.Conv3d(2, 3, 3), ["weight"]),
        (nn.ConvTranspose1d(2, 3, 3), ["weight"]),
        (nn.ConvTranspose2d(2, 3, 3), ["weight"]),
        (nn.ConvTranspose3d(2, 3, 3), ["weight"]),
        (nn.RNN(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (
            nn.GRU(3, 4, bidirectional=True),
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        ),
        (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(8, 2), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_default_takes_the_weights_of_a_layer_and_no_bias(module, expected):
    assert names(module) == expected


def test_default_leaves_out_the_biases_that_attention_adds_to_keys_and_values():
    # They have three dimensions, (1, 1, embed_dim), and are biases all the same.
    assert names(nn.MultiheadAttention(8, 2, add_bias_kv=True)) == ["in_proj_weight", "out_proj.weight"]


def test_default_leaves_out_norms_and_embeddings():
    assert names(small()) == ALL_OF_SMALL


def test_default_leaves_out_parameters_that_a_module_of_the_user_holds_itself():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 4))
            self.layer = nn.Linear(4, 4)

    assert names(Mine()) == ["layer.weight"]


def test_tied_weight_is_selected_once_under_its_first_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert names(model) == ["0.weight"]


def test_weight_that_another_module_holds_first_is_still_that_of_its_layer():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 2)
            self.shared = self.up.weight

    (target,) = select(Holder(), None)
    assert (target.name, target.input_dim) == ("shared", 0)


def test_module_used_twice_is_selected_once():
    layer = nn.Linear(4, 4)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


@pytest.mark.parametrize("head_first", [True, False])
def test_weight_tied_to_an_embedding_is_left_out_whichever_comes_first(head_first):
    assert names(Tied(head_first)) == ["inner.weight"]
    assert names(Tied(head_first), nn.Linear) == ["inner.weight"]


@pytest.mark.parametrize("head_first", [True, False])
def test_weight_tied_to_an_embedding_is_reached_by_its_exact_name(head_first):
    first = "head.weight" if head_first else "words.weight"
    assert names(Tied(head_first), first) == [first]


def test_order_is_that_of_named_parameters():
    model = small()
    listed = [name for name, _ in model.named_parameters()]
    assert names(model, ["head*", "stem*", "body*"]) == sorted(ALL_OF_SMALL, key=listed.index)


def test_input_dimension_is_zero_for_transposed_convolutions_only():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "conv": nn.Conv3d(2, 3, 1),
            "up": nn.ConvTranspose2d(2, 3, 2),
            "lazy": nn.LazyConvTranspose1d(3, 2),
        }
    )
    model["lazy"](torch.zeros(1, 2, 5))
    found = {target.name: target.input_dim for target in select(model, None)}
    assert found == {"linear.weight": 1, "conv.weight": 1, "up.weight": 0, "lazy.weight": 0}


# -- globs, types, predicates, names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("body*", ["body.0.weight", "body.2.weight"]),
        ("*", ALL_OF_SMALL),
        ("body.[0-1].weight", ["body.0.weight"]),
        (["stem*", "head*"], ["stem.weight", "head.weight"]),
        (("stem*", "head*"), ["stem.weight", "head.weight"]),
        ("!head*", ["stem.weight", "body.0.weight", "body.2.weight"]),
        (["*", "!body*"], ["stem.weight", "head.weight"]),
        (["!body*", "*"], ["stem.weight", "head.weight"]),
        (["!stem*", "!head*"], ["body.0.weight", "body.2.weight"]),
        (["body*", "!body.0.weight"], ["body.2.weight"]),
        (nn.Linear, ["body.0.weight", "body.2.weight", "head.weight"]),
        ([nn.Conv2d, "head*"], ["stem.weight", "head.weight"]),
        ([nn.Linear, "!head*"], ["body.0.weight", "body.2.weight"]),
        (nn.modules.conv._ConvNd, ["stem.weight"]),
        (nn.Embedding, ["words.weight"]),
        (lambda name, owner, parameter: parameter.shape == (8, 8), ["body.0.weight", "body.2.weight"]),
        ([lambda name, owner, parameter: "head.w" in name, "stem*"], ["stem.weight", "head.weight"]),
        ("words.weight", ["words.weight"]),
        (["words.weight", "head*"], ["words.weight", "head.weight"]),
        (["*", "!words.weight"], ALL_OF_SMALL),
    ],
)
def test_selection_chooses(selection, expected):
    assert names(small(), selection) == expected


@given(pattern=st.from_regex(r"[*?a-z.0-2]{1,6}", fullmatch=True), exclude=st.sampled_from(["", *ALL_OF_SMALL]))
def test_glob_agrees_with_fnmatch_over_the_default_weights(pattern, exclude):
    model = small()
    every = dict(model.named_parameters())
    hits = {pattern} if pattern in every else {name for name in ALL_OF_SMALL if fnmatchcase(name, pattern)}
    expected = [name for name in every if name in hits and name != exclude]
    selection = [pattern, f"!{exclude}"] if exclude else pattern
    if expected and all(every[name].dim() > 1 for name in expected):
        assert names(model, selection) == expected
    else:
        with pytest.raises(ConfigurationError):
            names(model, selection)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        checkpoint_wrapper,
    ],
    ids=["compile", "checkpoint"],
)
def test_names_are_those_of_the_unwrapped_model(wrap):
    inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert names(wrap(inner)) == ["0.weight", "1.weight"]
    inner[1] = wrap(inner[1])
    assert names(inner, "1.weight") == ["1.weight"]


def test_target_follows_a_parameter_that_is_replaced():
    model = nn.Linear(3, 3)
    (target,) = select(model, None)
    before = target.parameter
    model.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)}, assign=True)
    assert target.parameter is model.weight
    assert target.parameter is not before


# -- refusals -------------------------------------------------------------------------------------------------------


class Lookup(nn.Module):
    """An eligible layer beside an integer table in the same module."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.zeros(4, 4, dtype=torch.int64), requires_grad=False)


def weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))


def old_weight_normed():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))


def torch_pruned():
    model = nn.Sequential(nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("model", "selection", "message"),
    [
        (
            small,
            "heda*",
            r"targets: 'heda\*' matches no weight.*eligible are body.0.weight, body.2.weight, head.weight, stem.weight",
        ),
        (small, "head.wieght", r"'head.wieght' matches no weight.*did you mean 'head.weight'\?"),
        (small, ["*", "!boddy*"], r"'!boddy\*' matches no weight"),
        (small, "words*", r"'words\*' matches no weight.*it does match words.weight: name such a parameter exactly"),
        (small, "*.bias", r"'\*.bias' matches no weight.*it does match body.0.bias"),
        (small, ["*", "!*"], r"no weight to make sparse in ModuleDict with targets=\['\*', '!\*'\]"),
        (small, "!*", "no weight to make sparse in ModuleDict"),
        (small, [], r"no weight to make sparse in ModuleDict with targets=\[\]"),
        (small, nn.LSTM, "the model has no LSTM.*it has BatchNorm2d, Conv2d, Embedding, Linear"),
        (small, nn.BatchNorm2d, "the model has no BatchNorm2d with a weight of two or more dimensions"),
        (small, lambda name, owner, parameter: False, "the predicate <function.*holds for no parameter"),
        (small, 3, r"expected globs, module types or predicates, got 3 \(int\)"),
        (small, [3.5], r"expected globs, module types or predicates, got 3.5 \(float\)"),
        (small, {"head*"}, r"expected globs, module types or predicates, got \{'head\*'\} \(set\)"),
        (small, "head.bias", r"head.bias: has shape \(4,\); masks are for weights of two or more dimensions"),
        (small, "norm.weight", r"norm.weight: has shape \(8,\)"),
        (lambda: nn.ReLU(), None, "no weight to make sparse in ReLU with targets=None: the default takes"),
        (Lookup, "table", r"table: has dtype torch.int64.*targets=\['!table'\]"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), None, "weight: has dtype torch.complex64"),
        (lambda: nn.Linear(3, 3).to(torch.float8_e4m3fn), None, "weight: has dtype torch.float8.*16, 32 or 64 bits"),
        (lambda: nn.Linear(3, 3, device="meta"), None, "weight: is on the meta device.*to_empty"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), None, "0.weight: the layer is lazy.*run one forward first"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), None, "1.weight: the layer is lazy"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyConv2d(3, 3)), "1.weight", "1.weight: the layer is lazy"),
        (
            weight_normed,
            "0.parametrizations.weight.original1",
            "original1: this weight is computed from others by a parametrization.*remove_parametrizations",
        ),
        (
            weight_normed,
            None,
            r"0.parametrizations.weight.original0: this weight is computed from others by a parametriz",
        ),
        (old_weight_normed, None, "0.weight_g: this weight is computed from others"),
        (torch_pruned, None, "0.weight_orig: this weight is computed from others.*gossamer.import_torch_masks"),
    ],
)
def test_impossible_selection_names_the_value_and_the_remedy(model, selection, message):
    with pytest.raises(ConfigurationError, match=message):
        select(model(), selection)


def test_error_lists_few_of_many_names():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    with pytest.raises(ConfigurationError, match=r"0.weight, 1.weight.* 5.weight … \(9 in all\)"):
        select(model, "x*")


# -- helpers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("layer.weight", "layer.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("layer._checkpoint_wrapped_module.weight", "layer.weight"),
        ("_orig_mod._fsdp_wrapped_module.0._orig_mod.weight", "0.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_plain_name_drops_the_parts_of_wrappers_only(name, plain):
    assert plain_name(name) == plain


def test_closest_suggests_a_near_name_and_nothing_else():
    assert closest("heda.weight", ["stem.weight", "head.weight"]) == "; did you mean 'head.weight'?"
    assert closest("qqq", ["stem.weight"]) == ""


def test_named_weights_lists_every_owner_of_a_tied_weight():
    model = Tied(head_first=True)
    owners = {target.name: held for target, held in named_weights(model)}
    assert owners["head.weight"] == [model.head, model.words]
    assert list(owners) == [name for name, _ in model.named_parameters()]


def test_parameter_count_counts_tied_once_and_lazy_not_at_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LazyLinear(3))
    model[1].weight = model[0].weight
    assert parameter_count(model) == 4 * 4 + 4


def test_local_shares_memory_and_leaves_the_graph():
    weight = nn.Parameter(torch.zeros(2))
    local(weight)[0] = 1.0
    assert weight.tolist() == [1.0, 0.0]
    assert not local(weight).requires_grad
