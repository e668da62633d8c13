"""Backbones of transformers and timm: the library's own features, saved weights, and whole lives on them. Nothing is fetched."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import remanence as rm
from remanence.core.errors import BadInput
from remanence.core.problem import Classification
from remanence.life.run import open_plan, run_plan
from remanence.models import MODELS
from remanence.nn.anatomy import features, head_name, reinitialised
from remanence.nn.fisher import diagonal_fisher
from remanence.nn.heads import grow_head
from tests.forget.helpers import same

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1}),
    "dino": ("Dinov2Config", {**SMALL, "image_size": 12, "patch_size": 4}),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "convnext": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "image_size": 8},
    ),
}


def saved(name: str, folder: Path) -> tuple[Any, str]:
    """A random image classifier of transformers with 7 classes, and the folder that it was saved to."""
    library = pytest.importorskip("transformers")
    kind, knobs = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = library.AutoModelForImageClassification.from_config(getattr(library, kind)(num_labels=7, **knobs))
    model.save_pretrained(folder)
    return model.eval(), str(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_what_the_librarys_own_head_sees(name: str, tmp_path: Path) -> None:
    whole, folder = saved(name, tmp_path / "n")
    torch.manual_seed(3)
    draws = torch.random.get_rng_state()
    model = MODELS["transformers"](64, name=folder, seed=1).eval()
    assert torch.equal(draws, torch.random.get_rng_state()) and head_name(model) == "head"
    x = torch.rand(4, 64)
    images = x.reshape(4, 1, 8, 8).expand(-1, model.channels, -1, -1)
    if name == "dino":
        images = nn.functional.interpolate(images, (12, 12), mode="bilinear", antialias=True)
    z = features(model, x)
    torch.testing.assert_close(whole.get_submodule(head_name(whole))(z), whole(pixel_values=images).logits)
    assert model(x).shape == (4, 0)
    grown = grow_head(copy.deepcopy(model), 3, seed=0)
    torch.testing.assert_close(grown(x), grown.head(z))
    given = {"mean": [0.25] * model.channels, "std": [0.5] * model.channels}
    shifted = MODELS["transformers"](64, name=folder, **given).eval()
    torch.testing.assert_close(features(shifted, x), features(model, (x - 0.25) / 0.5))
    (tmp_path / "n" / "preprocessor_config.json").write_text(
        str({"image_mean": given["mean"], "image_std": given["std"]}).replace("'", '"')
    )
    assert torch.equal(MODELS["transformers"](64, name=folder).eval().features(x), shifted.features(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_drawn_by_seed_and_drawn_anew(name: str, tmp_path: Path) -> None:
    _, folder = saved(name, tmp_path)
    first, again, other = (
        MODELS["transformers"](64, name=folder, pretrained=False, outputs=3, seed=seed) for seed in (1, 1, 2)
    )
    assert same(first, again) and not same(first, other)
    pretrained = MODELS["transformers"](64, name=folder, outputs=3, seed=1)
    with torch.no_grad():
        for p in pretrained.parameters():
            p.add_(1)  # so that whatever is not drawn anew stands out
    fresh = reinitialised(pretrained, 5)
    assert same(fresh, reinitialised(first, 5)) and not same(fresh, reinitialised(first, 6))
    for key, p in fresh.named_parameters():
        assert not torch.equal(p, pretrained.get_parameter(key)), key


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_fisher_is_the_mean_of_squared_gradients(name: str, tmp_path: Path) -> None:
    _, folder = saved(name, tmp_path)
    model = MODELS["transformers"](64, name=folder, outputs=10).eval()
    params = dict(model.named_parameters())
    batch = rm.data.digits().batch(torch.arange(5))
    found = diagonal_fisher(model, Classification(), [batch], params)
    wanted = {key: torch.zeros_like(p) for key, p in params.items()}
    for x, y in zip(batch["x"], batch["y"], strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for key, g in zip(params, grads, strict=True):
            wanted[key] += 0 if g is None else g.square() / 5
    for key in params:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-8, rtol=1e-3)


PLAN = """
model: {transformers: {name: %s}}
stream: {split-classes: {source: digits, tasks: [[0, 1], [2, 3]]}}
train: {epochs: 2, lr: 0.003}
keep: [{replay: {per_class: 20}}, lwf]
events:
  - learn: {task: 0}
  - learn: {task: 1}
  - forget: {classes: [1], by: ssd, verify: none}
"""


def test_a_life_in_a_plan(tmp_path: Path) -> None:
    """Two tasks with replay and LwF, a class forgotten by SSD; resumed, it is the same network without the weights of the folder."""
    _, folder = saved("vit", tmp_path / "n")
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN % folder)
    life = run_plan(plan, tmp_path / "home")
    x = rm.data.digits()["x"][:20]
    assert [event.kind for event in life.events] == ["learn", "learn", "forget"] and life.model(x).shape == (20, 4)
    life.model.eval()
    answers = life.model(x)
    life.close()
    path = tmp_path / "n" / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path, {"format": "pt"})
    again, _, _ = open_plan(plan, tmp_path / "home")
    assert torch.equal(again.model.eval()(x), answers)
    again.close()


def test_what_is_refused(tmp_path: Path) -> None:
    _, folder = saved("vit", tmp_path / "n")
    build = MODELS["transformers"]
    with pytest.raises(BadInput, match="is no folder; give the folder of a saved network"):
        build(64, name=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="gives no configuration"):
        build(64, name=str(tmp_path / "empty"))
    with pytest.raises(BadInput, match=r"takes images of 1 channels, or of one, not of 3"):
        build((3, 8, 8), name=folder)
    with pytest.raises(BadInput, match=r"cannot take images \(1, 8, 8\)"):
        build(64, name=folder, size=12)
    for knobs in ({"mean": [0.5, 0.5]}, {"std": [0.0]}):
        with pytest.raises(BadInput, match="must be 1 numbers"):
            build(64, name=folder, **knobs)
    path = tmp_path / "n" / "model.safetensors"
    weights = load_file(path)
    lost = weights.pop("vit.embeddings.cls_token")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(BadInput, match=r"lack vit.embeddings.cls_token"):
        build(64, name=folder)
    save_file({**weights, "vit.embeddings.cls_token": lost[..., :-1].contiguous()}, path, {"format": "pt"})
    with pytest.raises(BadInput, match=r"lack vit.embeddings.cls_token, or have them in another shape"):
        build(64, name=folder)
    path.rename(tmp_path / "n" / "pytorch_model.bin")
    with pytest.raises(BadInput, match="gives no image network"):
        build(64, name=folder)
    build(64, name=folder, pretrained=False)
    (tmp_path / "n" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="gives no image network"):
        build(64, name=folder, pretrained=False)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (("transformers", "llm"), ("timm", "timm")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(BadInput, match=rf"{name} cannot be imported .*remanence\[{extra}\]"):
            MODELS[name](64, name=str(tmp_path))


class Tiny(nn.Module):
    """A network as timm makes them: rows without a head, what it says of its weights, and a scale that cannot draw itself."""

    def __init__(self, classes: int, img_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, img_size)
        self.scale = nn.Parameter(torch.randn(5))
        self.fc = nn.Linear(5, classes) if classes else nn.Identity()
        self.num_features = 5
        self.pretrained_cfg = {
            **{"input_size": (3, 8, 8), "fixed_input_size": True, "classifier": "fc"},
            **{"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).flatten(1) * self.scale)  # type: ignore[no-any-return]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four names of timm that are used; the library itself needs a torchvision that fits torch."""
    library: Any = types.ModuleType("timm")
    library.is_model = lambda name: name == "tiny"
    library.list_models = lambda: ["tiny"]

    def create_model(name: str, pretrained: bool, num_classes: int, img_size: int = 8) -> nn.Module:
        assert name == "tiny" and not pretrained
        return Tiny(num_classes, img_size)

    library.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", library)


def test_timm(stand_in: None, tmp_path: Path) -> None:
    build = MODELS["timm"]
    first, again, other = (build((3, 8, 8), name="tiny", outputs=2, seed=seed) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)
    fresh = reinitialised(first, 5)
    assert same(fresh, reinitialised(other, 5)) and not torch.equal(fresh.backbone.scale, first.backbone.scale)
    whole = Tiny(7, 8)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    x = torch.rand(4, 3, 8, 8)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = build((3, 8, 8), name="tiny", pretrained=str(path))
        torch.testing.assert_close(whole.fc(model.features(x)), whole((x - mean) / std))
    assert build((1, 16, 16), name="tiny")(torch.rand(4, 256)).shape == (4, 0)
    larger = build((1, 16, 16), name="tiny", size=12)
    assert larger.size == (12, 12) and larger.backbone.conv.kernel_size == (12, 12)
    with torch.device("meta"):
        assert build((1, 28, 28), name="tiny", pretrained=str(tmp_path)).backbone.scale.is_meta
    with pytest.raises(BadInput, match=r"timm has no network 'tiney'; did you mean 'tiny'"):
        build(64, name="tiney")
    save_file({"conv.weight": whole.conv.weight}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"conv.bias is missing there"):
        build(64, name="tiny", pretrained=str(tmp_path))
