import factory
import pytest

from kvsight.records import Records
from kvsight.report.build import build
from kvsight.report.contents import contents


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Records of all commands; tests must not change them."""
    return factory.write(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def found(directory):
    return contents(Records.read(directory))


@pytest.fixture(scope="session")
def page(directory):
    """The page of all records, with its figures beside it."""
    return build(directory).path
