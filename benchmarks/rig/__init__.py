"""Emulated nodes for measurements: ranks behind rate-limited links, each at the pace of a part of a core.

with Rig(ranks=4, link="1gbit") as rig:
    ...  # start the engine with node=rig.node_file
"""

from .errors import RigError
from .rig import Rig
from .settings import Settings, make_settings, parse_link

__all__ = ["Rig", "RigError", "Settings", "make_settings", "parse_link"]
