import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.identity import check_key, digest_of, generator, sample_key, uid_of
from schemas.vocabulary import STREAMS


def test_every_stream_name_makes_a_valid_key():
    for stream in STREAMS:
        assert check_key(sample_key(uid_of(b"x"), stream, "super_resolution", 99))


@pytest.mark.parametrize("bad", ["a.b", "A", "-a", "a b", "ä", "a" * 65])
def test_keys_that_readers_mangle_are_refused(bad):
    with pytest.raises(ValueError, match="does not match"):
        check_key(bad)


@given(st.integers(0, 2**40), st.text(max_size=20), st.text(max_size=20))
def test_generators_depend_on_each_part_alone(seed, key, builder):
    def draw(*parts):
        return generator(*parts).integers(0, 2**62)

    assert draw(seed, key, builder) == draw(seed, key, builder)
    others = {draw(seed + 1, key, builder), draw(seed, key + "x", builder), draw(seed, key, builder + "x")}
    assert draw(seed, key, builder) not in others


def test_generator_is_numpys():
    assert isinstance(generator(0, "a", "b"), np.random.Generator)


def test_digest_ignores_key_order_only():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})
