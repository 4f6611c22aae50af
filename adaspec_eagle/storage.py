"""A head's files: from a folder or the hub, safetensors or pickled, and back to the hub."""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaspec_eagle.errors import UserError, first_line
from adaspec_eagle.paths import replace_folder

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in this order
HUB_ERRORS = (HTTPError, OSError, ValueError)  # no network, no such repository, no permission
TOKEN_MAP = "hot_token_id.pt"  # target ids [Vd]; SGLang's --speculative-token-map for EAGLE-1
HEAD_FILES = {"config.json", "README.md", "train.json", TOKEN_MAP, *WEIGHTS}
PATTERNS = ["*.json", "*.md", TOKEN_MAP, *WEIGHTS]  # what is fetched of a repository


def local_folder(name: str | Path) -> Path:
    """The folder of that name, or a hub repository's files in the hub's cache.

    Raises UserError if it is neither, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise UserError(f"no head in {name}: the folder does not exist (a hub id is OWNER/NAME)")
    try:
        return Path(snapshot_download(str(name), allow_patterns=PATTERNS))
    except HUB_ERRORS as error:
        raise UserError(
            f"no head {name!r}: there is no such folder, and as a hub id it cannot be fetched: "
            f"{first_line(error)}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError says what is wrong with it."""
    if not path.is_file():
        raise UserError(f"there is no {path.name} in {path.parent}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object")
    return data


def weights_file(folder: Path) -> Path:
    """The file with a head's weights; UserError if there is none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p.name for p in folder.iterdir())
    raise UserError(f"no weights in {folder}: looked for {' and '.join(WEIGHTS)}, found {found}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A head's tensors on the CPU; pickled ones only with `weights_only=True`."""
    path = weights_file(folder)
    if path.suffix == ".bin":
        state = read_pickled(path)
        if isinstance(state, dict) and all(isinstance(t, Tensor) for t in state.values()):
            return state
        raise UserError(f"{path} holds no dictionary of tensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read (truncated, or no safetensors): {error}") from error


def read_pickled(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors and plain containers; else UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as plain tensors ({first_line(error)}); pickled code is never "
            "run. Convert it to model.safetensors where you trust it"
        ) from error


def write_head(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    card: str | None = None,
    notes: dict[str, Any] | None = None,
    token_map: Tensor | None = None,
) -> None:
    """Write config.json and model.safetensors and, if given, README.md, train.json and TOKEN_MAP.

    All or nothing. A head that the folder held is replaced; other files in it stay. UserError for
    the current folder, which cannot be replaced under the program's feet.
    """
    folder = Path(os.path.realpath(folder))  # of a link, the folder that it leads to
    if folder == Path.cwd():
        raise UserError(f"a head cannot be written to the current folder {folder}: name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
        made = Path(scratch) / "head"
        made.mkdir()
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        (made / "model.safetensors").chmod(0o644)  # safetensors makes it private
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if card is not None:
            (made / "README.md").write_text(card)
        if notes is not None:
            (made / "train.json").write_text(json.dumps(notes, indent=1) + "\n")
        if token_map is not None:
            torch.save(token_map, made / TOKEN_MAP)
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, made / entry.name, symlinks=True)
            elif entry.name not in HEAD_FILES:
                shutil.copy2(entry, made / entry.name, follow_symlinks=False)
        replace_folder(made, folder)


def check_push(repo: str, log_in: bool = True) -> None:
    """Raise UserError if nothing could be pushed there: a bad id or, with `log_in`, no token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no hub id (OWNER/NAME): {first_line(error)}") from error
    if not log_in:
        return
    try:
        HfApi().whoami()
    except HUB_ERRORS as error:
        raise UserError(f"cannot push to {repo}: {first_line(error)}; `hf auth login`") from error


def push_folder(folder: Path, repo: str) -> str:
    """Upload a folder's files to a model repository, made if need be; returns its address."""
    try:
        api = HfApi()
        address = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add draft head")
    except HUB_ERRORS as error:
        raise UserError(f"cannot push to {repo}: {first_line(error)}") from error
    return str(address)
