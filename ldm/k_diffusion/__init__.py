"""Diffusion in the terms of Karras et al. (2022): training, samplers and wrappers, under k-diffusion's names.

`x = x_0 + sigma * noise`, and every model is a denoiser `D(x, sigma[B]) -> x_0`.
"""
