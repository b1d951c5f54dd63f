"""A whole training run: tokenizer, model, data, loop, and the model folder at the end."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from causallm.allocator import keep_freed_memory
from causallm.causal_lm import CausalLM
from causallm.config import GenerationConfig
from causallm.tokenizer import Tokenizer
from causallm.training.checkpoint import Checkpoints, last_step, saved_steps
from causallm.training.hooks import add_dropout, involve_all_experts
from causallm.training.loop import train
from causallm.training.model_folder import generation_json, write_model_folder
from causallm.training.new_model import complete_config, make_model
from causallm.training.new_tokenizer import make_tokenizer
from causallm.training.prepare import open_windows, prepare_data, training_documents
from causallm.training.processes import Processes
from causallm.training.progress import Progress
from causallm.training.recording import recording
from causallm.training.settings import Settings
from causallm.training.start_from import start_from
from causallm.training.windows import Windows
from causallm.weights.safetensors_reader import SINGLE

WORK = "training"
"""The folder inside the model's where tokens, checkpoints, log and picture are."""
CHECKPOINTS = "checkpoints"


def run_training(
    settings: Settings,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    show: Callable[[str], None] = lambda text: None,
) -> Path:
    """Train as the settings say; returns the model folder.

    In the first process `report` gets each step, and `show` what a person may want to read meanwhile. ValueError and
    OSError say what is wrong, and what there is to go on from.
    """
    keep_freed_memory()
    processes = Processes(settings.train.device, settings.train.sharding)
    try:
        return _run(settings, resume, report, show, processes)
    finally:
        processes.close()


def _run(
    settings: Settings,
    resume: bool,
    report: Callable[[Progress], None],
    show: Callable[[str], None],
    processes: Processes,
) -> Path:
    folder = Path(settings.output)
    work = folder / WORK
    _check(settings, resume, folder, processes)
    first_step = last_step(work / CHECKPOINTS) if resume else 0
    tokenizer = _tokenizer(settings, resume, folder, processes)
    config = complete_config(settings.model, tokenizer, settings.data.context_length)
    body = _trainable(config, settings, tokenizer)
    with recording(settings, work, first_step) if processes.is_first else nullcontext(_nothing) as record:
        windows, held_out = _windows(settings, tokenizer, work / "tokens", processes)
        steps = count_steps(settings, windows)
        if processes.is_first:
            show(_summary(body, settings, windows, steps))

        def after_step(progress: Progress) -> None:
            if processes.is_first:
                record(progress)
                report(progress)
            if settings.log.sample_every and progress.step % settings.log.sample_every == 0:
                # All processes write the same: of a sharded model each has a part.
                text = sample(body, settings)
                if processes.is_first:
                    show(f"step {progress.step}:\n{text}")

        identity = _identity(settings, config, steps, windows.data.digest)
        checkpoints = Checkpoints(work / CHECKPOINTS, settings.log.keep_checkpoints, identity)
        model = processes.wrap(body)
        train(model, windows, held_out, settings, steps, checkpoints, processes, after_step, resume)
        weights = _weights(model)
        if processes.is_first:
            write_model_folder(folder, config, body.config, weights, settings, tokenizer)
    processes.barrier()
    return folder


def _nothing(progress: Progress) -> None:
    """The record that processes but the first keep."""


def _check(settings: Settings, resume: bool, folder: Path, processes: Processes) -> None:
    """ValueError before anything is written."""
    checkpoints = folder / WORK / CHECKPOINTS
    if not resume and saved_steps(checkpoints):
        raise ValueError(f"{checkpoints} holds an earlier run's checkpoints: use --resume, or remove {folder / WORK}")
    if not (folder / WORK).is_dir() and (folder / SINGLE).exists():
        raise ValueError(f"{folder} holds a model that this run would replace: name another output, or remove it")
    share = settings.train.batch_size // settings.train.gradient_accumulation
    if share % processes.count:
        raise ValueError(
            f"train.batch_size / train.gradient_accumulation is {share}, expected a multiple of the "
            f"{processes.count} processes"
        )


def _tokenizer(settings: Settings, resume: bool, folder: Path, processes: Processes) -> Tokenizer:
    """The first process makes it; a resumed run has it."""
    if processes.is_first and not (resume and (folder / "tokenizer.json").is_file()):
        texts = (text for document in training_documents(settings.data) for text in document.texts())
        make_tokenizer(settings.tokenizer, texts, folder)
    processes.barrier()
    return Tokenizer.from_folder(folder)


def _windows(
    settings: Settings, tokenizer: Tokenizer, folder: Path, processes: Processes
) -> tuple[Windows, Windows | None]:
    """The first process writes the token files that all of them map."""
    if processes.is_first:
        prepare_data(settings.data, tokenizer, folder)
    processes.barrier()
    return open_windows(settings.data, settings.train.seed, folder)


def _trainable(config: dict[str, Any], settings: Settings, tokenizer: Tokenizer) -> CausalLM:
    """The model with fresh weights, what training adds to it, and what writing samples needs."""
    body = cast(CausalLM, make_model(config, settings.train.seed))
    if settings.train.start_from:
        start_from(body, Path(settings.train.start_from))
    add_dropout(body, settings.train.dropout)
    involve_all_experts(body)
    body.tokenizer = tokenizer
    body.generation_config = GenerationConfig.from_json(generation_json(settings, tokenizer))
    if settings.log.sample_every:
        # A prompt that does not fit must not be noticed in the middle of the run.
        try:
            body.stream(settings.log.sample_prompts, **_sampling(settings))
        except ValueError as error:
            raise ValueError(f"log.sample_prompts: {error}") from None
    return body


def count_steps(settings: Settings, windows: Windows) -> int:
    """Steps of the run: as given, or what the epochs come to."""
    if settings.train.steps is not None:
        return settings.train.steps
    return max(1, round((settings.train.epochs or 0.0) * windows.per_epoch / settings.train.batch_size))


def _summary(body: nn.Module, settings: Settings, windows: Windows, steps: int) -> str:
    parameters = sum(parameter.numel() for parameter in body.parameters())
    return (
        f"{type(body).__name__}: {parameters:,} parameters; {windows.data.tokens:,} training tokens in "
        f"{windows.data.documents:,} documents; {steps} steps of {settings.train.batch_size} x "
        f"{settings.data.context_length} tokens"
    )


def sample(model: CausalLM, settings: Settings) -> str:
    """What the model writes after each of the sample prompts, drawn with a fixed seed."""
    training = model.training
    model.eval()
    texts = model.generate_text(settings.log.sample_prompts, **_sampling(settings))
    model.train(training)
    between = "\n" if model.tokenizer and model.tokenizer.chat_template else ""
    return "\n\n".join(prompt + between + text for prompt, text in zip(settings.log.sample_prompts, texts, strict=True))


def _sampling(settings: Settings) -> dict[str, Any]:
    """The options of samples; where generation settings say nothing, such as small models need."""
    options = {} if settings.generation else {"temperature": 0.8, "top_k": 40}
    return {**options, "seed": 1, "max_new_tokens": settings.log.sample_tokens}


def _identity(settings: Settings, config: dict[str, Any], steps: int, digest: str) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that resumes it."""
    names = ("tokenizer", "data", "optimizer", "schedule", "train")
    sections = {name: asdict(getattr(settings, name)) for name in names}
    for key in ("device", "compile", "sharding"):
        del sections["train"][key]
    sections["train"]["steps"] = steps
    return {**sections, "model": config, "content of the data": digest}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the CPU in the first process, by our names."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))
