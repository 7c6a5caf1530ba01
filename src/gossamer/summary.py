"""How sparse a model is: a table of its masked tensors, and totals."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from gossamer.method import MaskedTensor, Method
from gossamer.targets import parameter_count


@dataclass(frozen=True)
class Summary:
    """Counts of active weights.

    Attributes:
        rows: For each weight that a method claims `name`, `shape`, `method`, `structure`, `total`, `active`,
            `sparsity`; a list that `pandas.DataFrame` takes as it is. Where a mask is still being learned, the
            structure is `"soft"` and every weight counts as active.
        totals: `targets_total`, `targets_active`, `targets_sparsity` over these rows; `all_total`,
            `all_nonzero`, `all_sparsity` over all parameters, where every unmasked one counts as nonzero.
        learned: What methods learned beside masks, such as thresholds: plain values, a row each, with its `method`.
    """

    rows: list[dict[str, Any]]
    totals: dict[str, float]
    learned: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Rows, totals and what was learned as JSON values."""
        return {"rows": self.rows, "totals": self.totals, "learned": self.learned}

    def table(self) -> Table:
        """The summary as a rich table."""
        table = Table(title="Sparsity", show_footer=True)
        totals = self.totals
        table.add_column("parameter", footer="in all\nof the whole model", overflow="fold")
        table.add_column("shape")
        table.add_column("method")
        table.add_column("total", justify="right", footer=f"{totals['targets_total']:,}\n{totals['all_total']:,}")
        table.add_column("active", justify="right", footer=f"{totals['targets_active']:,}\n{totals['all_nonzero']:,}")
        footer = f"{totals['targets_sparsity']:.4f}\n{totals['all_sparsity']:.4f}"
        table.add_column("sparsity", justify="right", footer=footer)
        for row in self.rows:
            kind = row["method"] if row["structure"] == "element" else f"{row['method']} {row['structure']}"
            shape = "×".join(map(str, row["shape"]))
            table.add_row(row["name"], shape, kind, f"{row['total']:,}", f"{row['active']:,}", f"{row['sparsity']:.4f}")
        return table

    def learned_table(self) -> Table:
        """What was learned as a rich table, a column for each value that a row has."""
        table = Table(title="Learned")
        columns = list(dict.fromkeys(key for row in self.learned for key in row))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in self.learned:
            cells = [row.get(column, "") for column in columns]
            table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=110)
        console.print(self.table())
        if self.learned:
            console.print(self.learned_table())
        return text.getvalue().rstrip()


def summarize(model: nn.Module, methods: Sequence[Method], learned: Collection[int] = ()) -> Summary:
    """Count the active weights of what `methods` claim within `model`.

    Args:
        model: The model.
        methods: Its methods.
        learned: Ids of the parameters that methods added, which are not the model's own.
    """
    rows = [row for method in methods for row in _rows(method)]
    total, active = sum(row["total"] for row in rows), sum(row["active"] for row in rows)
    added = {id(parameter): parameter.numel() for parameter in model.parameters() if id(parameter) in learned}
    whole = parameter_count(model) - sum(added.values())
    nonzero = whole - total + active
    return Summary(
        rows,
        {
            "targets_total": total,
            "targets_active": active,
            "targets_sparsity": 1 - active / total if total else 0.0,
            "all_total": whole,
            "all_nonzero": nonzero,
            "all_sparsity": 1 - nonzero / whole if whole else 0.0,
        },
        [{"method": method.name} | row for method in methods for row in method.learned()],
    )


def _rows(method: Method) -> Iterator[dict[str, Any]]:
    for each in method.holdings():
        tensor = each if isinstance(each, MaskedTensor) else None
        shape = each.shape
        total = prod(shape)
        active = total if tensor is None else tensor.active
        yield {
            "name": each.name,
            "shape": list(shape),
            "method": method.name,
            "structure": "soft" if tensor is None else tensor.structure,
            "total": total,
            "active": active,
            "sparsity": 1 - active / total,
        }
