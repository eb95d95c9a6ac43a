"""Read the codes of a whole prompt at a site of a text encoder, to steer by them (Concept Steerers, 2501.19066)."""

from __future__ import annotations

import inspect

import torch

from ..denoiser import Arguments, Call, joined_sites, split_site
from ..pipeline import get_dictionary, resting
from ..steering import PromptCodes, is_in_text
from .record import Recorder


class _Reader(Recorder):
    """Records a text encoder, and the numbers of the tokens it is given."""

    texts: dict[str, torch.Tensor]

    def begin(self, call: Call, arguments: Arguments) -> None:
        super().begin(call, arguments)
        if call.encoder and call.parts[0].role == "cond":
            window = torch.atleast_2d(arguments.sample)
            known = self.texts.get(call.encoder)
            self.texts[call.encoder] = window if known is None else torch.cat([known, window], 1)


@torch.no_grad()
def read_prompt(
    pipeline, prompt: str, adapter_name: str | None = None, site: str | None = None, **call
) -> PromptCodes:
    """
    The codes of a prompt at a site of a text encoder: the activations of all latents on each of its tokens, whatever
    their rank, so without the TopK of the dictionary. `set_rtsae_features` takes them as a feature: they are added
    token by token, the first to the first, also on the tokens that mark start and end and on those that fill up.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary of a text encoder loaded.
        prompt (`str`): that names what is to be more or less.
        adapter_name (`str`, *optional*): of the dictionary.
        site (`str`, *optional*): of the dictionary; needed if it has several in text encoders.
        call: passed to the pipeline's `encode_prompt`.

    Raises:
        `ValueError`: the dictionary has no site in a text encoder, or the pipeline has no `encode_prompt`.

    Example:
        ```py
        >>> painting = read_prompt(pipe, "an oil painting")
        >>> painting.top(5)  # [(index, activation, token), ...]
        >>> pipe.set_rtsae_features({painting: -0.5}, apply_to="contrast")
        ```
    """
    dictionary = get_dictionary(pipeline, adapter_name)
    sites = [one for one in dictionary.sites if is_in_text(one)]
    site = sites[0] if site is None and len(sites) == 1 else site
    if site not in sites:
        raise ValueError(f"Expected `site` to be one of the sites in text encoders, {sites}, got {site!r}.")
    if not isinstance(prompt, str):
        raise ValueError(f"Expected one prompt as a string, got {type(prompt).__name__}.")
    if not hasattr(pipeline, "encode_prompt"):
        raise ValueError(f"{type(pipeline).__name__} has no `encode_prompt`, which reading a prompt needs.")
    sae, component = dictionary.sites[site], split_site(joined_sites(site)[0])[0]
    alone = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "device": pipeline._execution_device}
    options = {}
    for name, parameter in inspect.signature(pipeline.encode_prompt).parameters.items():
        is_needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if name in alone or is_needed:
            options[name] = alone.get(name)
    with resting(pipeline), _Reader(pipeline, [site], activation=sae.config.activation) as reader:
        reader.texts = {}
        pipeline.encode_prompt(**options | {"prompt": prompt} | call)
    tokens = reader.trajectories(site)[0, :, 0].to(sae.decoder.device)
    codes = sae.encode_all(tokens, sae.config.anchors[0])
    vectors, gain = codes @ sae.decoder.float(), sae.gain(tokens)
    return PromptCodes(
        site, prompt, _names(pipeline, component, reader.texts[component][0]), codes.cpu(),
        (vectors if gain is None else vectors * gain).cpu(),
    )  # fmt: skip


def _names(pipeline, component: str, text: torch.Tensor) -> list[str]:
    """The tokens of these numbers, or the numbers if the pipeline has no tokenizer that knows them."""
    tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"), None)
    if text.is_floating_point() or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return [str(i) for i in range(len(text))]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(text.tolist())]
