"""How a byte-level tokenizer splits a text before it merges: what each name in tokenizer.ggml.pre stands for."""

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

# Expressions as in the tokenizer.json of the models that they come from.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}|"
    rf"\p{{N}}{{1,3}}|{_REST}"
)
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp does where a file names nothing, one after the other.
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
DIGITS = (r"\p{N}", GPT2)

SPLITS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT,
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "smollm": DIGITS,
    "gpt-4o": (GPT4O,),
    "tekken": (TEKKEN,),
}
"""The expressions of each name; the first of several names with the same is the one to write."""
ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "starcoder": "smollm", "refact": "smollm", "command-r": "smollm",
    "codeshell": "smollm", "llama4": "gpt-4o", "gpt2": "gpt-2", "phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2",
}  # fmt: skip
WHOLE_WORDS = frozenset({"llama-bpe", "tekken"})
"""Those where a word that is a token is not merged at all."""
BEGINS = frozenset({"llama-bpe", "tekken"})
"""Those where a prompt begins with BOS unless the file says otherwise."""
COMPOSED = frozenset({"qwen2"})
"""Those whose models normalise text to NFC; the format has no key for that."""


def splitter(name: str) -> PreTokenizer:
    """The pre-tokenizer of a name in `SPLITS`: texts become runs of letters that stand for bytes."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def normalizer(name: str) -> Normalizer | None:
    """The normalizer that goes with it."""
    return normalizers.NFC() if name in COMPOSED else None
