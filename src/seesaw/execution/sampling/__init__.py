"""Choosing tokens from logits, on the rank that holds the whole vocabulary of a replica."""

from seesaw.execution.sampling.logprobs import Logprobs
from seesaw.execution.sampling.sampler import Sampler, SampleResult

__all__ = ["Logprobs", "SampleResult", "Sampler"]
