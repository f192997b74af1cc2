"""Reading what people write for a node: `8xL4`, `4 x A100-80GB-PCIe`, `8xL4@pcie4x8`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec
from seesaw.planning.catalogue.compose import compose
from seesaw.planning.catalogue.data import Device, Link, devices, fits, links

MAX_RANKS = 64
_TEXT = re.compile(r"\s*(?:(\d+)\s*[x×*]\s*)?([^@]+?)\s*(?:@\s*([^/]*?)\s*(?:/\s*(.*?)\s*)?)?", re.IGNORECASE)
_NOISE = {"nvidia", "geforce", "tesla", "rtx", "gpu", "blackwell", "server", "workstation", "edition"}
_SAME = {"40gb": "40g", "80gb": "80g", "141gb": "141g", "sxm4": "sxm", "sxm5": "sxm"}


def names() -> list[str]:
    """Every device of the catalogue."""
    return list(devices())


def hardware(text: str) -> HardwareSpec:
    """The node that `text` names: `[RANKSx]DEVICE[@LINK[/BOX]]`, in any case.

    `L4` is one rank. LINK, such as `pcie4x8`, replaces the device's own; if it is PCIe, host memory is reached by
    it as well. BOX is the measured node whose links are taken as the pattern (see docs/hardware.md).
    Raises `ConfigError` naming what would work.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ConfigError(f"hardware {text!r}: write RANKSxDEVICE, such as 8xL4 or 4xA100-80G-PCIe@pcie4x8")
    count, name, link_name, box_name = match.groups()
    device = _device(name)
    ranks = int(count or 1)
    if not 1 <= ranks <= MAX_RANKS:
        raise ConfigError(f"hardware {text!r}: {ranks} ranks; from 1 to {MAX_RANKS} work")
    link = _link(device.link if link_name is None else link_name)
    host_link = link if link_name is not None and link.host_memory else _link(device.host_link)
    return compose(device, ranks, link, host_link, _box(device.box if box_name is None else box_name))


def _key(name: str) -> tuple[str, ...]:
    """What makes a name: its words in any order, without the maker's and the brand's."""
    words = re.findall(r"[a-z]*[0-9]+[a-z]*|[a-z]+", re.sub(r"rtx|pro(?=\d)", r" \g<0> ", name.lower()))
    return tuple(sorted({_SAME.get(word, word) for word in words} - _NOISE))


def _device(name: str) -> Device:
    by_key = {
        _key(known): device for device in devices().values() for known in (device.name, *device.aliases)
    }
    found = by_key.get(_key(name))
    if found is not None:
        return found
    words = set(_key(name))
    family = [device.name for key, device in by_key.items() if words and words <= set(key)]
    near = f"near it: {', '.join(dict.fromkeys(family))}" if family else _near(name, names())
    raise ConfigError(f"GPU {name!r} is not in the catalogue; {near}")


def _link(name: str) -> Link:
    known = {link.name: link for link in links().links}
    found = known.get(re.sub(r"[^a-z0-9]|\.0", "", name.lower()))
    if found is None:
        raise ConfigError(f"link {name!r} is not in the catalogue; {_near(name, known)}")
    return found


def _box(name: str) -> str:
    known = {box.lower(): box for box in fits().boxes}
    found = known.get(name.lower())
    if found is None:
        raise ConfigError(f"no node {name!r} has been measured; {_near(name, known.values())}")
    return found


def _near(name: str, known: Iterable[str]) -> str:
    """The known names like `name`, or all of them."""
    by_lower = {text.lower(): text for text in known}
    near = get_close_matches(name.lower(), by_lower, n=4, cutoff=0.4)
    if near:
        return f"near it: {', '.join(by_lower[text] for text in near)}"
    return f"it has {', '.join(by_lower.values())}"
