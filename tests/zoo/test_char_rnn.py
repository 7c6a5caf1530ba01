"""Cells in a loop and fused modules are one network; its recurrent weights and decoder can be made sparse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gossamer as gs
from gossamer import ConfigurationError, zoo
from gossamer.targets import select

CELLS = ("lstm", "gru", "rnn")
SIZES = {"symbols": 11, "hidden": 7, "embedding": 5}


def build(seed=0, **arguments):
    torch.manual_seed(seed)
    return zoo.char_rnn(**SIZES | arguments)


def characters(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_compute_what_the_fused_module_does_from_the_same_weights(cell, layers):
    fused, loop = (build(seed, cell=cell, layers=layers, cells=seed == 1) for seed in (0, 1))
    renamed = {}
    for name, value in fused.state_dict().items():
        kind, _, layer = name.partition("_l")
        renamed[f"rnn.{layer}.{kind.removeprefix('rnn.')}" if layer else name] = value
    loop.load_state_dict(renamed)
    x, state = characters(3, 6), None
    for chunk in x.split([4, 2], dim=1):
        state = [None, None] if state is None else state
        results = [model(chunk, each) for model, each in zip((fused, loop), state, strict=True)]
        torch.testing.assert_close(*(logits for logits, _ in results))
        state = [each for _, each in results]
        torch.testing.assert_close(*state)
        assert len(state[0]) == (2 if cell == "lstm" else 1)
        assert all(each.shape == (layers, 3, 7) for each in state[0])


@pytest.mark.parametrize("cell", CELLS)
def test_a_seed_gives_cells_and_fused_module_the_same_first_values(cell):
    fused, loop = (build(cell=cell, layers=2, cells=cells) for cells in (False, True))
    torch.testing.assert_close(fused(characters(2, 5))[0], loop(characters(2, 5))[0])


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_text_in_chunks_gives_the_logits_of_the_text_in_one(cell, cells):
    model, x = build(cell=cell, layers=2, cells=cells), characters(2, 9)
    whole, last = model(x)
    assert whole.shape == (2, 9, 11)
    state, parts = None, []
    for chunk in x.split([1, 5, 3], dim=1):
        logits, state = model(chunk, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


def test_no_character_sees_those_after_it():
    model, x = build(), characters(1, 8)
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % 11
    before, after = model(x)[0], model(changed)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_sparse_targets_are_the_recurrent_weights_and_the_decoder(cell, cells):
    model = build(cell=cell, layers=2, cells=cells)
    chosen = [target.name for target in select(model, model.SPARSE_TARGETS)]
    assert chosen == [target.name for target in select(model, None)]
    expected = [n for n, p in model.named_parameters() if p.dim() == 2 and n != "embedding.weight"]
    assert chosen == expected
    assert len(chosen) == 5


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_masks_hold_while_it_trains(cell, cells):
    model = build(cell=cell, layers=2, cells=cells)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    sparsity = gs.attach(model, gs.DSR(sparsity=0.8, every=3, targets=model.SPARSE_TARGETS), optimizer)
    x, losses = characters(4, 10), []
    for _ in range(20):
        loss = F.cross_entropy(model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    sparsity.finalize()
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embedding.weight"]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight != 0).sum()) for weight in weights) <= round(0.2 * total)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("cells", "module"), [(False, "rnn"), (True, "rnn.0")])
@pytest.mark.parametrize("cell", CELLS)
def test_hidden_units_are_removed_whole_and_are_then_not_read(cell, cells, module):
    model = build(cell=cell, hidden=8, cells=cells)
    structure = gs.ISS(consumers={module: ["decoder.weight"]})
    gs.prune(model, 0.5, structure=structure, distribution="uniform")
    dead = (model.decoder.weight == 0).all(0)
    assert int(dead.sum()) == 4
    recurrent = [p for name, p in model.named_parameters() if "weight_" in name]
    for weight in recurrent:
        assert (weight.view(-1, 8, weight.shape[1])[:, dead] == 0).all()
    assert (recurrent[1][:, dead] == 0).all()
    logits = model(characters(2, 5))[0]
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if "bias_" in name:
                bias.view(-1, 8)[:, dead] = 9.0  # what a removed unit computes no longer matters
    assert torch.equal(model(characters(2, 5))[0], logits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cell": "LSTM"}, "char_rnn: cell='LSTM'; allowed are lstm, gru, rnn"),
        ({"hidden": 0}, "char_rnn: hidden: expected an integer of at least 1, got 0"),
        ({"layers": True}, "char_rnn: layers: .* got True"),
        ({"symbols": 1.5}, "char_rnn: symbols: .* got 1.5"),
        ({"cells": 1}, "char_rnn: cells: expected True or False, got 1"),
    ],
)
def test_impossible_arguments_are_refused(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        zoo.char_rnn(**arguments)


def test_the_default_size_is_the_one_that_is_documented():
    model = zoo.char_rnn()
    assert isinstance(model.rnn, nn.LSTM)
    assert sum(p.numel() for p in model.parameters()) == 84 * 32 + 512 * (32 + 128 + 2) + 84 * (128 + 1) == 96_468


@pytest.mark.parametrize("cells", [False, True], ids=["fused", "cells"])
def test_hidden_units_leave_the_layers_that_read_them(cells):
    torch.manual_seed(0)
    model = zoo.build("char_rnn", symbols=7, hidden=16, layers=2, embedding=5, cells=cells)
    reads = "rnn.0>rnn.1.weight_ih;rnn.1>decoder.weight" if cells else "rnn>decoder.weight"
    gs.attach(model, gs.Static(0.5, structure=f"iss:{reads}", targets=["rnn.*", "decoder.weight"]))
    weights = dict(model.named_parameters())
    for layer, reader in enumerate(("rnn.1.weight_ih" if cells else "rnn.weight_ih_l1", "decoder.weight")):
        rows = weights[f"rnn.{layer}.weight_ih" if cells else f"rnn.weight_ih_l{layer}"]
        dead = ~rows.view(4, 16, -1).any(2).any(0)
        assert dead.any()
        assert not weights[reader][:, dead].any()
