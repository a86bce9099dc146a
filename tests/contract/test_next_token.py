"""`portatrain check` finds a model that sees the token which it is to predict, and nothing in one that does not."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.recipe import Recipe, load_recipe
from portatrain.testing.recipe_check.future import future, is_next_tokens
from portatrain.testing.recipe_check.run import check_recipe
from portatrain.testing.recipe_check.small import Small, batches_of, candidates
from portatrain.testing.recipe_check.subject import Subject, subject_of
from tests.support import next_token
from tests.support.shipped import each


def small(recipe: Recipe) -> Subject:
    recipe, sizes = next(candidates(recipe))
    definition = recipe.describe()
    batches = batches_of(recipe, definition)
    return subject_of(Small(recipe=recipe, definition=definition, batches=batches, sizes=sizes))


@pytest.mark.parametrize("kind", next_token.SEE)
def test_a_model_that_sees_the_next_token_is_found(kind: str) -> None:
    (finding,) = future(small(next_token.recipe(kind)))
    assert finding.numbers and "causal=True" in finding.do and "of the next token" in finding.what, finding


@pytest.mark.parametrize("kind", next_token.DO_NOT_SEE)
def test_nothing_is_found_in_one_that_does_not(kind: str) -> None:
    assert future(small(next_token.recipe(kind))) == []


def test_the_whole_check_says_it() -> None:
    (finding,) = check_recipe(next_token.recipe("attention to all positions"), backends=()).findings
    assert finding.check == "the next token unseen"
    assert check_recipe(next_token.recipe("two tokens ahead"), backends=()).findings == []


@pytest.mark.parametrize("name", each())
def test_nothing_is_found_in_shipped_recipes(name: str) -> None:
    assert future(small(load_recipe(name))) == []


def test_what_a_batch_of_next_tokens_is() -> None:
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    good = {"tokens": tokens, "targets": tokens + 1}
    assert is_next_tokens(good)
    assert is_next_tokens({**good, "mask": np.ones((2, 6), np.float32)})
    assert is_next_tokens({**good, "mask": np.ones(2, np.float32)})  # of whole samples
    elsewhere = np.where(np.arange(6) == 2, 0, tokens + 1).astype(np.int32)
    assert not is_next_tokens({"tokens": tokens, "targets": elsewhere})
    assert is_next_tokens(
        {"tokens": tokens, "targets": elsewhere, "mask": np.float32(np.arange(6) != 2)[None].repeat(2, 0)}
    )
    for other in (
        {"tokens": tokens},
        {"image": tokens, "targets": tokens},
        {"tokens": tokens, "targets": tokens},
        {"tokens": tokens, "targets": tokens[:, 1:]},
        {"tokens": tokens.astype(np.float32), "targets": tokens + 1},
        {**good, "mask": np.zeros((2, 6), np.float32)},
    ):
        assert not is_next_tokens(other)
