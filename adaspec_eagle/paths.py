"""Where things lie, and writing them so that a kill or a full disk leaves the old ones whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def taken(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this worker holds the lock file inside the block; the system frees a dead one's.

    wait: until whoever has it is done.
    """
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
