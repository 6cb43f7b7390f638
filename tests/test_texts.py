from __future__ import annotations

import hashlib

import pytest

from hobbit.texts import NAMES, built_in

# Numbers in the documents were measured with these bytes.
SHA256 = {
    "calibration": "6daa7c7bc2a5c586361c27845eeba900405db87b52df9637cbbe58c6c70e6d1d",
    "sample": "33917bf0e4d5735fa4700b4b712765d8d87fd1f243c4c4b058da3e9e84e166bf",
}


@pytest.mark.parametrize("name", NAMES)
def test_built_in_texts(name: str) -> None:
    text = built_in(name)
    assert 25_000 < len(text) < 40_000
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256[name]
    for kind in ("the sea", "United States", "model", "def ", "Assistant:"):
        assert kind in text, kind


def test_nothing_of_the_one_is_in_the_other() -> None:
    words = {name: built_in(name).split() for name in NAMES}
    runs = [{tuple(found[i : i + 12]) for i in range(len(found) - 11)} for found in words.values()]
    assert not runs[0] & runs[1]


def test_no_other_text() -> None:
    with pytest.raises(ValueError, match="no text is called 'other'"):
        built_in("other")
