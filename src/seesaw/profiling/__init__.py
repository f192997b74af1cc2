"""Measures what a node's ranks, links and host can do, as the planner needs it. `seesaw profile` runs it."""
