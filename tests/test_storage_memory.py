"""Memory that a process has, measured: it stays within what was planned, whatever the model's files hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from text_models import save_text_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell")

SCRIPT = """
import json, sys
from pathlib import Path
from causallm import load_model
from causallm.report import peak_memory
from causallm.storage.budget import make_plan
from causallm.storage.inventory import take_inventory
from causallm.loading import build_packed, find_source

folder, share, dtype = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
settings = {"max_seq_len": 256}
model, reader = build_packed(find_source(folder), dtype, memory_budget="100GB", **settings)
plan = make_plan(model, take_inventory(model, reader))
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
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(share), dtype], check=True, capture_output=True, text=True,
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
