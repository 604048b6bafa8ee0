"""Fused Triton kernels of the compressive memory; ``backend.py`` says when they run."""
