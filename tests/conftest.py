"""What every test process needs before the first test: its share of the tests, and the device they run on."""

import os
import signal

import pytest

from tests.support import device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default=device.CPU,
        choices=(device.CPU, "cuda"),
        help="where models run, as worker.device has it; ROCm answers to cuda",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` a file's tests stay in one process, as its servers do, unless they name another group."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): tests that share a service")  # also without xdist
    # Started in the background, a shell has these ignored, and what a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    chosen = config.getoption("--device")
    if trouble := device.trouble(chosen):
        raise pytest.UsageError(trouble)
    os.environ[device.VARIABLE] = chosen
