"""Tokenizers for small language models, made on the spot, and those of the library transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from remanence.core.errors import BadInput
from remanence.data.people import general_text
from remanence.models import language

END = "<|end|>"


def byte_tokens() -> Any:
    """One token for each byte, and one for the end: 257 tokens; it was trained on nothing, so it remembers nothing."""
    return _made([], 257)


def bpe(vocab: int = 1024, texts: str | None = None, seed: int = 0) -> Any:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over bytes, so that every text can be written.

    A tokenizer remembers what it was trained on: a name that is one token was frequent there. By default it is therefore trained on
    made-up texts that have nobody in them whom `remanence.data.people` gives to a life.

    Args:
        vocab: how many tokens at most, 257 or more.
        texts: a file, or a folder of ``.txt`` files, to train on; None: the made-up texts.
        seed: of the made-up texts.

    Raises:
        BadInput: no text, or too few tokens.
    """
    if vocab < 257:
        raise BadInput(f"bpe: vocab={vocab} must be at least 257: one token for each byte, and one for the end")
    if texts is not None:
        return _made(_lines(Path(texts)), vocab)
    return _made(list(map(str, general_text(3000, seed).columns["text"])), vocab)


def pretrained(name: str, revision: str = "main") -> Any:
    """The tokenizer of a model of the library transformers: a folder, or a name on the Hugging Face hub."""
    library = language.transformers()
    language.check_folder(name)
    try:
        return library.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{name} gives no tokenizer: {str(error).strip().splitlines()[0][:300]}") from None


def _lines(path: Path) -> list[str]:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        found = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text ({error})") from None
    if not found:
        raise BadInput(f"{path} has no text to train a tokenizer on")
    return found


def _made(texts: Iterable[str], vocab: int) -> Any:
    library = language.transformers()
    import tokenizers as fast

    made = fast.Tokenizer(fast.models.BPE())
    made.pre_tokenizer = fast.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = fast.decoders.ByteLevel()
    trainer = fast.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=fast.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return library.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


#: Tokenizers that a plan can name.
TOKENIZERS: dict[str, Callable[..., Any]] = {"bytes": byte_tokens, "bpe": bpe, "pretrained": pretrained}
