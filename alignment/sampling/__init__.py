"""Sampling K responses a prompt: one interface, the built-in torch engine, vLLM as an extra."""

from alignment.sampling.protocol import Sample, Sampler, SamplingParams

__all__ = ["Sample", "Sampler", "SamplingParams"]
