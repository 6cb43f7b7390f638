from __future__ import annotations

import pytest

from hobbit.models.names import Name, choose, model_files, parse_name, quant_of

FILES = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-IQ4_K.gguf",
    "m-Q8_0-00001-of-00002.gguf",
    "m-Q8_0-00002-of-00002.gguf",
    "m-Q6_K-00001-of-00002.gguf",
    "BF16/m-BF16.gguf",
    "UD-Q2_K_XL/m-UD-Q2_K_XL.gguf",
    "mmproj-m-Q4_K_M.gguf",
    "m.imatrix.gguf",
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("user/repo", Name("user/repo")),
        ("user/repo:Q4_K_M", Name("user/repo", "Q4_K_M")),
        ("user/repo@q4_k_m", Name("user/repo", "q4_k_m")),
        ("user/repo:m.gguf", Name("user/repo", "m.gguf")),
        ("hf.co/user/repo:Q8_0", Name("user/repo", "Q8_0")),
        ("huggingface.co/user/repo", Name("user/repo")),
        ("https://huggingface.co/user/repo/", Name("user/repo")),
        ("https://huggingface.co/user/repo/tree/main", Name("user/repo")),
        ("https://hf.co/user/repo/blob/main/Q/m.gguf", Name("user/repo", "Q/m.gguf")),
        ("qwen3-30b-a3b:Q8_0", Name("qwen3-30b-a3b", "Q8_0")),
        ("qwen1.5-moe-a2.7b", Name("qwen1.5-moe-a2.7b")),
    ],
)
def test_parse_name(text: str, name: Name) -> None:
    assert parse_name(text) == name


def test_repositories() -> None:
    assert parse_name("user/repo:Q4_K_M").is_repository
    for other in ("repo", "a/b/c", "/a/b", "a b/c", ""):
        assert not parse_name(other).is_repository


@pytest.mark.parametrize(
    ("file", "quant"),
    [
        ("m-Q4_K_M.gguf", "Q4_K_M"),
        ("m.q4_k_m.gguf", "Q4_K_M"),
        ("olmoe-1b-7b-0924-instruct-q8_0.gguf", "Q8_0"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("gpt-oss-120b-mxfp4-00001-of-00003.gguf", "MXFP4"),
        ("m-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("m-IQ2_XXS.gguf", "IQ2_XXS"),
        ("m-TQ1_0.gguf", "TQ1_0"),
        ("m-BF16.gguf", "BF16"),
        ("Qwen3-30B-A3B.gguf", ""),
        ("model.gguf", ""),
    ],
)
def test_quant_of(file: str, quant: str) -> None:
    assert quant_of(file) == quant


def test_choose() -> None:
    assert choose(FILES) == ["m-Q4_K_M.gguf"]
    assert choose(FILES, "q4_k_s") == ["m-Q4_K_S.gguf"]
    assert choose(FILES, "BF16") == ["BF16/m-BF16.gguf"]
    assert choose(FILES, "Q8_0") == FILES[4:6]
    assert choose(FILES, default="Q8_0") == FILES[4:6]
    assert choose(FILES, "ud-q2_k_xl") == choose(FILES, "Q2_K_XL") == [FILES[8]]
    assert choose(FILES, "m-BF16.gguf") == choose(FILES, "BF16/m-BF16.gguf") == [FILES[7]]
    assert choose(FILES, "Q2_K") == choose(FILES, "no.gguf") == []
    assert choose(["only.gguf"]) == ["only.gguf"]
    assert choose([]) == []


def test_a_model_that_lacks_a_part_is_none() -> None:
    assert choose(FILES, "Q6_K") == []
    assert [model[0] for model in model_files(FILES)] == sorted(
        [FILES[1], FILES[2], FILES[3], FILES[4], FILES[7], FILES[8]]
    )
