"""Exchange with diffusers: names and shapes of weights, config files, whole pipeline folders.

Each part of a model has a module that maps our yaml to diffusers' config.json and back, and the names of its
weights both ways, derived from the architecture: `unet`, `vae`, `text`, `schedule`. `layout` puts the parts
together to the yaml of a whole model, `folder` reads and writes pipelines, `convert` goes from any file to any.
"""
