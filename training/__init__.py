"""The trainer. `fit` trains a dictionary on trajectories of any process; all else is started by commands."""

from diffusers_rtsae.imports import on_demand

__getattr__ = on_demand(__name__, ("run",), ["fit"])
