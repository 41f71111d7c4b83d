"""One row per matrix: how well it is approximated by low rank."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nyscaled.lowrank import LowRank, Status


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a matrix after its factorization.

    Attributes:
        name: of the matrix.
        rows: m.
        columns: n.
        rank: of the factors.
        relative_error: relative error of this rank in the Frobenius norm, estimated.
        stable_rank: ‖A‖_F² / ‖A‖₂².
        top_share: share of ‖A‖_F² in the largest singular values; NaN if fewer were computed.
        status: name of the `lowrank.Status`.
        errors: relative errors of the best approximations of ranks 0, 1, … as far as known.
    """

    name: str
    rows: int
    columns: int
    rank: int
    relative_error: float
    stable_rank: float
    top_share: float
    status: str
    errors: np.ndarray = dataclasses.field(repr=False)


def row(
    name: str,
    low_rank: LowRank,
    top: int,
    *,
    tol: float | None = None,
    max_rank: int | None = None,
) -> Row:
    """Return the row of a matrix.

    Args:
        name: of the matrix.
        low_rank: its factorization.
        top: of how many singular values `top_share` is.
        tol: the row is of the smallest rank with this relative error; None for all of `low_rank`.
        max_rank: the largest rank of the row; None for that of `low_rank`.
    """
    norm = float(low_rank.norm_estimate)
    # Squares of numbers that are divided by the norm stay in range.
    size = norm if norm > 0 else 1.0
    shares = (np.asarray(low_rank.singular_values, float) / size) ** 2
    left_out = (float(low_rank.error_estimate) / size) ** 2
    errors = np.sqrt(np.append(np.cumsum(shares[::-1])[::-1], 0) + left_out)
    status = Status(low_rank.status)
    exact = status is Status.EXACT
    rank = min(low_rank.left.shape[1], max_rank or low_rank.left.shape[1])
    if rank < len(shares):
        status = Status.RANK_REACHED
    if tol is not None:
        rank = max(1, min(int(np.sum(errors > tol)), rank))
        status = Status.CONVERGED if errors[rank] <= tol else Status.MAX_RANK
    return Row(
        name=name,
        rows=low_rank.left.shape[0],
        columns=low_rank.right.shape[0],
        rank=rank,
        relative_error=float(errors[rank]),
        stable_rank=float(1 / shares[0]) if shares[0] > 0 else 0.0,
        top_share=float(shares[:top].sum()) if exact or len(shares) >= top else np.nan,
        status=status.name,
        errors=errors,
    )


def write_csv(path: Path, table: Sequence[Row], top: int) -> None:
    """Write a table.

    Args:
        path: path of the file.
        table: its rows.
        top: of how many singular values `top_share` is, for the head of the column.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        share = f"share_of_top_{top}"
        writer.writerow(
            ["name", "rows", "columns", "rank", "relative_error", "stable_rank", share, "status"]
        )
        for r in table:
            numbers = (f"{x:.6g}" for x in (r.relative_error, r.stable_rank, r.top_share))
            writer.writerow([r.name, r.rows, r.columns, r.rank, *numbers, r.status])


def kinds(names: Sequence[str]) -> list[str]:
    """Return for each weight the kind of its layer: the end of its name, without numbers.

    Args:
        names: names of weights; those of one kind differ only in numbers.

    Examples:
        >>> kinds(["h.0.attn.q.weight", "h.1.attn.q.weight", "h.0.mlp.up.weight"])
        ['q', 'q', 'up']
    """
    paths = [
        tuple(part for part in re.split(r"[./]", name) if not part.isdigit()) for name in names
    ]
    paths = [path[:-1] if path[1:] and path[-1] in ("weight", "kernel") else path for path in paths]
    distinct = set(paths)

    def shortest(path: tuple[str, ...]) -> str:
        for length in range(1, len(path)):
            if sum(other[-length:] == path[-length:] for other in distinct) == 1:
                return ".".join(path[-length:])
        return ".".join(path)

    return [shortest(path) for path in paths]


def depth(name: str) -> int | None:
    """Return the first number in the name of a weight, which is that of its layer.

    Args:
        name: of the weight.

    Examples:
        >>> depth("h.11.attn.q.weight")
        11
    """
    return next((int(part) for part in re.split(r"[./]", name) if part.isdigit()), None)
