"""Measures a host's own GPUs: kernels, collectives, and a few short runs of vLLM's own server."""
