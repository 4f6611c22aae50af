"""Settings for all tests: no network, one thread for tiny models, the real data if it is there."""

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, and so do the
    threads = (os.cpu_count() or 1) // int(workers)  # programs that their tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest  # noqa: E402 - the environment comes first
import torch  # noqa: E402

from adaspec_eagle.errors import UserError  # noqa: E402
from adaspec_eagle.targets import DEFAULT_TARGET, Target  # noqa: E402

THREADS = torch.get_num_threads()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests come first: several processes then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """One thread for tiny models, where more only wait for one another; fixtures included."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _all_threads(request: pytest.FixtureRequest, _few_threads: None):
    """All threads for tests with the real target."""
    if "real_target" in request.fixturenames:
        torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """What trees cost on this machine is measured for the tests, not kept in the user's cache; nor
    is which code they named."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    for module in ("auto", "plugins"):
        monkeypatch.setattr(f"adaspec_eagle.{module}.default_cache_dir", lambda: folder)


@pytest.fixture(scope="session")
def real_target() -> Target:
    """The default target in float32; the tests that need it are skipped where it cannot be had."""
    try:
        return Target.load(DEFAULT_TARGET, dtype="float32")
    except UserError as error:
        pytest.skip(f"the default target is not there: {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Prompt files to measure on: $ADASPEC_DATA, else ../shared/data beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ADASPEC_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no prompt files in {folder}; set ADASPEC_DATA to a folder with dev/*.jsonl")
    return folder
