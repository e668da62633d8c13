"""Heads of fixed rows, directions without meaning, and what text encoders say."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.measure.relearn import with_columns
from remanence.models import mlp
from remanence.nn.anatomy import features, head, head_name, reinitialised
from remanence.nn.heads import FixedRows, grow_head, head_inputs, target_head, with_target_head
from remanence.nn.semantic import simplex_rows, text_vectors
from remanence.train.roles import head_rows

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def aimed(width=4, rows=3, scale=7.0, normalise=True):
    return grow_head(with_target_head(mlp(6, [8]), width, scale, normalise, 1), rows, 2)


@pytest.mark.parametrize("width", [4, 8])
def test_a_target_head_answers_by_scaled_cosines(width):
    model = aimed(width)
    z = model.body(X)
    z = z if width == 8 else z @ model.head.project.weight.T
    rows = model.head.rows.weight
    torch.testing.assert_close(model(X), 7.0 * F.cosine_similarity(z[:, None], rows[None], dim=2))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(aimed(width, normalise=False)(X), 7.0 * z @ rows.T)
    assert (model.head.project is None) == (width == 8)


def test_what_looks_for_a_head_finds_rows_that_are_no_parameters():
    model = aimed()
    assert head_name(model) == "head.rows" and head_rows(model) == 3 and head_inputs(model) == 4
    assert not list(head(model).parameters()) and "head.rows.weight" in model.state_dict()
    z = features(model, X)
    torch.testing.assert_close(z.norm(dim=1), torch.full((5,), 7.0))
    torch.testing.assert_close(z @ model.head.rows.weight.T, model(X))
    assert target_head(model) is model.head and target_head(mlp(6, [8], 2)) is None
    bare = with_target_head(nn.Linear(6, 9), 4, 7.0, True, 1)  # a network that is nothing but its head
    assert target_head(bare) is bare and grow_head(bare, 2, 0)(X).shape == (5, 2)
    plain = with_target_head(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), 4, 7.0, True, 1)
    assert head_name(plain) == "2.rows" and target_head(plain) is plain[2]


def test_new_rows_leave_old_answers_their_bits():
    model = aimed()
    rows, before = model.head.rows.weight.clone(), model(X)
    grow_head(model.eval(), 2, 9)
    assert torch.equal(model.head.rows.weight[:3], rows) and not model.head.rows.training
    torch.testing.assert_close(model(X)[:, :3], before, rtol=1e-6, atol=1e-6)
    made, labels = with_columns(model, [0, 1, 2, 3, 4], [7], 0)
    assert labels == [0, 1, 2, 3, 4, 7] and isinstance(head(made), FixedRows) and head_rows(made) == 6
    torch.testing.assert_close(head(made).weight.norm(dim=1), torch.ones(6))


def test_a_network_that_is_drawn_anew_keeps_its_targets():
    model = aimed()
    fresh = reinitialised(model, 5)
    assert torch.equal(fresh.head.rows.weight, model.head.rows.weight)
    assert not torch.equal(fresh.head.project.weight, model.head.project.weight)


def test_a_head_of_another_kind_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv1d(1, 1, 1)

    with pytest.raises(BadInput, match="Conv1d"):
        with_target_head(Odd(), 4, 1.0, True, 0)


def test_corners_of_a_simplex():
    rows = simplex_rows(range(8), 8, 3)
    wanted = torch.full((8, 8), -1 / 7).fill_diagonal_(1.0)
    torch.testing.assert_close(rows @ rows.T, wanted, rtol=0, atol=1e-6)
    assert torch.equal(simplex_rows([5, 2, 11], 8, 3), torch.stack([rows[5], rows[2], simplex_rows([11], 8, 3)[0]]))
    assert not torch.equal(simplex_rows([5], 8, 4), rows[5:6]) and simplex_rows([], 8, 3).shape == (0, 8)
    wide = simplex_rows([*range(100, 300), -1], 64, 0)  # four simplices and one label below zero
    inside = (wide @ wide.T).fill_diagonal_(0)
    assert float(inside.abs().max()) < 0.65 and float(inside.square().mean()) < 2 / 64
    with pytest.raises(BadInput, match="width of 1"):
        simplex_rows([0], 1, 0)


def test_without_transformers_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match=r"remanence\[llm\]"):
        text_vectors("nobody/nothing", ["a photo of a cat"])


WORDS = ["[UNK]", "[END]", "[CLS]", "a", "photo", "of", "cat", "dog", "house"]


def saved(folder, kind):
    """A tiny text encoder with random weights, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [END]", special_tokens=[("[CLS]", 2), ("[END]", 1)])  # fmt: skip
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", model_max_length=16).save_pretrained(folder)  # fmt: skip
    shape = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            model = transformers.BertModel(transformers.BertConfig(**shape, max_position_embeddings=16))
        elif kind == "t5":
            model = transformers.T5Model(transformers.T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))  # fmt: skip
        else:
            config = transformers.CLIPTextConfig(**shape, projection_dim=10, max_position_embeddings=16, bos_token_id=2, eos_token_id=1, pad_token_id=0)  # fmt: skip
            model = getattr(transformers, kind)(config)
    model.eval().save_pretrained(folder)
    return str(folder), model


TEXTS = ["a photo of a cat", "a dog", "house of a dog"]


@pytest.mark.parametrize(
    ("kind", "width"), [("bert", 16), ("t5", 16), ("CLIPTextModelWithProjection", 10), ("CLIPTextModel", 16)]
)
def test_what_an_encoder_says(tmp_path, kind, width):
    folder, model = saved(tmp_path, kind)
    state = torch.random.get_rng_state()
    said = text_vectors(folder, TEXTS)
    assert said.shape == (3, width) and not said.requires_grad and torch.equal(state, torch.random.get_rng_state())
    for text, vector in zip(TEXTS, said, strict=True):
        ids = torch.tensor([[2, *[WORDS.index(word) for word in text.split()], 1]])
        with torch.no_grad():
            out = (model.get_encoder() if kind == "t5" else model)(input_ids=ids)
        wanted = {
            "bert": lambda out: out.last_hidden_state[0].mean(0),
            "t5": lambda out: out.last_hidden_state[0].mean(0),
            "CLIPTextModelWithProjection": lambda out: out.text_embeds[0],
            "CLIPTextModel": lambda out: out.last_hidden_state[0, -1],  # the end of the text
        }[kind](out)
        torch.testing.assert_close(vector, wanted, rtol=1e-5, atol=1e-6)


def test_each_text_is_computed_once_and_alone(tmp_path, monkeypatch):
    folder, _ = saved(tmp_path / "one", "bert")
    one = text_vectors(folder, [TEXTS[1]])
    other, _ = saved(tmp_path / "two", "bert")
    assert torch.equal(text_vectors(other, TEXTS)[1], one[0])
    monkeypatch.setitem(sys.modules, "transformers", None)  # what is known needs no encoder
    assert torch.equal(text_vectors(other, TEXTS[1:2]), one)


def test_the_text_tower_of_a_whole_clip(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, tower = saved(tmp_path, "CLIPTextModelWithProjection")
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.CLIPConfig(text_config=tower.config.to_dict(), vision_config=vision, projection_dim=10)
    whole = transformers.CLIPModel(config).eval()
    whole.text_model.load_state_dict(tower.text_model.state_dict())
    whole.text_projection.load_state_dict(tower.text_projection.state_dict())
    wanted = text_vectors(folder, TEXTS)
    both, _ = saved(tmp_path / "both", "CLIPTextModel")
    whole.save_pretrained(both)
    torch.testing.assert_close(text_vectors(both, TEXTS), wanted)


def test_encoders_that_cannot_be_used(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no text encoder"):
        text_vectors(str(tmp_path / "empty"), TEXTS)
    transformers.SiglipConfig().save_pretrained(tmp_path / "eyes")
    with pytest.raises(BadInput, match="pictures"):
        text_vectors(str(tmp_path / "eyes"), TEXTS)
    folder, _ = saved(tmp_path / "cut", "bert")
    model = transformers.BertModel.from_pretrained(folder)
    left = {name: value for name, value in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(folder, state_dict=left)
    with pytest.raises(BadInput, match="lack weights"):
        text_vectors(folder, TEXTS)
