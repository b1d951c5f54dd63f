"""From data files to windows of tokens, by way of token files that are kept for the next time."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from causallm.tokenizer import Tokenizer
from causallm.training.corpus import Document, read_documents
from causallm.training.encode import encode_document
from causallm.training.settings import DataSettings
from causallm.training.token_file import TokenFile, is_current, write_token_file
from causallm.training.windows import Windows

FORMAT = 2
"""Of the token files; those of another are made again."""


def prepare_data(data: DataSettings, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the token files of training and validation, unless they are there from the same files and tokenizer."""
    fingerprint = _fingerprint(data, tokenizer)
    for name, documents in (("train", training_documents(data)), ("validation", validation_documents(data))):
        if not is_current(folder, name, fingerprint):
            encoded = (encode_document(document, tokenizer) for document in documents)
            write_token_file(folder, name, encoded, tokenizer.vocab_size, fingerprint)


def training_documents(data: DataSettings) -> Iterator[Document]:
    """What is not held out."""
    for number, document in enumerate(read_documents(data.train, data.separator)):
        if not _is_held_out(number, data):
            yield document


def validation_documents(data: DataSettings) -> Iterator[Document]:
    """Those of the validation files, or the training files' documents that are held out."""
    if data.validation:
        yield from read_documents(data.validation, data.separator)
        return
    for number, document in enumerate(read_documents(data.train, data.separator)):
        if _is_held_out(number, data):
            yield document


def _is_held_out(number: int, data: DataSettings) -> bool:
    """validation_fraction of any row of documents, evenly spread."""
    fraction = 0.0 if data.validation else data.validation_fraction
    return int((number + 1) * fraction) > int(number * fraction)


def open_windows(data: DataSettings, seed: int, folder: Path) -> tuple[Windows, Windows | None]:
    """The windows of training and validation; None, with a warning, where too little was held out for a window.

    ValueError where a file's data make no window.
    """
    train, validation = (TokenFile(folder, name) for name in ("train", "validation"))
    windows = Windows(train, data.context_length, seed, source=", ".join(data.train), packing=data.packing)
    if not data.validation and validation.tokens <= data.context_length:
        if data.validation_fraction:
            warnings.warn(
                f"no validation loss: data.validation_fraction {data.validation_fraction} of {train.documents} "
                f"documents holds out {validation.tokens} tokens, less than a window of {data.context_length}",
                stacklevel=2,
            )
        return windows, None
    source = ", ".join(data.validation or data.train)
    held_out = Windows(validation, data.context_length, seed, shuffle=False, source=source, packing=data.packing)
    return windows, held_out


def _fingerprint(data: DataSettings, tokenizer: Tokenizer) -> str:
    """What the token files follow from: a file that has not changed keeps its size and time."""
    files = [
        (name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns)
        for name in (*data.train, *data.validation)
        if Path(name).is_file()
    ]
    template = tokenizer.chat_template.source if tokenizer.chat_template else None
    made_of = [FORMAT, files, data.separator, data.validation_fraction, tokenizer.fingerprint(), template]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
