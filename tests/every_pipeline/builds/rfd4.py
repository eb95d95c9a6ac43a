"""RFD4-Proteina, which designs proteins and has no text."""

from __future__ import annotations

import torch
from diffusers import RFD4ProteinaAutoencoder, RFD4ProteinaScheduler, RFD4ProteinaTransformer

from . import Ask, Built, builds, parts

TOKENS, RESIDUES = 8, 6


@builds("RFD4ProteinaPipeline")
def rfd4(kind: type) -> Built:
    torch.manual_seed(0)
    sizes = {"token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 16, "latent_dim": 4}
    transformer = RFD4ProteinaTransformer(
        nlayers=2, token_type_emb_dim=8, cath_emb_dim=4, t_emb_dim=16, seq_sep_dim=4, xt_pair_dist_dim=6,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "cath_code", "recycle_remaining"),
        feats_pair_repr=("xt_bb_ca_pair_dists", "bond_mask", "molecule_idx_pair"), update_pair_repr_every_n=1,
        tri_mult_c=16, num_sequence_classes=RESIDUES, num_token_types=2, **sizes,
    ).eval()  # fmt: skip
    vae = RFD4ProteinaAutoencoder(
        atom37_mask=[[True] * 37] * RESIDUES, allowed_residue_types=[[True] * RESIDUES] * 2,
        n_residue_types=RESIDUES, num_token_types=2, nlayers=1, token_type_emb_dim=8, **sizes,
    ).eval()  # fmt: skip
    pipe = kind(
        parts.randomise(transformer), parts.randomise(vae),
        RFD4ProteinaScheduler(schedule_mode="log", noise_mode="1/t", tsr_k=1.0, tsr_sigma=1.0, tail_steps=0),
        RFD4ProteinaScheduler(schedule_mode="power", noise_mode="tan", tsr_k=1.0, tsr_sigma=1.0, tail_steps=0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        pipe.register_to_config(recycle_depths=[2] * (ask.steps - 1) + [1])  # its number of steps
        yes, no = (torch.full((count, TOKENS), value) for value in (True, False))
        numbers = torch.zeros(count, TOKENS, dtype=torch.int64)
        return {
            "padding_mask": yes, "is_in_context_conditioning": no, "supports_local_latent": yes,
            "token_type": numbers, "atom37_mask": torch.ones(count, TOKENS, 37, dtype=torch.bool),
            "conditioning_features": {"condition_sequence_1_residue": numbers, "molecule_iid": numbers},
            "num_designs_per_prompt": ask.images, "output_type": "pt",
            "generator": [parts.generator(i) for i in range(count * ask.images)],
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, guided=False, text=False, negative=False)
