"""Dictionaries by sparsify: `python sparsify.py FOLDER`."""

import sys
from pathlib import Path

sys.path.append(sys.path.pop(0))  # this file has the package's name

import torch  # noqa: E402
from common import SITE, D, K, M, activations, randomise, write  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

CASES = {"topk": {}, "groupmax": {"activation": "groupmax"}, "expansion factor": {"expansion_factor": 4}}
CASES |= {"transcoder": {"transcode": True}, "skip transcoder": {"transcode": True, "skip_connection": True}}
CASES |= {"skip transcoder, groupmax": CASES["skip transcoder"] | CASES["groupmax"]}
CASES |= {"skip": {"skip_connection": True}}


@torch.no_grad()
def main(out: Path) -> None:
    for name, options in CASES.items():
        torch.manual_seed(0)
        size = {} if "expansion_factor" in options else {"num_latents": M}
        sae = SparseCoder(D, SparseCoderConfig(k=K, **size, **options))
        randomise(sae)
        sae.save_to_disk(out / name / "files" / SITE)
        sae, x = SparseCoder.load_from_disk(out / name / "files" / SITE), activations()
        encoded = sae.encode(x)
        z = torch.zeros(len(x), M).scatter(1, encoded.top_indices, encoded.top_acts)

        def decode(latents, sae=sae):
            return sae.decode(latents, torch.arange(M).expand(len(latents), M))

        write(out / name, "eai-sparsify", name, x, z, sae(x).sae_out, decode)


main(Path(sys.argv[1]))
