"""What all tests of the agent share: libvirtds and QEMU builds."""

from collections.abc import Iterator

import pytest
from builds import Builds
from libvirtds import running_libvirtd


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a libvirtd with nothing defined; every domain that a test leaves is destroyed at the end."""
    with running_libvirtd(tmp_path_factory.mktemp("libvirtd")) as uri:
        yield uri


@pytest.fixture(scope="session")
def other_libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a second one: the destination's."""
    with running_libvirtd(tmp_path_factory.mktemp("other-libvirtd")) as uri:
        yield uri


@pytest.fixture(scope="session")
async def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """One set for all tests: to probe a build whose path is new takes longer than a whole handoff."""
    return await Builds.probed(tmp_path_factory.mktemp("builds"))
