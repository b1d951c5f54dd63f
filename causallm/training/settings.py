"""What a training run is: the content of its YAML file, one frozen dataclass a section."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenizerSettings:
    """An existing tokenizer.json (or a folder with one) in `file`, or what to train one with.

    A trained one is a byte-level BPE: special_tokens, then the 256 bytes, then merges up to vocab_size (without room
    for merges, a token a character). eos_token, which ends each document, is one of the special tokens. chat_template
    is a Jinja template as text or the path of a file.
    """

    file: str | None = None
    vocab_size: int = 4096
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    eos_token: str = "<|endoftext|>"
    chat_template: str | None = None

    @property
    def all_special_tokens(self) -> tuple[str, ...]:
        """special_tokens, and eos_token after them where they leave it out; each once."""
        return tuple(dict.fromkeys((*self.special_tokens, self.eos_token)))


@dataclass(frozen=True)
class DataSettings:
    """Files: .txt whose documents `separator` divides (empty: each file is one), .jsonl with `text` or `messages`.

    Without `validation` files, `validation_fraction` of the documents is held out. Windows have context_length tokens.
    packing: cut, documents end to end and cut where a window ends, or whole, none cut that fits in a window.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.02
    separator: str = "<|endoftext|>"
    context_length: int = 256
    packing: str = "cut"


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; weight decay acts on matrices only."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8


@dataclass(frozen=True)
class ScheduleSettings:
    """kind: cosine, linear or constant, after a linear warm-up; ends at final_fraction of the learning rate."""

    kind: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1


@dataclass(frozen=True)
class TrainSettings:
    """The loop: batch_size windows a step over all processes, in gradient_accumulation parts.

    Either steps, or epochs over the training tokens. clip_norm: the longest gradient (0: any). precision: fp32, or
    bf16 autocast. sharding: ddp or fsdp, where torchrun starts several processes. dropout acts on the embedding and on
    what blocks add to it. start_from: a folder whose model's weights the run begins with, instead of random ones.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    clip_norm: float = 1.0
    dropout: float = 0.0
    precision: str = "fp32"
    device: str = "cpu"
    compile: bool = False
    sharding: str = "ddp"
    seed: int = 1
    start_from: str | None = None


@dataclass(frozen=True)
class LogSettings:
    """Steps between evaluations, checkpoints and samples (0: none but at the end), and where to report besides.

    A sample goes on from each of sample_prompts for at most sample_tokens tokens.
    """

    evaluate_every: int = 200
    evaluate_windows: int = 64
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ("Once upon a time",)
    sample_tokens: int = 60
    tensorboard: bool = False
    mlflow: bool = False
    experiment: str = "causallm"


@dataclass(frozen=True)
class Settings:
    """The whole file. Paths are relative to where the command runs.

    output: the model folder to make. model: config.json's content, with `architecture` for `architectures`.
    generation: generation_config.json's content.
    """

    output: str
    model: dict[str, Any]
    data: DataSettings
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    log: LogSettings = field(default_factory=LogSettings)
    generation: dict[str, Any] = field(default_factory=dict)
