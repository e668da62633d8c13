"""Image networks of timm and transformers as backbones: their features under a linear `head`, which may start with no rows."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput, nearest
from remanence.models.shape import image_shape
from remanence.models.weights import fill
from remanence.nn.anatomy import head_name, replace_module
from remanence.nn.heads import empty_linear


class Foreign(nn.Module):
    """``head(backbone((resize(x) - mean) / std))``, the backbone being another library's.

    Takes images (B, C, H, W) or the same as rows (B, C H W), in [0, 1] where `mean` and `std` are the library's. Images of one channel
    are repeated for a backbone that wants more. Drawn anew (`reset_parameters`), layers are drawn as torch draws them, and modules
    that only the library knows (positions, scales) as the library draws those of a new network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        build: Callable[[], nn.Module],
        backbone: nn.Module,
        width: int,
        outputs: int,
        inputs: int | Sequence[int],
        channels: int,
        size: tuple[int, int] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.shape, self.size, self.channels = image_shape(inputs, "foreign network"), size, channels
        if self.shape[0] not in (1, channels):
            raise BadInput(f"the network takes images of {channels} channels, or of one, not of {self.shape[0]}")
        for name, value, plain in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = [plain] * channels if value is None else list(value)
            if len(values) != channels or (name == "std" and min(values) <= 0):
                raise BadInput(f"{name}={values} must be {channels} numbers, one for each channel; std above 0")
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1), persistent=False)
        self._build, self.backbone = build, backbone
        for module in backbone.modules():
            if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters"):
                setattr(module, "reset_parameters", _drawn_by_foreign)  # noqa: B010  # modules know no such attribute
        self.head = nn.Linear(width, outputs) if outputs else empty_linear(width, 0)
        if not any(p.is_meta for p in backbone.parameters()):
            self._try(width)

    def features(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, width)."""
        x = x.reshape(len(x), *self.shape).expand(-1, self.channels, -1, -1)
        if self.size is not None and self.size != self.shape[1:]:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        made = self.backbone((x - self.mean) / self.std)
        return made if isinstance(made, Tensor) else made.logits

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw anew what has no `reset_parameters` of its own."""
        fresh = self._build().to(self.head.weight.device)
        for name, module in self.backbone.named_modules():
            if getattr(module, "reset_parameters", None) is _drawn_by_foreign:
                new = dict(fresh.get_submodule(name).named_parameters(recurse=False))
                for own, p in module.named_parameters(recurse=False):
                    p.copy_(new[own])

    def _try(self, width: int) -> None:
        self.backbone.eval()
        try:
            with torch.no_grad():
                found = self.features(torch.zeros(1, *self.shape))
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"the network cannot take images {self.shape} ({error}); choose another size=") from None
        finally:
            self.backbone.train()
        if found.shape != (1, width):
            raise BadInput(f"the network's features have shape {tuple(found.shape)} where a row of {width} is needed")


def _drawn_by_foreign() -> None:
    """`Foreign.reset_parameters` draws this module."""


def from_transformers(
    inputs: int | Sequence[int],
    name: str,
    pretrained: bool,
    outputs: int,
    size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    revision: str,
) -> nn.Module:
    """See `remanence.models.transformers`."""
    library = _library("transformers", "llm")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise BadInput(f"{name} is no folder; give the folder of a saved network, or its name on the Hugging Face hub")
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    loader = library.AutoModelForImageClassification
    try:
        config = library.AutoConfig.from_pretrained(name, id2label={0: "any"}, label2id={"any": 0}, **where)
        read = library.utils.cached_file(
            name, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        notes = json.loads(Path(read).read_text(encoding="utf-8")) if read else {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{name} gives no configuration of a network: {_short(error)}") from None

    def build() -> nn.Module:
        made: nn.Module = loader.from_config(config, attn_implementation="eager", dtype=torch.float32)
        return _headless(made)[0]

    with _quiet(library):
        try:
            if pretrained and torch.get_default_device().type != "meta":
                whole, said = loader.from_pretrained(
                    name,
                    config=config,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    attn_implementation="eager",
                    dtype=torch.float32,
                    **where,
                )
                head = head_name(whole)
                lacking = {
                    key if isinstance(key, str) else key[0]
                    for part in ("missing_keys", "mismatched_keys")
                    for key in said[part]
                }
                other = sorted(key for key in lacking if not key.startswith(f"{head}."))
                if other:
                    raise BadInput(f"the weights of {name} lack {', '.join(other[:3])}, or have them in another shape")
            else:
                whole = loader.from_config(config, attn_implementation="eager", dtype=torch.float32)
        except (OSError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{name} gives no image network: {_short(error)}") from None
    backbone, width = _headless(whole)
    if notes.get("do_normalize", True):
        mean, std = mean or notes.get("image_mean"), std or notes.get("image_std")
    return Foreign(
        build, backbone, width, outputs, inputs, getattr(config, "num_channels", 3),
        _size(size, getattr(config, "image_size", None)), mean, std,
    )  # fmt: skip


def from_timm(
    inputs: int | Sequence[int],
    name: str,
    pretrained: str | None,
    outputs: int,
    size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> nn.Module:
    """See `remanence.models.timm`."""
    library = _library("timm", "timm")
    if not library.is_model(name):
        raise BadInput(f"timm has no network {name!r}{nearest(name, library.list_models())}")

    def build() -> nn.Module:
        made: nn.Module = library.create_model(name, pretrained=False, num_classes=0, **sized)
        for module in made.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010  # a fused kernel has no rule for vmap
        return made

    sized: dict[str, Any] = {}
    backbone = build()
    notes: dict[str, Any] = dict(getattr(backbone, "pretrained_cfg", None) or {})
    wants = notes.get("input_size", (3, 224, 224))[1:] if notes.get("fixed_input_size") else None
    if size and wants is not None and tuple(wants) != (size, size):
        sized["img_size"] = size
        backbone = build()
    if pretrained is not None:
        path = Path(pretrained)
        heads = notes.get("classifier") or ()
        fill(
            backbone,
            path / "model.safetensors" if path.is_dir() else path,
            [heads] if isinstance(heads, str) else heads,
        )
        mean, std = mean or notes.get("mean"), std or notes.get("std")
    width = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return Foreign(build, backbone, int(width), outputs, inputs, 3, _size(size, wants), mean, std)  # type: ignore[arg-type]


def _headless(whole: nn.Module) -> tuple[nn.Module, int]:
    """A classifier of images with an identity for its head, and the width of what the head saw."""
    name = head_name(whole)
    head = whole.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise BadInput(f"{type(whole).__name__} ends in a {type(head).__name__}; its head must be a linear layer")
    return replace_module(whole, name, nn.Identity()), head.in_features


def _size(given: int, wants: Any) -> tuple[int, int] | None:
    """(height, width) to resize to: as given, else as the network wants it, else None."""
    if given < 0:
        raise BadInput(f"size={given} must be a number of pixels, or 0 for what the network wants")
    if given or wants is None:
        return (given, given) if given else None
    return (wants, wants) if isinstance(wants, int) else (int(wants[0]), int(wants[1]))


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch fails by a RuntimeError
        raise BadInput(
            f"{name} cannot be imported ({error}); install it by: pip install 'remanence[{extra}]'"
        ) from None


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """The library says nothing about a head that it draws anew, and shows no bar."""
    level, bar = library.logging.get_verbosity(), library.logging.is_progress_bar_enabled()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        yield
    finally:
        library.logging.set_verbosity(level)
        if bar:
            library.logging.enable_progress_bar()


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
