"""Which latents of a batch are active, and what is minimised. Each is named in `training/registry.py`."""
