"""Latent diffusion: train, adapt, sample and distil Stable-Diffusion-shaped models."""

__version__ = "0.1.0"
