"""Where things lie, and writing them so that a kill or a full disk leaves the old ones whole."""

import os
import shutil
from pathlib import Path


def default_cache_dir() -> Path:
    """The user's cache: $ADASPEC_CACHE, or adaspec_eagle in the system's cache folder."""
    if "ADASPEC_CACHE" in os.environ:
        return Path(os.environ["ADASPEC_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "adaspec_eagle"


def replace_folder(made: Path, folder: Path) -> None:
    """Put the finished folder `made` in the place of `folder` (same file system), old one gone.

    If it fails or is killed half-way, the old folder stays, at the worst under NAME.old.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        made.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
