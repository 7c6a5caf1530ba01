"""Networks that predict the next character of a text, as in the language models of Karpathy et al. (2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.checks import check_boolean, check_integer
from gossamer.errors import ConfigurationError

Cell = Literal["lstm", "gru", "rnn"]

State = tuple[Tensor, ...]
"""What a network remembers, each (layers, B, hidden): the hidden values, and of an LSTM its cells' after them."""

_FUSED: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class CharRNN(nn.Module):
    """An embedding, recurrent layers and a linear decoder; see `char_rnn`.

    `SPARSE_TARGETS` are the weights of the recurrent layers and the decoder, which hold nearly all parameters and all
    of the arithmetic. The embedding stays dense: of it a step reads one row a character.
    """

    SPARSE_TARGETS: ClassVar[tuple[str, ...]] = ("*.weight_ih*", "*.weight_hh*", "decoder.weight")

    def __init__(self, symbols: int, cell: Cell, hidden: int, layers: int, embedding: int, cells: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.rnn: nn.RNNBase | nn.ModuleList
        if cells:
            inputs = [embedding] + [hidden] * (layers - 1)
            self.rnn = nn.ModuleList(_CELLS[cell](size, hidden) for size in inputs)
        else:
            self.rnn = _FUSED[cell](embedding, hidden, layers, batch_first=True)
        self.decoder = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predict what follows each character.

        Args:
            x: Characters, int64, (B, T), values 0 to `symbols` - 1.
            state: What an earlier call gave for the characters before these; `None` at the beginning.

        Returns:
            Logits (B, T, symbols), and the state after the last character.
        """
        embedded = self.embedding(x)
        if isinstance(self.rnn, nn.ModuleList):
            hidden, state = _run_cells(self.rnn, embedded, state)
        else:
            before = state[0] if state is not None and len(state) == 1 else state
            hidden, after = self.rnn(embedded, before)
            state = after if isinstance(after, tuple) else (after,)
        return self.decoder(hidden), state


def _run_cells(layers: nn.ModuleList, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Run one layer after the other, each over all of time; as the fused modules do."""
    finals: list[State] = []
    for number, layer in enumerate(layers):
        now = None if state is None else tuple(each[number] for each in state)
        outputs = []
        for step in x.unbind(1):
            after = layer(step, now[0] if now is not None and len(now) == 1 else now)
            now = after if isinstance(after, tuple) else (after,)
            outputs.append(now[0])
        x = torch.stack(outputs, 1)
        assert now is not None
        finals.append(now)
    return x, tuple(torch.stack(each) for each in zip(*finals, strict=True))


def char_rnn(
    symbols: int = 84,
    cell: Cell = "lstm",
    hidden: int = 128,
    layers: int = 1,
    embedding: int = 32,
    cells: bool = False,
) -> CharRNN:
    """Build a language model of characters (96,468 parameters as an LSTM of the default size).

    Args:
        symbols: Distinct characters, 84 in `shakespeare`; also the number of logits.
        cell: "lstm", "gru" or "rnn" (with tanh).
        hidden: Hidden units of a layer.
        layers: Recurrent layers, one upon the other.
        embedding: Values of a character's embedding.
        cells: Whether to build from `nn.LSTMCell` and its like, in a loop over time, instead of torch's fused module
            (which is cuDNN's on a GPU). Both compute the same; the fused one is faster.

    Raises:
        ConfigurationError: An unknown cell, or a size that is not a positive integer.
    """
    if cell not in get_args(Cell):
        raise ConfigurationError(f"char_rnn: cell={cell!r}; allowed are {', '.join(get_args(Cell))}")
    check_boolean("char_rnn: cells", cells)
    for key, size in {"symbols": symbols, "hidden": hidden, "layers": layers, "embedding": embedding}.items():
        check_integer(f"char_rnn: {key}", size, 1)
    return CharRNN(symbols, cell, hidden, layers, embedding, cells)
