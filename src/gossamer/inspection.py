"""What a file holds: a table of its tensors, how each is written, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from gossamer.container import DTYPES
from gossamer.files import File, bits_of


@dataclass(frozen=True)
class Inspection:
    """The tensors of a file.

    Attributes:
        rows: For each tensor `name`, `shape`, `dtype`, `encoding`, `density` (numbers that are not +0.0, of all),
            `bytes` that encode it, and `part`, these of those it has in memory. For a tied name, which costs nothing,
            `encoding` says with which.
        totals: `density` over all tensors, each once; `negative_zeros`, how many numbers are −0.0, which is a value;
            `dense_bytes`, what they have in memory; `bytes` of the whole file, header included; `part`, these of those.
    """

    rows: list[dict[str, Any]]
    totals: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Rows and totals as JSON values."""
        return {"tensors": self.rows, "totals": self.totals}

    def table(self) -> Table:
        """The rows as a rich table, with totals at its foot."""
        totals = self.totals
        table = Table(show_footer=True)
        table.add_column("tensor", footer="the file, with its header", overflow="fold")
        for column in ("shape", "dtype", "encoding"):
            table.add_column(column, overflow="fold")
        table.add_column("density", justify="right", footer=f"{totals['density']:.4f}")
        table.add_column("bytes", justify="right", footer=f"{totals['bytes']:,}")
        table.add_column("part of dense", justify="right", footer=f"{totals['part']:.4f}")
        for row in self.rows:
            name = row["name"] if row["name"].isprintable() else repr(row["name"])
            shape = "×".join(map(str, row["shape"])) or "one number"
            numbers = f"{row['density']:.4f}", f"{row['bytes']:,}", f"{row['part']:.4f}"
            table.add_row(escape(name), shape, row["dtype"], escape(row["encoding"]), *numbers)
        if totals["negative_zeros"]:
            table.caption = (
                f"{totals['negative_zeros']:,} numbers are −0.0, as where weights were multiplied by a mask, and take "
                "the room of a value; adding 0.0 to the weights makes them zeros"
            )
        return table


def inspect(path: str | Path) -> Inspection:
    """Read a whole file, a tensor at a time, and tell what it holds.

    Raises:
        StateError: The file is missing or damaged.
    """
    rows, count, nonzero, negative, dense = [], 0, 0, 0, 0
    with File(path) as file:
        densities: dict[str, float] = {}
        for name in file:
            form, tied = file.form(name), file.tied.get(name)
            encoding, size = file.encoding(name), 0
            if tied is None:
                bits = bits_of(file[name])
                found = int(np.count_nonzero(bits))
                if form.dtype in ("F64", "F32", "F16", "BF16"):
                    negative += int(np.count_nonzero(bits == 1 << 8 * form.itemsize - 1))
                count, nonzero, dense = count + prod(form.shape), nonzero + found, dense + form.nbytes
                densities[name] = found / prod(form.shape) if form.nbytes else 1.0
                size = encoding.size(form.shape, form.itemsize)
            rows.append(
                {
                    "name": name,
                    "shape": list(form.shape),
                    "dtype": str(DTYPES[form.dtype]).removeprefix("torch."),
                    "encoding": str(encoding) if tied is None else f"tied with {tied}",
                    "density": densities[tied or name],
                    "bytes": size,
                    "part": size / form.nbytes if form.nbytes else 1.0,
                }
            )
        totals = {
            "density": nonzero / count if count else 1.0,
            "negative_zeros": negative,
            "bytes": file.nbytes,
            "dense_bytes": dense,
            "part": file.nbytes / dense if dense else 1.0,
        }
    return Inspection(rows, totals)
