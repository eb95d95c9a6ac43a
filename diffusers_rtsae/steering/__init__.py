from .clock import Clock, TimeGrid
from .controller import Controller, check_width
from .edits import Edit, as_mask
from .plan import PrefixEncoder, SitePlan
from .sites import get_site, list_sites

__all__ = [
    "Clock",
    "Controller",
    "Edit",
    "PrefixEncoder",
    "SitePlan",
    "TimeGrid",
    "as_mask",
    "check_width",
    "get_site",
    "list_sites",
]
