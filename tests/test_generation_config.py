"""generation_config.json as the hub has it, and the mistakes in it."""

from typing import Any

import pytest

from causallm.config import GenerationConfig


def test_generation_config_in_the_spellings_of_the_hub() -> None:
    llama3 = {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9}
    config = GenerationConfig.from_json({**llama3, "transformers_version": "4.42.3", "max_length": 4096})
    assert config == GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=(1, 2), bos_token_id=128000
    )
    assert GenerationConfig.from_json({"eos_token_id": 7, "top_k": None}).eos_token_id == (7,)
    assert GenerationConfig.from_json({"stop_strings": "END"}).stop == ("END",)
    assert GenerationConfig.from_json({"stop_strings": ["a", "b"]}).stop == ("a", "b")
    assert GenerationConfig.from_json({"bad_words_ids": [[3], [4, 5]]}).bad_words_ids == ((3,), (4, 5))
    lookup = GenerationConfig.from_json({"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": None})
    assert (lookup.prompt_lookup_num_tokens, lookup.max_matching_ngram_size) == (10, 2)
    assert GenerationConfig.from_json({"max_matching_ngram_size": 3}).max_matching_ngram_size == 3
    assert GenerationConfig.from_json({"sequence_bias": [[[3], -1], [[4], 2.5]]}).logit_bias == ((3, -1.0), (4, 2.5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
        ({"stop_strings": [1]}, r"stop_strings is \[1\], expected a string or a list"),
        ({"bad_words_ids": [3]}, r"bad_words_ids is \[3\], expected a list of lists"),
        ({"bad_words_ids": [["x"]]}, r"bad_words_ids is \[\['x'\]\], expected a list of lists"),
        ({"sequence_bias": [[[3, 4], 1.0]]}, "sequence_bias is .* expected a list of .*one token each"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens is -1, expected a whole number of at least 0"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size is 0, expected a whole number of at least 1"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a whole number or a list"),
    ],
)
def test_mistakes_in_generation_config_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^generation_config.json: {message}"):
        GenerationConfig.from_json(content)
