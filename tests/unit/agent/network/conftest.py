import subprocess
from collections.abc import Iterator

import pytest
from dummy_switch import BRIDGE, QUIET, SCHEMA, DummySwitch


@pytest.fixture
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DummySwitch]:
    folder = tmp_path_factory.mktemp("ovs")
    subprocess.run(["ovsdb-tool", "create", folder / "conf.db", SCHEMA], check=True)
    switch = DummySwitch(folder)
    server = subprocess.Popen(
        [
            *("ovsdb-server", f"{folder}/conf.db", f"--remote=punix:{folder}/db.sock", *QUIET),
            *(f"--unixctl={folder}/db.ctl", f"--log-file={folder}/db.log"),
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        switch.vsctl("--retry", "init", wait=False)
        switch.start()
        switch.vsctl("add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=dummy")
        yield switch
    finally:
        switch.kill()
        server.terminate()
        server.wait(10)
