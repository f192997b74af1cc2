"""The hardware catalogue: devices and links as data, composed into a `HardwareSpec`. No torch.

    hardware("8xL4"), hardware("4xA100-40G-PCIe"), hardware("8xL4@pcie4x8"), names()

`devices.toml` and `links.toml` are written by hand, each figure with its source; `curves.json` is written by
`benchmarks/fit_catalogue.py`. docs/hardware.md has the tables, the assumptions and the fit's errors.
"""

from __future__ import annotations

from seesaw.planning.catalogue.names import hardware, names

__all__ = ["hardware", "names"]
