"""Code of a user's own: a module from a file, a function from `path.py:name`.

A head's config names its class, and heads are passed around. So code that only a config names is
run where this user has named it before, on any command line (a list in the user's cache), or where
the environment says so (ALLOW).
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from adaspec_eagle.errors import UserError
from adaspec_eagle.paths import default_cache_dir

ALLOW = "ADASPEC_ALLOW_CODE"  # 1: whatever a head's config names is run
_named: set[str] = set()  # by this process


def remember_code(name: str) -> None:
    """Note that the user named this file or module: heads whose config names it load from now on.

    Where the cache cannot be written, for this process only.
    """
    place = _place(name)
    if place not in _known_code():
        _named.add(place)
        try:
            _list().parent.mkdir(parents=True, exist_ok=True)
            with _list().open("a") as file:
                file.write(f"{place}\n")
        except OSError:
            pass


def check_code(name: str, where: Path) -> None:
    """Raise UserError for a file or module named by a head's config (in `where`) alone."""
    place = _place(name)
    if place not in _known_code() and os.environ.get(ALLOW) != "1":
        raise UserError(
            f"{where}: the head's config names the code {place}, which loading it would run. "
            f"Read it, and where you trust it, set {ALLOW}=1"
        )


def _place(name: str) -> str:
    return str(Path(name).expanduser().resolve()) if name.endswith(".py") else name


def _list() -> Path:
    return default_cache_dir() / "code.txt"


def _known_code() -> set[str]:
    try:
        return _named | set(_list().read_text().splitlines())
    except OSError:
        return _named


def module_of(file: str) -> ModuleType:
    """The module in a Python file, run once. Raises UserError where there is no such file."""
    path = Path(file).expanduser().resolve()
    place = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # tells files of one stem apart
    name = f"adaspec_plugin_{path.stem}_{place}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise UserError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def is_function_path(text: str) -> bool:
    """Whether the text has the form `path.py:name`."""
    return ".py:" in text


def function_of(text: str) -> Callable:
    """The function that `path.py:name` names. Raises UserError where there is none."""
    file, _, name = text.rpartition(":")
    found = getattr(module_of(file), name, None)
    if not callable(found):
        raise UserError(f"{text!r}: {file} has no function {name!r}")
    return found
