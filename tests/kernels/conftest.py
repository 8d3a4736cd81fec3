import pytest

from emulated import builder


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """A kernel compiled for the host: emulated(harness, sources, macros) gives launch(...)."""
    return builder(tmp_path_factory.mktemp("kernels"))
