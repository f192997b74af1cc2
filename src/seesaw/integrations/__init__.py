"""Seesaw as a part of other programs. Nothing here is imported unless it is asked for by name."""
