from .dynamics import LinearDynamics
from .rtsae import RTSAE, FeatureTimes, RTSAEOutput
from .sparsity import batch_topk, jump_relu

__all__ = ["RTSAE", "FeatureTimes", "LinearDynamics", "RTSAEOutput", "batch_topk", "jump_relu"]
