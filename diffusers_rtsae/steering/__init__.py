from .controller import Adapter, Controller, SiteEdit, check_width
from .edits import Edit, as_mask, as_strength, numbers
from .operations import OPERATIONS
from .plan import PlanState, SitePlan

__all__ = [
    "OPERATIONS",
    "Adapter",
    "Controller",
    "Edit",
    "PlanState",
    "SiteEdit",
    "SitePlan",
    "as_mask",
    "as_strength",
    "check_width",
    "numbers",
]
