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
    """Put the finished folder `made` in the place of `folder` (same file system), old one gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
