"""Other people's libraries. Each module imports its library when it is imported itself, never before.

`attention`: dynamic chunking for diffusers' transformers. `transformer`, `pipeline`: DC-DiT as a diffusers model and
pipeline. `patches`: patch sizes by step for FLUX and Wan.
"""
