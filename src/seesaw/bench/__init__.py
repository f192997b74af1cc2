"""Contestants on workloads, in alternating runs, each explained by its floor."""
