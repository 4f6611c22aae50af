"""What makes a figure quotable: its environment, its interval, its file, its table."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaspec_eagle.errors import UserError

PACKAGES = ("adaspec-eagle", "torch", "transformers", "tokenizers", "safetensors", "numpy")
CODE = tuple(f":/{name}" for name in ("adaspec_eagle", "heads", "scripts", "eval", "setup.cfg"))
RESAMPLES = 2000


# ---- environment ---------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Where a figure came from: versions, machine, commit and command line."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _checkout(),
        "argv": [shown(sys.argv[0]), *sys.argv[1:]],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name as the kernel gives it, else what `platform` knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _checkout() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks this package, else the running script.

    As they are when it is first asked for, which programs do when they begin; dirty: code differs.
    """
    for file in (Path(__file__), Path(sys.argv[0])):
        folder, name = file.resolve().parent, file.name
        if name and _git(folder, "ls-files", "--error-unmatch", name) is not None:
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
            return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changes)}
    return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in `folder`; None without git, without a checkout, or on failure."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---- files ---------------------------------------------------------------------------------------


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(path: str | Path) -> str:
    """A path as a record shows it: relative where it lies under the working directory."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def check_folder(folder: Path) -> None:
    """Make the folder of a result; UserError, before any work, if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out {folder}: {error.strerror}; name a folder that can be written to"
        ) from error


def write_json(path: str | Path, data: Any) -> Path:
    """Write `data` as JSON so that a reader sees the old file or the whole new one, never a part.

    Raises UserError if the file cannot be written (a full disk, no permission); the old one stays.
    Numbers that are not finite are refused (ValueError): a figure is a number or it is absent.
    """
    return write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """`write_bytes` of UTF-8 text."""
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file aside, then rename it into place; makes its folder. Errors as `write_json`."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        reason = f"{error.strerror}; an older file is unchanged"
        raise UserError(f"cannot write {path}: {reason}") from error
    return path


def one_line(data: Any) -> str:
    """`data` as one line of JSON, for the last line of a script's stdout."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


# ---- intervals -----------------------------------------------------------------------------------


def resampled_sums(columns: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Column sums over `resamples` draws, with replacement, of the rows of `columns [P, C]`.

    A row holds one prompt's counts and seconds for all arms, so a draw keeps them paired. The same
    P and seed draw the same prompts, whatever the columns. Returns `[resamples, C]`.
    """
    rows = len(columns)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # [R, P]
    return times @ np.asarray(columns, dtype=float)  # [R, C]


def interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """The 95 % percentile interval `[lo, hi]` of resampled figures."""
    low, high = np.percentile(np.asarray(values, dtype=float), [2.5, 97.5])
    return [float(low), float(high)]


def bootstrap_ratio(
    columns: np.ndarray, ratio: Callable[[np.ndarray], np.ndarray | float], seed: int = 0
) -> list[float]:
    """95 % percentile bootstrap interval over prompts of a ratio of sums.

    columns `[P, C]`: what the ratio needs of each prompt; `ratio` takes sums `[C]` and gives a
    number. Returns `[lo, hi]`.
    """
    return interval([float(ratio(sums)) for sums in resampled_sums(columns, seed=seed)])


# ---- tables --------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: first column to the left, the others (figures) to the right."""
    rule = [":---"] + ["---:"] * (len(header) - 1)
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def with_interval(value: float, bounds: Sequence[float] | None, digits: int = 2) -> str:
    """`1.52 [1.48, 1.57]`; without bounds, or with those of one prompt alone, the value alone."""
    text = f"{value:.{digits}f}"
    if bounds is None or bounds[0] == bounds[1]:
        return text
    return f"{text} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
