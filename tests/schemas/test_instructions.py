import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.instructions import check_instruction, lint_instruction, placeholder


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("A cat on a mat", 0),
        ("<img><|image_1|></img> The umbrella should be red.", 1),
        ("<img><|image_1|></img> wears <img><|image_2|></img>.", 2),
        ("Again <img><|image_1|></img> and <img><|image_1|></img>", 1),  # an id may repeat
        ("a < b, |x| and 5 > 3", 0),
    ],
)
def test_official_prompts_pass(text, inputs):
    assert lint_instruction(text, inputs) == []


@pytest.mark.parametrize(
    ("text", "inputs", "problem"),
    [
        ("<img><|image_2|></img> x", 1, "not contiguous"),
        ("<img><|image_1|></img> x", 2, "1 distinct placeholder"),
        ("no placeholder", 1, "0 distinct"),
        ("<img><|image_1|><img> slash missing, as in public data", 0, "malformed"),
        (r"<img><|image_1|><\/img> escaped slash, as in public data", 0, "malformed"),
        ("<img> <|image_1|> </img>", 0, "malformed"),
        ("see <|image_1|>", 0, "malformed"),
        ("<|end|> of prompt", 0, "reserved token"),
        ("<cfg>", 0, "reserved token"),
        ("  ", 0, "empty"),
        ("a\x00b", 0, "NUL"),
    ],
)
def test_malformed_instructions_are_found(text, inputs, problem):
    assert any(problem in found for found in lint_instruction(text, inputs))
    with pytest.raises(ValueError, match="bad instruction"):
        check_instruction(text, inputs)


@given(st.permutations(range(1, 6)), st.integers(1, 5))
def test_any_order_of_all_placeholders_is_valid_and_losing_one_is_not(order, lost):
    text = " ".join(placeholder(i) for i in order)
    assert lint_instruction(text, 5) == []
    assert lint_instruction(text.replace(placeholder(lost), ""), 5)
