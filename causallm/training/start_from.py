"""A run that begins with the weights of a model there is: fine-tuning."""

from pathlib import Path

from causallm.loading import load_model
from causallm.transformer import Transformer


def start_from(model: Transformer, folder: Path) -> None:
    """Copy the weights of the model in `folder`; ValueError where the run's model has others, or of other shapes."""
    known = load_model(folder, dtype="float32", memory_budget=None, fsu=False).state_dict()
    wanted = model.state_dict()
    for name in sorted(known.keys() | wanted.keys()):
        has, needs = (tuple(state[name].shape) if name in state else "none" for state in (known, wanted))
        if has != needs:
            raise ValueError(
                f"train.start_from {folder}: the shape of {name} is {has}, the run's model needs {needs}: "
                "give the model section the sizes of that model"
            )
    model.load_state_dict(known)
