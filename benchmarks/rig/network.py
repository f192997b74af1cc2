"""The commands that build the network of a rig: a bridge in a hub namespace, one link to each rank's namespace.

Everything lies in namespaces without a name, so the kernel removes it with the process that holds them. Nothing is
changed in the namespace of the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Settings

INTERFACE = "eth0"
_BRIDGE = "bridge0"
_QUEUE_BYTES = 64 << 20
"""What may wait at a link: more than TCP ever leaves there, since a link inside a machine loses nothing."""
_WINDOW_BYTES = 4 << 20
"""Most that one connection keeps under way: several times what the link holds, and a bound for its queue."""


@dataclass(frozen=True)
class Step:
    """One program run in one namespace."""

    namespace: int
    """Rank, or -1 for the hub."""
    argv: list[str]
    stdin: str
    needs: str
    """What the step asks of the kernel, for the sentence when it fails."""


def address(rank: int) -> str:
    """IP address of a rank, inside the rig."""
    return f"10.77.0.{rank + 1}"


def hardware_address(rank: int) -> str:
    """MAC address of a rank's interface."""
    return f"02:00:0a:4d:00:{rank + 1:02x}"


def steps(settings: Settings, namespaces: list[str]) -> list[Step]:
    """All commands in order. `namespaces[r]` is a path that opens the namespace of rank r."""
    found = [
        _ip(-1, f"link add {_BRIDGE} type bridge forward_delay 0 stp_state 0 mcast_snooping 0", "bridges")
    ]
    found.append(_ip(-1, f"link set {_BRIDGE} up", "bridges"))
    for rank, path in enumerate(namespaces):
        found += _link(settings, rank, path)
    return found


def sysctls(rank: int) -> dict[str, tuple[str, ...]]:
    """Files under `/proc/sys/net` and their values, the best first, for a namespace (rank -1: the hub)."""
    common: dict[str, tuple[str, ...]] = {
        "ipv6/conf/all/disable_ipv6": ("1",),
        "ipv6/conf/default/disable_ipv6": ("1",),
    }
    if rank < 0:
        return common | {"bridge/bridge-nf-call-iptables": ("0",), "bridge/bridge-nf-call-arptables": ("0",)}
    windows = f"4096 {_WINDOW_BYTES // 4} {_WINDOW_BYTES}"
    return common | {
        # a namespace may use what its host allows to all: always Reno, and often what the host itself uses
        "ipv4/tcp_congestion_control": ("cubic", "reno"),
        "ipv4/tcp_slow_start_after_idle": ("0",),
        "ipv4/tcp_no_metrics_save": ("1",),
        "ipv4/tcp_rmem": (windows,),
        "ipv4/tcp_wmem": (windows,),
    }


def _link(settings: Settings, rank: int, path: str) -> list[Step]:
    port, mtu = f"port{rank}", settings.mtu
    peer = f"peer name {INTERFACE} mtu {mtu} address {hardware_address(rank)} netns {path}"
    hub = [
        f"link add {port} mtu {mtu} type veth {peer}",
        f"link set {port} gso_max_size {mtu} gso_max_segs 1 master {_BRIDGE} up",
    ]
    own = [
        f"link set {INTERFACE} gso_max_size {mtu} gso_max_segs 1 up",
        "link set lo up",
        f"addr add {address(rank)}/24 dev {INTERFACE}",
    ]
    own += [
        f"neigh add {address(other)} lladdr {hardware_address(other)} dev {INTERFACE} nud permanent"
        for other in range(settings.ranks)
        if other != rank
    ]
    found = [_ip(-1, "\n".join(hub), "virtual Ethernet pairs (veth)")]
    found.append(_ip(rank, "\n".join(own), "virtual Ethernet pairs (veth)"))
    if settings.rate is not None:
        found += [_limit(settings, rank, INTERFACE), _limit(settings, -1, port)]
    return found


def _limit(settings: Settings, namespace: int, device: str) -> Step:
    """Two buckets in one: the long one holds the mean rate, the short one keeps a message from passing at once.

    A timer of the kernel is late by tens of microseconds, and by milliseconds on a busy machine; what a link misses
    so it makes up for at a little more than its rate, out of the long bucket.
    """
    argv = f"tc qdisc add dev {device} root tbf rate {settings.rate}bit burst {settings.burst} limit {_QUEUE_BYTES}"
    argv += f" peakrate {settings.peak_rate}bit minburst {settings.at_once}"
    return Step(namespace, argv.split(), "", "token buckets (sch_tbf)")


def _ip(namespace: int, batch: str, needs: str) -> Step:
    return Step(namespace, ["ip", "-batch", "-"], batch + "\n", needs)
