"""Heads out of this package and into it: a folder in another layout, whole, with its card."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaspec_eagle.card import model_card, publishable, target_licence
from adaspec_eagle.errors import UserError
from adaspec_eagle.formats import OURS, to_layout
from adaspec_eagle.head import HeadConfig, build_head, check_target, load_head
from adaspec_eagle.published import check_fields, detect, from_layout, is_ours
from adaspec_eagle.record import sha256
from adaspec_eagle.storage import local_folder, read_json, read_weights, weights_file, write_head
from adaspec_eagle.targets import Target


def export_head(
    name: str | Path,
    to: str,
    out: Path,
    target: str | None = None,
    licence: str | None = None,
    result: Path | None = None,
    where: str | None = None,
) -> Path:
    """Write the head of a folder (or hub id) to the new folder `out` as another engine reads it.

    target: the same weights by the name that readers shall use, None for the one that the head
    names. For the card: licence of the target, None to look it up; result, a result.json of
    eval/speedup.py; where, the hub id that it will have. Raises UserError, before anything is
    written, for what the engine cannot run, for a head or a target that cannot be loaded or do not
    fit, and for an `out` that is taken.
    """
    check_free(out)
    folder = local_folder(name)
    config = read_json(folder / "config.json")
    if not is_ours(config):
        found, _ = detect(folder, config, read_weights(folder))
        raise UserError(f"{folder} is in layout {found!r}: import it first (--from {found})")
    head = load_head(folder)
    fields, notes = asdict(head.config), folder / "train.json"
    fields["target"] = target or head.config.target
    if where:
        licence = publishable(fields["target"], licence)
    measured = read_result(result, folder) if result else None
    loaded = _load_target(fields["target"], head.parameters())
    check_target(head.config, loaded)
    layout = to_layout(to, fields, head.state_dict(), loaded)
    card = model_card(
        fields,
        read_json(notes) if notes.is_file() else None,
        licence or target_licence(fields["target"]),
        to,
        where or str(out),
        measured,
    )
    write_head(out, layout.config, layout.tensors, card, token_map=layout.token_map)
    return out


def import_head(name: str | Path, source: str, out: Path, target: str | None = None) -> Path:
    """Write a head in layout `source`, from a folder or hub id, to `out` in this package's layout.

    target: None for the one that the head's config names. Raises UserError as `from_layout` does,
    and for an `out` that is taken.
    """
    check_free(out)
    folder = local_folder(name)
    config = read_json(folder / "config.json")
    if is_ours(config):
        raise UserError(f"{folder} is in this package's own layout: there is nothing to import")
    check_fields(folder / "config.json", config)
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    known = target or (config.get(OURS) or {}).get("target") or verifier.get("name_or_path")
    if known is None:
        raise UserError(f"{folder} does not say for which target the head is: give --target")
    loaded = _load_target(known, read_weights(folder).values())
    fields, state = from_layout(folder, loaded, source)
    head = build_head(HeadConfig(**fields), state, weights_file(folder))
    check_target(head.config, loaded)
    head.save(out)
    return out


def _load_target(name: str, weights: Iterable[Tensor]) -> Target:
    """The target of a head with these weights, in their dtype; for float16 in bfloat16, which keeps
    the fingerprint of weights below float16's smallest."""
    dtype = next((t.dtype for t in weights if t.is_floating_point()), None)
    return Target.load(name, dtype=torch.bfloat16 if dtype == torch.float16 else dtype)


def check_free(out: Path) -> None:
    """Raise UserError if a folder cannot be made there."""
    if out.resolve() == Path.cwd():
        raise UserError(f"--out {out} is the current folder: name a new one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new folder with --out")


def read_result(path: Path, folder: Path) -> dict[str, Any]:
    """A result.json of eval/speedup.py; UserError if it is none, or measured another head."""
    result = read_json(path)
    if result.get("kind") != "speedup":
        raise UserError(f"{path} is no result of eval/speedup.py: its kind is {result.get('kind')}")
    if (result.get("head") or {}).get("sha256") != sha256(weights_file(folder)):
        raise UserError(f"{path} is no measurement of the head in {folder}: other weights")
    trained_for = read_json(folder / "config.json").get("target_fingerprint")
    measured = result["target"].get("fingerprint")
    if trained_for and measured != trained_for:
        raise UserError(
            f"{path} measured the head with a target of weights {measured}, which it was "
            f"not trained for ({trained_for} are its own): measure it with its own target"
        )
    return result
