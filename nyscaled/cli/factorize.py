"""Approximate each matrix of a file by factors of low rank.

FILE is .npy, .npz (arrays, or a sparse matrix of SciPy), .mtx, .mtx.gz, .h5, .hdf5, .safetensors,
.gguf, or a folder of a model. Arrays larger than a quarter of the memory are read by blocks.

A .csv has one row per matrix, with a picture beside it. A .npz or .safetensors has left,
singular_values, right, error_estimate, norm_estimate, numerical_rank, passes and status; if several
matrices are factorized, each name begins with the matrix's and a dot.

examples:
  nyscaled factorize a.npy --tol 1e-3 --out factors.npz
  nyscaled factorize counts.mtx.gz --rank 50 --out factors.safetensors
  nyscaled factorize model.safetensors --name '.*q_proj.*' --tol 0.1 --out queries.npz
  nyscaled factorize model-folder --tol 0.1 --out weights.csv   # and weights.png
  nyscaled factorize a.npy --config options.toml --rank 20      # flags override the file
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from nyscaled.cli import inputs, outputs, table
from nyscaled.lowrank import LowRank, Status, factorize
from nyscaled.numerics import keeping
from nyscaled.validation import require_count, require_scalar

SAFE = ".safetensors"
FACTORS = (".npz", SAFE)
TABLE = ".csv"
WHOLE = 1024
"""Of a matrix whose smaller side is at most this, a table has all singular values."""
PARTS = (
    "left",
    "singular_values",
    "right",
    "error_estimate",
    "norm_estimate",
    "numerical_rank",
    "passes",
    "status",
)
"""What of a `LowRank` is written."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `nyscaled factorize`."""

    file: Positional[Path]
    """The file, or the folder of a model."""
    tol: float | None = None
    """Largest error, in the Frobenius norm and relative to the matrix, at most 1. The rank is
    found."""
    rank: int | None = None
    """Rank of the factors; the largest rank if --tol is given too. A matrix whose shorter side is
    less gets factors of all its rank."""
    name: str | None = None
    """Regular expression for whole names of arrays, datasets or tensors. By default all matrices of
    floats are taken."""
    out: Path | None = None
    """File to write: .npz or .safetensors for factors, .csv for a table and a picture."""
    overwrite: bool = False
    """Replace existing files."""
    top: int = 8
    """How many singular values the column share_of_top counts."""
    passes: int | None = None
    """Products with the matrix or its transpose, without --tol; 6 by default."""
    seed: int = 0
    """Seed of the random start, at least 0."""
    config: Path | None = None
    """YAML or TOML file of these options; flags override it."""


def run(config: Config) -> int:
    """Factorize the matrices of a file; return 1 if one of them misses the tolerance.

    Args:
        config: the options.

    Raises:
        ValueError: on a file or an option that cannot be used.
        OSError: if a file cannot be read or written.
    """
    paths = _places(config)
    _require_options(config)
    outputs.require_writable(paths, overwrite=config.overwrite)
    entries = inputs.entries(config.file, config.name)
    rows: list[table.Row] = []
    arrays: dict[str, np.ndarray] = {}
    several = len(entries) > 1
    with tqdm(entries, unit="matrix", file=sys.stderr, disable=None if several else True) as bar:
        for entry in bar:
            if paths and paths[0].suffix in FACTORS:
                low_rank = _factorized(entry, config, _rank(entry, config))
                rows.append(table.row(entry.name, low_rank, config.top))
                prefix = f"{entry.name}." if several else ""
                arrays |= {f"{prefix}{part}": getattr(low_rank, part) for part in PARTS}
            else:
                rows.append(_row(entry, config))
    if not several or not paths:
        for row in rows:
            print(_line(config.file, row))
    if paths:
        outputs.write(_writers(paths, config, rows, arrays), overwrite=config.overwrite)
        print("wrote " + " and ".join(map(str, paths)))
    small = sum(_is_clipped(entry, config) for entry in entries)
    if small:
        print(
            f"nyscaled factorize: {small} of {len(rows)} matrices: the shorter side is less than "
            f"--rank {config.rank}, and is the rank of the factors",
            file=sys.stderr,
        )
    missed = sum(config.tol is not None and r.relative_error > config.tol for r in rows)
    if missed:
        print(
            f"nyscaled factorize: {missed} of {len(rows)} matrices: the estimated error is above "
            f"--tol {config.tol:g}",
            file=sys.stderr,
        )
    return int(missed > 0)


def _places(config: Config) -> list[Path]:
    """The files to write: the picture stands beside the table."""
    out = config.out
    if out is None:
        return []
    if out.suffix not in (*FACTORS, TABLE):
        raise ValueError(f"--out ends in {out.suffix!r}; expected {', '.join(FACTORS)} or {TABLE}")
    return [out, out.with_suffix(".png")] if out.suffix == TABLE else [out]


def _require_options(config: Config) -> None:
    if config.tol is None and config.rank is None:
        raise ValueError("--tol and --rank are missing; expected at least one of them")
    if config.tol is not None:
        require_scalar("--tol", config.tol, 0, 1, open_low=True)
        if config.passes is not None:
            raise ValueError(
                f"--passes is {config.passes} and --tol is given; expected one of them"
            )
    for name, low in (("rank", 1), ("top", 1), ("passes", 2), ("seed", 0)):
        if getattr(config, name) is not None:
            require_count(f"--{name}", getattr(config, name), low)


def _rank(entry: inputs.Entry, config: Config) -> int | None:
    """The rank that is asked for, or what the matrix has of it."""
    return None if config.rank is None else min(config.rank, *entry.shape)


def _is_clipped(entry: inputs.Entry, config: Config) -> bool:
    return config.tol is None and config.rank is not None and config.rank > min(entry.shape)


def _row(entry: inputs.Entry, config: Config) -> table.Row:
    """The row of a matrix, of which all singular values are found if they are few."""
    least = min(entry.shape)
    rank = _rank(entry, config) or least
    if least <= WHOLE:
        low_rank = _factorized(entry, dataclasses.replace(config, tol=None), least)
    else:
        low_rank = _factorized(entry, config, rank)
    return table.row(entry.name, low_rank, config.top, tol=config.tol, max_rank=rank)


def _factorized(entry: inputs.Entry, config: Config, rank: int | None) -> LowRank:
    """The factors of a matrix as NumPy arrays; float64 stays float64."""
    a = entry.load()
    rank, max_rank = (rank, None) if config.tol is None else (None, rank)
    key = jax.random.key(config.seed)
    try:
        if config.out is not None and config.out.suffix == SAFE and a.dtype == np.complex128:
            raise ValueError(f"it is complex128, which no {SAFE} holds; expected --out in .npz")
        with keeping(a.dtype):
            low_rank = factorize(
                a, rank, tol=config.tol, key=key, passes=config.passes, max_rank=max_rank
            )
            return jax.tree.map(np.asarray, low_rank)
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}" if entry.name else str(error)) from error


def _writers(
    paths: list[Path], config: Config, rows: list[table.Row], arrays: dict[str, np.ndarray]
) -> dict[Path, outputs.Writer]:
    if paths[0].suffix in FACTORS:
        return {paths[0]: functools.partial(outputs.write_arrays, arrays=arrays)}
    from nyscaled.cli import picture

    figure = picture.draw(rows, config.file.resolve().name, config.tol)
    return {
        paths[0]: functools.partial(table.write_csv, table=rows, top=config.top),
        paths[1]: functools.partial(picture.write_png, figure=figure),
    }


def _line(path: Path, row: table.Row) -> str:
    return (
        f"{row.name or path}: {row.rows} × {row.columns}, rank {row.rank}, relative error "
        f"{row.relative_error:.3g}, stable rank {row.stable_rank:.3g}: {Status[row.status].message}"
    )
