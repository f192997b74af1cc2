"""Whether this machine gives the ranks what their plan allocates: memory, and what bounds it.

Seesaw's shared memory (host buffer, random weights, the transport's region) is anonymous (`memfd_create`): it counts
as memory of the control group and against `ulimit -f`, but not against the size of `/dev/shm`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from seesaw.core.devices import CPU, DeviceKind
from seesaw.core.model_spec import DTYPE_BYTES
from seesaw.core.node import Place
from seesaw.core.units import format_bytes
from seesaw.models.parameters import parameters
from seesaw.preflight.findings import Finding
from seesaw.preflight.system import Machine, group_limit_of, read_machine
from seesaw.transport.region import OUTBOX_BYTES, region_bytes

if TYPE_CHECKING:
    from seesaw.deployment import Deployment

PROCESS_BYTES = 3 << 30
"""Address space that a process with torch has before it holds anything."""
_BASE_FILES, _FILES_PER_RANK = 128, 24
"""Descriptors that the control process needs, and for each rank: sockets, pipes, process descriptors."""

Reserve = Callable[[int], None]
"""Reserves and touches a little of so many bytes, and gives them back; raises `OSError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a plan allocates, in bytes."""

    host_buffer: int
    fixed: tuple[int, ...]
    """Of each rank, weights and workspace: taken whatever the job is."""
    pools: tuple[int, ...]
    """Of each rank, the KV pool: taken as the job fills it."""
    shared_weights: int
    """Random weights, or 0: a checkpoint's files are mapped, and their pages can be dropped."""
    mapped: int
    """Address space of the checkpoint's files, or of random weights."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.fixed)

    @property
    def certain(self) -> int:
        """What is taken before the first row."""
        return sum(self.fixed) + self.shared_weights + (OUTBOX_BYTES * self.world if self.world > 1 else 0)

    @property
    def most(self) -> int:
        """What is taken once the buffers are full."""
        return self.certain + sum(self.pools) + self.host_buffer

    @property
    def largest_rank(self) -> int:
        """The most that one rank allocates for itself."""
        return max(fixed + pool for fixed, pool in zip(self.fixed, self.pools, strict=True))

    @property
    def address_space(self) -> int:
        """Of the process that maps most."""
        return PROCESS_BYTES + self.largest_rank + self.host_buffer + self.mapped + region_bytes(self.world)


def needs_of(deployment: Deployment) -> Needs:
    """What the plan of `deployment` allocates."""
    spec, memory, width = deployment.spec, deployment.memory, DTYPE_BYTES[deployment.dtype]
    block = spec.layers * 2 * spec.kv_heads * deployment.options.block_size * spec.head_dim * width
    weights = stored_bytes(deployment)
    return Needs(
        host_buffer=memory.host_blocks * block,
        fixed=tuple(w + s for w, s in zip(memory.weights, memory.workspace, strict=True)),
        pools=memory.pool,
        shared_weights=weights if deployment.dummy else 0,
        mapped=weights,
    )


def stored_bytes(deployment: Deployment) -> int:
    """Of the weights that ranks map: as the checkpoint has them, or random ones in the type that is computed in."""
    dtype = deployment.dtype if deployment.dummy else deployment.spec.dtype
    return sum(parameter.size for parameter in parameters(deployment.spec)) * DTYPE_BYTES[dtype]


def check_limits(
    needs: Needs, places: Sequence[Place], *, device: DeviceKind = CPU, machine: Machine | None = None
) -> list[Finding]:
    """All that this machine has against the plan."""
    machine = machine or read_machine()
    if not device.on_host:  # what ranks hold on devices is no business of the host's memory
        nothing = (0,) * needs.world
        needs = replace(needs, fixed=nothing, pools=nothing)
    found = [
        memory(needs, machine),
        committed(needs, machine),
        address_space(needs, machine),
        file_size(needs, machine),
        open_files(needs, machine),
        locked_memory(needs, machine, device),
        *rank_groups(needs, places),
    ]
    findings = [finding for finding in found if finding is not None]
    if not any(finding.severity == "error" for finding in findings):
        findings += probe(needs)
    return findings


def memory(needs: Needs, machine: Machine) -> Finding | None:
    """Free memory, and the limit of the control group, against what the plan takes."""
    room, of = machine.available, "of memory are free"
    if machine.group is not None and machine.group.room < room:
        room, of = (
            machine.group.room,
            f"are left of the control group's limit of {_text(machine.group.limit)}",
        )
    if needs.certain > room:
        what = (
            f"memory: weights and workspaces of the ranks take {_text(needs.certain)}, and {_text(room)} {of}"
        )
        remedy = "use fewer data-parallel replicas, a smaller model or a larger limit"
        return Finding("error", what, remedy)
    if needs.most > room:
        what = (
            f"memory: the plan takes up to {_text(needs.most)} ({_text(needs.certain)} for weights and workspaces, "
            f"{_text(sum(needs.pools))} for device KV, {_text(needs.host_buffer)} for the host buffer), and "
            f"{_text(room)} {of}, so a rank may be killed as buffers fill"
        )
        return Finding("warning", what, "lower --device-memory or --host-kv")
    return None


def rank_groups(needs: Needs, places: Sequence[Place]) -> Iterator[Finding]:
    """Memory limits of the control groups that the node file puts ranks into."""
    for rank, place in enumerate(places):
        for folder in place.cgroups:
            limit = group_limit_of(Path(folder))
            if limit is None:
                continue
            whole = needs.fixed[rank] + needs.pools[rank]
            if whole > limit.room:
                certain = needs.fixed[rank] > limit.room
                what = (
                    f"memory: rank {rank} takes up to {_text(whole)}, and its control group {folder} leaves "
                    f"{_text(limit.room)} of {_text(limit.limit)}"
                )
                yield Finding(
                    "error" if certain else "warning", what, "lower --device-memory or raise its limit"
                )


def committed(needs: Needs, machine: Machine) -> Finding | None:
    """Where the kernel must back all memory that is reserved (`vm.overcommit_memory=2`)."""
    wanted = sum(needs.fixed) + sum(needs.pools)
    if machine.overcommit != 2 or machine.commit_room is None or wanted <= machine.commit_room:
        return None
    what = (
        f"memory: vm.overcommit_memory is 2 and lets {_text(machine.commit_room)} more be reserved, "
        f"while the ranks reserve {_text(wanted)}"
    )
    return Finding(
        "error",
        what,
        "set it to 0 (sysctl vm.overcommit_memory=0), raise vm.overcommit_ratio, or lower --device-memory",
    )


def address_space(needs: Needs, machine: Machine) -> Finding | None:
    """`ulimit -v`."""
    limit = machine.limits.get("-v")
    if limit is None or needs.address_space <= limit:
        return None
    what = (
        f"address space: a rank maps up to {_text(needs.address_space)}, most of which it never touches, and "
        f"ulimit -v allows {_text(limit)}"
    )
    return Finding("error", what, "run `ulimit -v unlimited` first")


def file_size(needs: Needs, machine: Machine) -> Finding | None:
    """`ulimit -f`, which holds for shared memory as well."""
    limit = machine.limits.get("-f")
    largest = max(needs.host_buffer, needs.shared_weights, region_bytes(needs.world))
    if limit is None or largest <= limit:
        return None
    what = f"file size: shared memory of {_text(largest)} is needed, and ulimit -f allows {_text(limit)}"
    return Finding("error", what, "run `ulimit -f unlimited` first")


def open_files(needs: Needs, machine: Machine) -> Finding | None:
    """`ulimit -n`."""
    limit, wanted = machine.limits.get("-n"), _BASE_FILES + _FILES_PER_RANK * needs.world
    if limit is None or wanted <= limit:
        return None
    what = f"open files: {needs.world} ranks need up to {wanted} descriptors, and ulimit -n allows {limit}"
    return Finding("error", what, f"run `ulimit -n {max(1024, wanted)}` first")


def locked_memory(needs: Needs, machine: Machine, device: DeviceKind) -> Finding | None:
    """`ulimit -l`, where host memory is pinned for a device; on CPU ranks nothing is."""
    limit, pinned = machine.limits.get("-l"), needs.host_buffer + needs.mapped
    if not device.pins_memory or limit is None or pinned <= limit:
        return None
    what = (
        f"pinned memory: host buffer and weights, {_text(pinned)}, are to be locked in memory for the device, and "
        f"ulimit -l allows {_text(limit)}"
    )
    remedy = (
        "run `ulimit -l unlimited` first (in a container: --ulimit memlock=-1); copies are slower without"
    )
    return Finding("warning", what, remedy)


def probe(needs: Needs, *, shared: Reserve | None = None, private: Reserve | None = None) -> list[Finding]:
    """Really reserve the host buffer and one rank's memory, touch both ends, and give them back."""
    findings = []
    for name, size, reserve, remedy in (
        ("the host buffer", needs.host_buffer, shared or reserve_shared, "lower --host-kv"),
        ("a rank's memory", needs.largest_rank, private or reserve_private, "lower --device-memory"),
    ):
        try:
            reserve(size)
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            findings.append(
                Finding("error", f"memory: {_text(size)} for {name} cannot be reserved ({why})", remedy)
            )
    return findings


def reserve_shared(size: int) -> None:
    """Anonymous shared memory, as the host buffer is. Raises `OSError`."""
    if size:
        fd = os.memfd_create("seesaw-probe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            with mmap.mmap(fd, size) as region:
                region[0] = region[size - 1] = 1
        finally:
            os.close(fd)


def reserve_private(size: int) -> None:
    """Private memory, as the arena of a rank is. Raises `OSError`."""
    if size:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
            region[0] = region[size - 1] = 1


def _text(count: int) -> str:
    return format_bytes(count)
