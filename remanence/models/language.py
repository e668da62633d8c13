"""Causal language models: a small Llama, and any of the library transformers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.models.small import seeded


def llama(
    vocab: int,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    ffn: int = 0,
    context: int = 512,
    tie: bool = True,
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """A small transformer of the Llama architecture (Touvron et al. 2023, arXiv 2302.13971), with newly drawn weights: transformers'
    ``LlamaForCausalLM``. Needs ``pip install remanence[llm]``.

    Args:
        vocab: number of tokens.
        hidden: width; a multiple of twice `heads`.
        layers: transformer blocks.
        heads: attention heads.
        ffn: width of the feed-forward layers; 0: 8/3 of `hidden`, rounded up to a multiple of 16.
        context: most tokens of a text.
        tie: whether input and output embeddings are one matrix.
        seed: of the weights.
        weights: a file of weights to begin with.
    """
    if hidden % (2 * heads):
        raise BadInput(f"llama: hidden={hidden} must be a multiple of twice heads={heads}")
    library: Any = transformers()
    config = library.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn or -(-8 * hidden // 48) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return seeded(seed, lambda: library.LlamaForCausalLM(config), weights)


def causal_lm(
    name: str, pretrained: bool = True, revision: str = "main", seed: int = 0, weights: str | None = None
) -> nn.Module:
    """A causal language model of the library transformers. Needs ``pip install remanence[llm]``. Code of the hub is never run, and
    weights are read from ``.safetensors`` files only.

    Args:
        name: a folder with ``config.json`` (and ``model.safetensors``), or a name on the Hugging Face hub.
        pretrained: with its weights; else only its architecture, drawn by `seed`.
        revision: of the hub: a branch, a tag or a commit.
        weights: a file of weights to begin with.
    """
    library: Any = transformers()
    check_folder(name)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    loader = library.AutoModelForCausalLM

    def build() -> nn.Module:
        try:
            if pretrained and torch.get_default_device().type != "meta":
                made: nn.Module = loader.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **where)
            else:
                config = library.AutoConfig.from_pretrained(name, **where)
                made = loader.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{name} gives no causal language model: {str(error).strip().splitlines()[0][:300]}"
            ) from None
        return made

    return seeded(seed, build, weights)


def check_folder(name: str) -> None:
    """Refuse a path that is no folder; another name is one of the hub."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise BadInput(f"{name} is no folder; give the folder of a saved model, or its name on the Hugging Face hub")


def transformers() -> Any:
    """The library transformers.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except (ImportError, RuntimeError) as error:
        raise BadInput(
            f"transformers cannot be imported ({error}); install it by: pip install 'remanence[llm]'"
        ) from None
