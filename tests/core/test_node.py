"""Node files: what is read, and what is refused with which sentence."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from seesaw.core.errors import ConfigError
from seesaw.core.node import Node, Place, load_node

FULL = {
    "address": "10.77.0.1",
    "interface": "eth0",
    "netns": "/proc/123/ns/net",
    "cgroups": ["/sys/fs/cgroup/rig/rank0"],
    "cores": [0, 1],
}


def write(folder: Path, content: object) -> Path:
    path = folder / "node.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    node = load_node(write(tmp_path, {"ranks": [FULL, {**FULL, "address": "fd00::2"}]}))
    assert node.ranks[0] == Place(**FULL)
    assert node.ranks[1].address == "fd00::2"


def test_every_field_may_be_left_out(tmp_path: Path) -> None:
    assert load_node(str(write(tmp_path, {"ranks": [{}, {"cores": [1]}]}))) == Node(
        [Place(), Place(cores=[1])]
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    node = Node([Place(**FULL), Place(address="10.77.0.2", netns="/proc/124/ns/net")])
    assert load_node(write(tmp_path, msgspec.json.encode(node).decode())) == node


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "node.json"),
        ({"ranks": []}, "has no ranks"),
        ({"ranks": [{"addr": "10.0.0.1"}]}, "addr`"),
        ({"ranks": [{"cores": "0"}]}, r"\$\.ranks\[0\]\.cores"),
        ({"ranks": [{"cores": [-1]}]}, r"rank 0 has the cores \[-1\]"),
        ({"ranks": [{"address": "rank0"}]}, "'rank0', which is not an IP address"),
        ({"ranks": [FULL, {}]}, r"ranks \[1\] have no address"),
        ({"ranks": [FULL, {**FULL, "netns": "/proc/124/ns/net"}]}, "address 10.77.0.1 of rank 0"),
        ({"ranks": [{"netns": "/proc/123/ns/net"}]}, "has no address there"),
        ({"ranks": [{**FULL, "netns": "rank0"}]}, "'rank0'; write the paths"),
        ({"ranks": [{"cgroups": ["rig/rank0"]}]}, "'rig/rank0'; write the paths"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_node(write(tmp_path, content))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_node(tmp_path / "gone.json")
