from .dynamics import LinearDynamics
from .rtsae import RTSAE, RTSAEOutput
from .sparsity import batch_topk, jump_relu

__all__ = ["RTSAE", "LinearDynamics", "RTSAEOutput", "batch_topk", "jump_relu"]
