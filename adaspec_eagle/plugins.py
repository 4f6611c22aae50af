"""Code of a user's own: a module from a file, a function from `path.py:name`."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from adaspec_eagle.errors import UserError


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
