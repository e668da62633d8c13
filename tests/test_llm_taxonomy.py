"""The catalogue in the words of the survey on language models."""

from __future__ import annotations

import subprocess
import sys

import pytest

from remanence import catalogue, llm_taxonomy
from remanence.core.errors import BadInput
from remanence.core.part import Part
from remanence.core.problem import CausalLM
from remanence.data.language_streams import STAGES
from remanence.train.resolve import check_fits
from tests.lm import facts

PARTS = [part for verb in llm_taxonomy.VERBS for part in catalogue.parts(verb)]


@pytest.mark.parametrize("part", [p for p in PARTS if llm_taxonomy.fits(p)], ids=lambda p: f"{p.verb}/{p.slug}")
def test_every_method_for_texts_has_one_set_of_stages_and_a_technique(part):
    tag = llm_taxonomy.of(part)
    assert tag is not None, f"give {part.slug} or its family {part.family} a line in remanence/llm_taxonomy.py"
    assert tag.stages and tag.techniques
    assert tag.stages == tuple(stage for stage in llm_taxonomy.STAGES if stage in tag.stages)  # each once, in order
    assert set(tag.techniques) <= set(llm_taxonomy.TECHNIQUES) and set(tag.settings) <= set(llm_taxonomy.SETTINGS)
    assert bool(tag.settings) == ("CFT" in tag.stages)


@pytest.mark.parametrize("part", [p for p in PARTS if p.kind == "method"], ids=lambda p: f"{p.verb}/{p.slug}")
def test_what_a_language_model_refuses_has_no_tag_and_nothing_else(part):
    refused = False
    try:
        check_fits([part.load()()], CausalLM())
    except BadInput:
        refused = True
    assert refused == (llm_taxonomy.of(part) is None)


def test_what_the_survey_names_stands_where_it_names_it():
    found = {part.slug: llm_taxonomy.of(part) for part in PARTS}
    assert found["replay"].techniques == ("replay",) and found["ewc"].techniques == ("regularisation/parameters",)
    assert found["feature-distill"].techniques == ("regularisation/function",)
    assert found["lora"].techniques == ("architecture/adapters",)
    assert found["finetune"].stages == tuple(llm_taxonomy.STAGES) == STAGES
    assert found["nmc"] is None and llm_taxonomy.of(catalogue.find("forget", "ssd")) is None


def test_the_tables_are_in_the_survey_s_words():
    for tag in llm_taxonomy.TAGS.values():
        assert set(tag.stages) <= set(llm_taxonomy.STAGES) and set(tag.techniques) <= set(llm_taxonomy.TECHNIQUES)
        assert set(tag.settings) <= set(llm_taxonomy.SETTINGS) and bool(tag.settings) == ("CFT" in tag.stages)
    for techniques in llm_taxonomy.FAMILIES.values():
        assert techniques and set(techniques) <= set(llm_taxonomy.TECHNIQUES)
    assert set(llm_taxonomy.SHIFT_OF.values()) <= set(llm_taxonomy.SHIFTS)


def test_our_streams_say_what_they_shift_in():
    from remanence.data.language_streams import horizontal, vertical

    tables = [facts(12, k, first_id=100 * k) for k in range(3)]
    dated = tables[0].replace(date=list(range(12)))
    assert llm_taxonomy.SHIFT_OF[vertical(*tables, test_share=0.25).name] == "content"
    assert llm_taxonomy.SHIFT_OF[horizontal(dated, 2, "chronological", test_share=0.25).name] == "temporal"
    assert horizontal(dated, 2, test_share=0.25).name not in llm_taxonomy.SHIFT_OF


def test_what_a_method_asks_for():
    def asks(*needs):
        return llm_taxonomy.needs(Part("a", "keep", "method", "replay", "a:A", needs=needs))

    assert asks("labels") == [] and asks("borders") == ["boundaries"]
    assert asks("stores-examples", "old-data", "task-id", "borders") == ["boundaries", "old data", "task id"]
    of_ours = {part.slug: llm_taxonomy.needs(part) for part in PARTS}
    assert of_ours["agem"] == ["boundaries", "old data"] and of_ours["lora"] == []


def test_a_family_that_nobody_has_placed_has_no_tag():
    strange = Part("strange", "keep", "method", "no-such-family", "a:A")
    assert llm_taxonomy.fits(strange) and llm_taxonomy.of(strange) is None


def test_it_is_data_and_imports_no_torch():
    code = "import sys; from remanence import llm_taxonomy; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
