"""Text trains in the same loop as images: state carried along, bits per character, resumed to the bit."""

import itertools
import json
import math
import re

import pytest
import torch
from torch import nn

from gossamer import ConfigurationError
from gossamer.data import catalogue
from gossamer.data.text import RawText
from gossamer.loop import Run
from gossamer.recipe import load_recipe, parse_recipe
from gossamer.training import train, train_seeds
from test_training import METHODS, equal, interrupted, lines, weights

RECIPE = """
data: {name: tale, batch_size: 6, length: 10}
model: {name: char_rnn, hidden: 16, embedding: 8}
optimizer: {name: Adam, lr: 0.02}
schedule: {type: cosine}
epochs: 3
clip_grad_norm: 1.0
"""


@pytest.fixture(autouse=True)
def tale(monkeypatch):
    """A text of 1,200 characters, 5 different ones, in which one follows from the three before it."""
    characters = [0, 1, 2]
    while len(characters) < 1200:
        characters.append((characters[-1] + 2 * characters[-2] + characters[-3]) % 5)
    works = ("".join("abcde"[c] for c in characters[:700]), "".join("abcde"[c] for c in characters[700:]))
    entry = catalogue.Entry("tale", 5, (), (), (), 100, lambda _: RawText(works))
    monkeypatch.setitem(catalogue.DATASETS, "tale", entry)
    monkeypatch.setattr("gossamer.data.NAMES", tuple(catalogue.DATASETS))


def small(*overrides):
    return parse_recipe("tale.yaml", RECIPE, overrides)


def test_text_is_learned_by_a_sparse_network():
    result = train(small("epochs=25", f"methods=[{METHODS['dsr'].replace('0.9', '0.5')}]"), progress=False)
    assert 0 < result.validation_bits_per_character < 0.5 * math.log2(5)  # of which a guess needs all
    assert result.validation_accuracy > 0.7
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.steps == 25 * (1040 // 60)


def test_bits_per_character_are_the_loss_in_bits():
    result = train(small("epochs=1"), progress=False)
    (metrics,) = result.history
    for part in ("train", "validation"):
        assert metrics[f"{part}_bits_per_character"] == pytest.approx(metrics[f"{part}_loss"] / math.log(2))
    assert result.validation_bits_per_character == metrics["validation_bits_per_character"]
    assert result.test_bits_per_character == pytest.approx(result.test_loss / math.log(2))


@pytest.mark.parametrize("batch_size", [1, 6, 7])
def test_evaluation_is_that_of_each_stream_read_in_one(batch_size):
    run = Run(small(f"data.batch_size={batch_size}"), 0)
    split = run.test.split
    size, loss, right = len(split), 0.0, 0
    begins = [size * row // batch_size for row in range(batch_size + 1)]
    with torch.no_grad():
        for begin, end in itertools.pairwise(begins):
            codes = split.codes[begin:end].long()
            logits, _ = run.model(codes[None, :-1])
            loss += nn.functional.cross_entropy(logits[0], codes[1:], reduction="sum").item()
            right += int((logits[0].argmax(1) == codes[1:]).sum())
    found = run.evaluate(run.test)
    assert found["loss"] == pytest.approx(loss / (size - batch_size), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / (size - batch_size))


def test_training_carries_the_state_from_chunk_to_chunk_and_begins_anew_with_an_epoch(monkeypatch):
    given = []

    def build(name, **arguments):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Linear(1, 5)

            def forward(self, x, state=None):
                if torch.is_grad_enabled():
                    given.append(None if state is None else state[0].item())
                    assert state is None or not state[0].requires_grad
                count = torch.zeros(()) if state is None else state[0]
                return self.weight(x[..., None].float()), (count + 1 + 0 * self.weight.bias.sum(),)

        return Net()

    monkeypatch.setattr("gossamer.zoo.build", build)
    train(small("epochs=2"), progress=False)
    assert given == 2 * [None, *range(1, 1040 // 60)]


@pytest.mark.parametrize(
    ("method", "model"),
    [*((each, "cell: lstm") for each in METHODS), ("dsr", "cell: gru, layers: 2"), ("dsr", "cell: rnn, cells: true")],
)
def test_a_run_interrupted_twice_ends_as_one_that_was_not(tmp_path, monkeypatch, method, model):
    recipe = small(f"methods=[{METHODS[method]}]", f"model={{name: char_rnn, hidden: 16, {model}}}", "accumulate=2")
    whole = train(recipe, tmp_path / "whole", progress=False)
    for step in (20, 24):
        interrupted(monkeypatch, step, lambda: train(recipe, tmp_path / "parts", progress=False, resume=True))
    parts = train(recipe, tmp_path / "parts", progress=False, resume=True)
    assert equal(weights(whole.model), weights(parts.model))
    for name in ("metrics.jsonl", "updates.jsonl"):
        assert lines(tmp_path / "whole" / name) == lines(tmp_path / "parts" / name)
    assert whole.test_bits_per_character == parts.test_bits_per_character
    again = train(recipe, tmp_path / "parts", progress=False, resume=True)
    assert again.test_bits_per_character == whole.test_bits_per_character


def test_what_is_shown_speaks_of_characters(tmp_path, capsys):
    train(small("epochs=1"), tmp_path / "run", progress=True)
    shown = capsys.readouterr().out
    assert "data     tale, characters: 1,040 to train, 100 to validate, 60 to test" in shown
    assert re.search(r"epoch 1/1  \d\.\d{3} bits  accuracy .* validation \d\.\d{3} bits", shown)


def test_several_seeds_have_mean_bits_per_character(tmp_path):
    results = train_seeds(small("epochs=1", "seeds=[0, 1]"), tmp_path / "run", progress=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    mean = sum(each.test_bits_per_character for each in results) / 2
    assert summary["test_bits_per_character"]["mean"] == pytest.approx(mean)
    assert "validation_bits_per_character" in summary


def test_images_have_no_bits_per_character(tmp_path):
    result = train(load_recipe("digits", ["epochs=1"]), tmp_path / "run", progress=False)
    assert result.test_bits_per_character is result.validation_bits_per_character is None
    assert not any("bits" in key for key in result.history[0])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model={name: mnist_mlp}", "model.name: zoo: mnist_mlp takes images, the data are text; .* are char_rnn"),
        ("model.symbols=6", r"model.symbols: char_rnn gives \(1, 1, 6\) for 1 stream of tale, which has 5 symbols"),
        ("model.cell=lstmm", "model.cell: .*allowed are lstm, gru, rnn"),
        ("data.augment={flip: true}", "data.augment: .*text has no augmentation; leave it out"),
        ("channels_last=true", "channels_last: got true, but it is for images; leave it out"),
        ("data.length=0", "data.length: "),
        ("data.length=400", "data.batch_size: .*length=400 .* need 2,400 characters, the text has 1,040"),
        ("data.batch_size=40", "data.batch_size: .*two characters need 80 characters, the text has 60"),
        ("data.validation=1140", "data.validation: .*a number of characters from 0 to 1139"),
    ],
)
def test_what_cannot_work_with_text_is_refused_in_one_line_before_anything_is_written(tmp_path, override, said):
    with pytest.raises(ConfigurationError, match="^(command line|tale.yaml).*: " + said) as caught:
        train(small(override), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.length=16", "data.length: got 16, but digits holds images; leave it out"),
        ("model={name: char_rnn}", "model.name: zoo: char_rnn takes text, the data are images; .* are cifar_resnet"),
    ],
)
def test_what_is_for_text_is_refused_with_images(override, said):
    with pytest.raises(ConfigurationError, match="^command line .*: " + said):
        train(load_recipe("digits", [override]), progress=False)
