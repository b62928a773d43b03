"""Sampling K responses a prompt: one interface, the built-in torch engine and vLLM."""

from alignment.sampling.protocol import Sample, Sampler, SamplingParams

__all__ = ["Sample", "Sampler", "SamplingParams"]
