"""Tests of devices, and of the order in which work reaches them."""
