from .clock import PIPELINES, Clock, TimeGrid, call_arguments, noise_schedule, running_pipeline
from .controller import Controller, check_width
from .edits import Edit, as_mask, as_strength, numbers
from .plan import PlanState, SitePlan
from .sites import DENOISERS, get_denoiser, get_site, list_sites, unwrapped

__all__ = [
    "DENOISERS",
    "PIPELINES",
    "Clock",
    "Controller",
    "Edit",
    "PlanState",
    "SitePlan",
    "TimeGrid",
    "as_mask",
    "as_strength",
    "call_arguments",
    "check_width",
    "get_denoiser",
    "get_site",
    "list_sites",
    "noise_schedule",
    "numbers",
    "running_pipeline",
    "unwrapped",
]
