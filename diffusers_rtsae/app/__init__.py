"""The app: search features, move sliders, paint where they act, make new ones, and see before and after."""

from .page import build, launch

__all__ = ["build", "launch"]
