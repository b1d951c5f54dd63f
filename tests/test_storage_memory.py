"""Memory that a process has, measured: it stays within what was planned, whatever the model's files hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from text_models import TEMPLATE, save_text_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell")

BEGINNING = """
import json, sys
from pathlib import Path
from causallm import load_model
from causallm.report import peak_memory
from causallm.storage.budget import make_plan
from causallm.storage.inventory import take_inventory
from causallm.loading import build_packed, find_source

def planned(folder, dtype=None, **settings):
    model, reader = build_packed(find_source(folder), dtype, memory_budget="100GB", **settings)
    return make_plan(model, take_inventory(model, reader))
"""
SCRIPT = (
    BEGINNING
    + """
folder, share, dtype = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
settings = {"max_seq_len": 256}
plan = planned(folder, dtype, **settings)
# The program itself grows a little with its second model.
budget = int(plan.smallest + 3e6 + share * (plan.memory - plan.smallest))
before = peak_memory()
model = load_model(folder, dtype=dtype, memory_budget=budget, **settings)
ids = [number % 90 for number in range(120)]
tokens = [event.token_id for event in model.stream([ids], max_new_tokens=20)]
print(json.dumps({
    "before": before, "peak": peak_memory(), "budget": budget, "planned": model.storage.planned_bytes,
    "smallest": plan.smallest, "everything": plan.memory, "tokens": len(tokens), "streamed": len(model.storage._units),
}))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 MB of weights in float32, of which the head is a third."""
    folder = tmp_path_factory.mktemp("large")
    save_text_model(
        folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, vocab_size=24_000,
        tie_word_embeddings=True,
    )  # fmt: skip
    return folder


def measured(folder: Path, share: float, dtype: str) -> dict[str, int]:
    return run(SCRIPT, folder, share, dtype)


def run(script: str, *arguments: object) -> dict[str, int]:
    """What a script prints."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], check=True, capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[1], env={"OMP_NUM_THREADS": "2", "PATH": ""},
    )  # fmt: skip
    content: dict[str, int] = json.loads(result.stdout)
    return content


@pytest.mark.parametrize(("share", "dtype"), [(0.0, "float32"), (0.5, "float32"), (0.0, "bfloat16")])
def test_the_peak_is_within_the_plan(share: float, dtype: str, folder: Path) -> None:
    found = measured(folder, share, dtype)
    assert found["streamed"]
    assert found["tokens"] == 20
    assert found["planned"] <= found["budget"] < found["everything"]
    assert found["peak"] <= found["planned"]
    weights = 152_000_000 if dtype == "float32" else 76_000_000
    assert found["everything"] - found["smallest"] > 0.6 * weights
    assert found["peak"] < found["before"] + 0.75 * weights + 40_000_000 * (share == 0)


PATHS = {
    "many prompts": (4096, "list(model.stream([ids[k : k + 56] for k in range(64)], max_new_tokens=4))"),
    "perplexity": (1024, "perplexity(model, ids[:1024], 1024, 512)"),
    "bench": (2048, "list(measure(model, make_cases([256], [8], [0], [1], [8], 2048), 1))"),
    "bench at depth": (2048, "list(measure(model, make_cases([200], [8], [900], [1], [1], 2048), 1))"),
    "a prompt cache": (
        4096,
        "held = make_prompt_cache(model, [ids[:4000]]); list(model.stream([ids[:4010]], max_new_tokens=4, "
        "prompt_cache=held))",
    ),
    "a conversation": (
        2048,
        "talk = Conversation(model, max_new_tokens=4, on_full='drop'); [talk.answer('word ' * 90) for _ in range(8)]",
    ),
    "texts to embed": (512, "model.encode(['word and ' * 30] * 30)"),
}  # fmt: skip
"""What is done, with so many positions."""
ANSWERED = """
from causallm.bench import make_cases, measure
from causallm.conversation import Conversation
from causallm.perplexity import perplexity
from causallm.prompt_cache.make import make_prompt_cache

folder, embedding, length = Path(sys.argv[1]), sys.argv[2] == "texts to embed", int(sys.argv[3])
settings = {"max_seq_len": length, **({"model_type": "embedding"} if embedding else {})}
ids = [number % 90 for number in range(length)]
budget = int(planned(folder, **settings).smallest + 3e6)
model = load_model(folder, memory_budget=budget, **settings)
exec(sys.argv[4])
print(json.dumps({"peak": peak_memory(), "budget": budget}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache larger than the weights: 24 kB a position."""
    folder = tmp_path_factory.mktemp("wide")
    save_text_model(
        folder, "Qwen3Config", hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, head_dim=128, vocab_size=16_000, tie_word_embeddings=True,
        max_position_embeddings=16_384, template=TEMPLATE,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", PATHS)
def test_no_way_to_use_a_model_takes_more_than_its_budget(name: str, wide: Path) -> None:
    length, work = PATHS[name]
    found = run(BEGINNING + ANSWERED, wide, name, length, work)
    assert found["peak"] <= found["budget"]
