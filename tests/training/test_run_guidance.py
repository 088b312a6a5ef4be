"""From a recipe to its guidance: which models take part, and which words they are not to follow."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dream4d_engine.guidance.prompts import NEGATIVE_PROMPT
from dream4d_engine.priors.loading import PriorError, toy_folder
from dream4d_engine.training.config import TEXT_TO_3D, TOY_STATIC
from dream4d_engine.training.guidance import active_terms, choose_negative, load_guidance

CPU = torch.device("cpu")


def test_a_term_without_weight_needs_no_model():
    first, second = TEXT_TO_3D.guidance
    assert active_terms(replace(TEXT_TO_3D, guidance=(first, replace(second, weight=0.0)))) == [first]


@pytest.mark.parametrize(
    ("own", "in_recipe", "asked", "expected"),
    [
        (None, NEGATIVE_PROMPT, "", NEGATIVE_PROMPT),
        ("", NEGATIVE_PROMPT, "", ""),
        ("its own", NEGATIVE_PROMPT, " ", "its own"),
        ("its own", "changed in the recipe", "", "changed in the recipe"),
        ("its own", "changed in the recipe", " asked ", "asked"),
        (None, NEGATIVE_PROMPT, "asked", "asked"),
    ],
)
def test_negative_words_are_those_that_somebody_chose_else_the_models_own(own, in_recipe, asked, expected):
    recipe = replace(TEXT_TO_3D, negative_prompt=in_recipe)
    assert choose_negative(recipe, SimpleNamespace(negative_prompt=own), asked) == expected


def test_loading_tells_of_each_model_and_can_be_ended():
    folders, seen = {"multiview": toy_folder("multiview")}, []
    guidance = load_guidance(TOY_STATIC, folders, "a red cube", CPU, on_prior=lambda prior: seen.append(prior.kind))
    assert seen == ["multiview"] == list(guidance)
    with pytest.raises(PriorError, match="does not know 'blurry'"):
        load_guidance(TOY_STATIC, folders, "a red cube", CPU, negative="blurry")

    def stop(prior):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_guidance(TOY_STATIC, folders, "a golden dragon", CPU, on_prior=stop)
