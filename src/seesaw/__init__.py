"""Seesaw: offline, batch LLM inference that re-shards the model between prefill and decode."""
