"""`python -m diffusers_rtsae.cli` is `diffusers-rtsae`."""

from . import run

run()
