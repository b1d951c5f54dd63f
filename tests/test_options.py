"""What a caller asks for against the complete configuration it becomes, and generation_config.json's unknown keys."""

import math
import warnings
from typing import Any

import pytest
import transformers
from sample_tokenizers import byte_level, save

from causallm.config import GenerationConfig
from causallm.options import READERS, generation_options
from causallm.tokenizer import Tokenizer

VOCAB = 422


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save(byte_level(), tmp_path_factory.mktemp("tokenizer")))


def options(base: GenerationConfig | None = None, tokenizer: Tokenizer | None = None, **given: Any) -> GenerationConfig:
    return generation_options(base or GenerationConfig(), tokenizer, VOCAB, **given)


def test_what_is_not_given_stays() -> None:
    base = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=(1, 2), max_new_tokens=3)
    assert options(base) == base
    assert options(base, **dict.fromkeys(READERS)) == base


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"temperature": 1}, "temperature", 1.0),
        ({"logit_bias": {3: 1, 4: -2.5}}, "logit_bias", ((3, 1.0), (4, -2.5))),
        ({"logit_bias": [[3, 1]]}, "logit_bias", ((3, 1.0),)),
        ({"bad_words_ids": [[3], [4, 5]]}, "bad_words_ids", ((3,), (4, 5))),
        ({"bad_words_ids": [3, [4, 5]]}, "bad_words_ids", ((3,), (4, 5))),
        ({"eos_token_id": 7}, "eos_token_id", (7,)),
        ({"eos_token_id": [7, 8]}, "eos_token_id", (7, 8)),
        ({"eos_token_id": []}, "eos_token_id", ()),
        ({"seed": [4, 5]}, "seed", (4, 5)),
        ({"seed": 4}, "seed", 4),
        ({"prompt_lookup_num_tokens": 8}, "prompt_lookup_num_tokens", 8),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size", 3),
    ],
)
def test_the_ways_to_write_an_option(given: dict[str, Any], field: str, value: Any) -> None:
    config = options(**given)
    assert getattr(config, field) == value
    assert hash(config) == hash(options(**given))


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        (False, {}, False),
        (False, {"temperature": 0.7}, True),
        (False, {"top_k": 5}, True),
        (False, {"top_p": 0.5}, True),
        (False, {"min_p": 0.1}, True),
        (False, {"seed": 1}, True),
        (False, {"repetition_penalty": 1.2}, False),
        (False, {"prompt_lookup_num_tokens": 8}, False),
        (False, {"temperature": 0.7, "do_sample": False}, False),
        (True, {}, True),
        (True, {"temperature": 0}, False),
        (True, {"temperature": 0, "seed": 3}, False),
        (True, {"do_sample": False}, False),
    ],
)
def test_what_asks_for_sampling(base: bool, given: dict[str, Any], expected: bool) -> None:
    assert options(GenerationConfig(do_sample=base), **given).do_sample is expected


def test_words_become_tokens(tokenizer: Tokenizer) -> None:
    base = GenerationConfig(bad_words_ids=((9,),), eos_token_id=(2,))
    config = options(base, tokenizer, bad_words=["time", "girl"], stop=["END", "<|im_end|>"])
    for text in ("time", " time", "girl", " girl"):
        assert tuple(tokenizer.encode(text)) in config.bad_words_ids
    assert config.bad_words_ids[0] == (9,)
    assert config.stop == ("END", "<|im_end|>")
    assert config.eos_token_id == (2, tokenizer.token_id("<|im_end|>"))
    assert options(base, tokenizer, bad_words="time") == options(base, tokenizer, bad_words=["time"])
    assert options(base, tokenizer, stop="END").stop == ("END",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1.0}, "unknown option 'temprature'; known are: do_sample, temperature, "),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens: got -1, expected at least 0"),
        ({"prompt_lookup_num_tokens": "3"}, "prompt_lookup_num_tokens: got '3', which is not of the right"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size: got 0, expected at least 1"),
        ({"temperature": "hot"}, "temperature: got 'hot', which is not of the right kind"),
        ({"top_k": 1.5}, "top_k: got 1.5, which is not of the right kind"),
        ({"max_new_tokens": "5"}, "max_new_tokens: got '5', which is not of the right kind"),
        ({"stop": [3]}, r"stop: got \[3\], which is not of the right kind"),
        ({"stop": 3}, "stop: got 3, which is not of the right kind"),
        ({"logit_bias": 3}, "logit_bias: got 3, which is not of the right kind"),
        ({"logit_bias": {"a": 1}}, "logit_bias: got .*, which is not of the right kind"),
        ({"bad_words_ids": [["x"]]}, "bad_words_ids: got .*, which is not of the right kind"),
        ({"eos_token_id": "</s>"}, "eos_token_id: got '</s>', which is not of the right kind"),
        ({"seed": "x"}, "seed: got 'x', which is not of the right kind"),
        ({"temperature": -1}, "temperature: got -1.0, expected a finite number >= 0"),
        ({"top_p": math.nan}, "top_p: got nan"),
        ({"logit_bias": {VOCAB: 1}}, f"logit_bias: got token id {VOCAB}, expected 0 <= id < {VOCAB}"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: got"),
        ({"bad_words": [""]}, "bad word ''"),
    ],
)
def test_a_mistake_is_named(tokenizer: Tokenizer, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        options(None, tokenizer, **given)


def test_the_files_of_the_hub_and_of_transformers_raise_no_warning() -> None:
    everything = dict.fromkeys(transformers.GenerationConfig().to_dict())
    neutral = {
        "num_beams": 1,
        "min_length": 0,
        "typical_p": 1.0,
        "no_repeat_ngram_size": 0,
        "guidance_scale": 1.0,
        "suppress_tokens": [],
        "token_healing": False,
        "_from_model_config": True,
        "transformers_version": "4.51.0",
        "max_length": 4096,
        "use_cache": True,
        "renormalize_logits": True,
        "trust_remote_code": True,
    }
    assert GenerationConfig.from_json({**everything, **neutral}) == GenerationConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("no_repeat_ngram_size", 3),
        ("encoder_repetition_penalty", 1.2),
        ("typical_p", 0.9),
        ("epsilon_cutoff", 3e-4),
        ("eta_cutoff", 3e-4),
        ("top_h", 0.4),
        ("min_length", 5),
        ("min_new_tokens", 5),
        ("forced_bos_token_id", 0),
        ("forced_eos_token_id", 2),
        ("suppress_tokens", [1, 2]),
        ("begin_suppress_tokens", [0]),
        ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5),
        ("exponential_decay_length_penalty", [10, 1.2]),
        ("watermarking_config", {"bias": 2.5}),
        ("dola_layers", "high"),
        ("token_healing", True),
        ("max_time", 3.0),
        ("temprature", 0.5),
        ("stop", ["x"]),
        ("logit_bias", [[1, 2.0]]),
    ],
)
def test_what_generation_config_asks_for_and_nobody_does_is_warned_about(key: str, value: Any) -> None:
    with pytest.warns(UserWarning, match=f"^folder/generation_config.json: not acted on: {key}$"):
        assert GenerationConfig.from_json({key: value}, "folder/generation_config.json") == GenerationConfig()


def test_all_that_is_not_acted_on_is_in_one_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GenerationConfig.from_json({"num_beams": 2, "min_length": 1, "top_k": 5})
    assert [str(warning.message) for warning in caught] == [
        "generation_config.json: not acted on: min_length, num_beams"
    ]


def test_lists_of_generation_config_become_tuples() -> None:
    content = {
        "bad_words_ids": [[3], [4, 5]],
        "sequence_bias": [[[6], 1]],
        "eos_token_id": [1, 2],
        "stop_strings": ["x"],
    }
    config = GenerationConfig.from_json(content)
    assert (config.bad_words_ids, config.logit_bias) == (((3,), (4, 5)), ((6, 1.0),))
    assert isinstance(hash(config), int)
