from .clock import Clock, TimeGrid, call_arguments
from .controller import Controller, check_width
from .edits import Edit, as_mask
from .plan import PlanState, PrefixEncoder, SitePlan, Trajectory
from .sites import get_site, list_sites

__all__ = [
    "Clock",
    "Controller",
    "Edit",
    "PlanState",
    "PrefixEncoder",
    "SitePlan",
    "TimeGrid",
    "Trajectory",
    "as_mask",
    "call_arguments",
    "check_width",
    "get_site",
    "list_sites",
]
