"""Fixed directions for classes: what a text encoder says to their names, or directions that mean nothing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.rng import generator

#: What encoders have said in this process, by encoder and text.
_said: dict[tuple[str, str], Tensor] = {}


def simplex_rows(labels: Sequence[int], width: int, seed: int) -> Tensor:
    """(n, width): for each label a corner of a regular simplex, which is turned by `seed`; unit rows.

    Labels ``k width`` to ``(k + 1) width - 1`` share a simplex, in which every two rows have the cosine ``-1 / (width - 1)``; each k has
    a turn of its own, so that rows of different simplices are as good as random to each other. A row depends on its label alone.

    Raises:
        BadInput: the width is below 2.
    """
    if width < 2:
        raise BadInput(f"different classes need different directions, and there are none in a width of {width}")
    corners = F.normalize(torch.eye(width, dtype=torch.float64) - 1 / width, dim=1)
    turns: dict[int, Tensor] = {}
    for block in {label // width for label in labels}:
        drawn = torch.randn(width, width, generator=generator(seed, "simplex", block), dtype=torch.float64)
        turns[block] = torch.linalg.qr(drawn)[0]
    rows = [corners[label % width] @ turns[label // width] for label in labels]
    return torch.stack(rows).to(torch.float32) if rows else torch.empty(0, width)


def text_vectors(encoder: str, texts: Sequence[str]) -> Tensor:
    """What a text encoder of `transformers` says to each text (n, D), computed once for each in a process, each alone.

    encoder: a folder, or a name on the hub. Of CLIP it is the projected text embedding (of a text tower without a projection, the
    pooled one); of any other model of text the mean of its last hidden states over the text's tokens.

    Raises:
        BadInput: transformers is not installed; there is no such encoder; its files lack weights.
    """
    lacking = [text for text in dict.fromkeys(texts) if (encoder, text) not in _said]
    if lacking:
        tokenizer, model = _loaded(encoder)
        with torch.no_grad():
            for text in lacking:
                out = model(tokenizer(text, return_tensors="pt", truncation=True)["input_ids"])
                found = getattr(out, "text_embeds", None)
                if found is None:
                    found = out.pooler_output if model.config.model_type == "clip_text_model" else out[0].mean(1)
                _said[encoder, text] = found[0].clone()
    return torch.stack([_said[encoder, text] for text in texts])


def _loaded(encoder: str) -> tuple[Any, Any]:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise BadInput("text encoders need transformers; install it by: pip install 'remanence[llm]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(encoder)
        clip = config.model_type in ("clip", "clip_text_model")
        if hasattr(config, "vision_config") and not clip:
            raise ValueError("it reads pictures, too, and only of CLIP the text tower can be taken out")
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
        projected = clip and "CLIPTextModel" not in (config.architectures or ())
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.AutoModel
        with torch.random.fork_rng(devices=[]):
            model, info = kind.from_pretrained(encoder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(
            f"{encoder!r} is no text encoder that transformers can load: {str(error).splitlines()[0]}"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise BadInput(f"the files of {encoder!r} lack weights that its text encoder needs, such as {missing[0]!r}")
    model = model.get_encoder() if config.is_encoder_decoder else model
    return tokenizer, model.eval().requires_grad_(False)
