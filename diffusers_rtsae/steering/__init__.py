"""Steering: the edits that are asked for, whose edits act on a denoiser call, and what they add to an activation."""

from .controller import Adapter, Controller, SiteEdit, check_width
from .edits import Edit, as_mask, as_strength, numbers
from .fold import Fold, fold_edits, read_by, total
from .operations import OPERATIONS
from .plan import PlanState, SitePlan
from .texts import PromptCodes, check_text_edit, check_text_site, is_in_text

__all__ = [
    "OPERATIONS",
    "Adapter",
    "Controller",
    "Edit",
    "Fold",
    "PlanState",
    "PromptCodes",
    "SiteEdit",
    "SitePlan",
    "as_mask",
    "as_strength",
    "check_text_edit",
    "check_text_site",
    "check_width",
    "fold_edits",
    "is_in_text",
    "numbers",
    "read_by",
    "total",
]
