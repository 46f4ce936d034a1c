"""What encoder–decoders cannot do is refused before anything is loaded, in one line that names the key."""

import pytest

from dpost_lite.errors import RecipeError
from dpost_lite.models.family import DECODER_ONLY, ENCODER_DECODER
from dpost_lite.recipe_files import load_recipe


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("solutions=code", "solutions=code: T5's vocabulary has no line feed"),
        ("model.prompt=chat", r"model\.prompt=chat: T5 reads the bare question; leave it at auto"),
        ("model.prompt=plain", r"model\.prompt=plain: T5 reads the bare question"),
        ("method=scdpo", "--method scdpo: step-controlled pairs are cut between lines"),
        ("method=dpo-equal", "--method dpo-equal: step-controlled"),
        ("pairs.stepwise=0.5", r"pairs\.stepwise: step-controlled"),
    ],
)
def test_what_takes_lines_is_refused(override, says):
    overrides = [override, *(["calculator.enabled=false"] if "code" in override else [])]
    recipe = load_recipe(None, overrides)
    with pytest.raises(RecipeError, match=says) as refused:
        ENCODER_DECODER.check(recipe)
    assert "\n" not in str(refused.value)
    DECODER_ONLY.check(recipe)


@pytest.mark.parametrize("name", ["flan-t5-base", "flan-t5-large", "flan-t5-base-qlora", "rehearsal-t5"])
def test_the_recipes_for_t5_are_not(name):
    ENCODER_DECODER.check(load_recipe(name))


def test_the_rows_that_are_tried_first_are_those_with_the_most_logits():
    """A T5's memory grows with its answers; the question is encoded without any."""
    long_question, long_answer = (400, 60), (120, 320)
    assert DECODER_ONLY.memory_length(*long_question) > DECODER_ONLY.memory_length(*long_answer)
    assert ENCODER_DECODER.memory_length(*long_question) < ENCODER_DECODER.memory_length(*long_answer)
