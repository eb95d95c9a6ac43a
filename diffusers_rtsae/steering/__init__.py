from .controller import Adapter, Controller, SiteEdit, check_width
from .edits import Edit, as_mask, as_strength, numbers
from .plan import PlanState, SitePlan

__all__ = [
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
