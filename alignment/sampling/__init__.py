"""Sampling K responses a prompt: one interface and the built-in torch engine."""

from alignment.sampling.protocol import Sample, Sampler, SamplingParams

__all__ = ["Sample", "Sampler", "SamplingParams"]
