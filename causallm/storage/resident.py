"""Reading all weights into memory of the process's own instead of mapping their files.

Such memory can have huge pages, a mapped file cannot: a product over weights then spends less time on finding where
they are. The price is the time to read them, and memory that is not shared with other processes and not given back.
"""

import torch

from causallm.steps import Progress
from causallm.storage.attach import load_layouts
from causallm.storage.computing import Computing
from causallm.storage.disk import Disk
from causallm.storage.inventory import take_inventory
from causallm.storage.layout import lay_out
from causallm.transformer import Transformer
from causallm.weights.expected import expected_parameters
from causallm.weights.loader import check_weights
from causallm.weights.reader import WeightReader


def reads_weights(model: Transformer, reader: WeightReader, device: torch.device) -> bool:
    """Whether the weights are to be read (mmap is false in nntr_config.json), and lie in files as in memory.

    What is cast or packed while loading is in memory of the process's own anyway, and so is what other devices have.
    """
    stored = set(reader.names())
    return (
        not model.runtime_config.mmap
        and device.type == "cpu"
        and all(
            name in stored and reader.meta(name).is_floating_point() == weight.is_floating_point()
            for name, weight in expected_parameters(model).items()
        )
    )


def read_weights(model: Transformer, reader: WeightReader, progress: Progress | None = None) -> None:
    """Give a model, built on meta, its weights; errors are those of `load_weights`, and OSError for the disk's."""
    check_weights(model, reader)
    inventory = take_inventory(model, reader)
    layouts = [inventory.small, *inventory.units.values()]
    if not inventory.tied:
        layouts.append(lay_out([inventory.embedding]))
    disk = Disk(reader.paths(), direct=False)
    try:
        load_layouts(model, layouts, disk, Computing(reader, disk), progress)
    finally:
        disk.close()
