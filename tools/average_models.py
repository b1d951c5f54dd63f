"""The mean of the weights of models that were trained from one another: often better than each.

    python tools/average_models.py runs/one runs/two -o runs/mean

Folders as `train` writes them. All but the weights is of the first. Source: Wortsman et al., Model soups (2022).
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from causallm.cli import reporting_errors
from causallm.weights.atomic_file import temporary_beside
from causallm.weights.safetensors_reader import SINGLE


def main() -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    return reporting_errors(lambda: write_mean(args.models, args.output))


def write_mean(folders: Sequence[Path], output: Path) -> int:
    """The folder appears when it is whole; ValueError where there is one, or where the models differ in shape."""
    if output.exists():
        raise ValueError(f"{output} exists, expected the name of a new folder")
    mean = mean_of(folders)
    temporary = temporary_beside(output)
    shutil.copytree(folders[0], temporary, ignore=shutil.ignore_patterns("training", "loss.png", "README.md", SINGLE))
    save_file(mean, temporary / SINGLE, {"format": "pt"})
    temporary.rename(output)
    return 0


def mean_of(folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """By name; summed in float64, in the dtypes of the first."""
    first, *others = (load_file(folder / SINGLE) for folder in folders)
    total = {name: weight.double() for name, weight in first.items()}
    for folder, weights in zip(folders[1:], others, strict=True):
        for name in sorted(total.keys() | weights.keys()):
            has, needs = (tuple(state[name].shape) if name in state else "none" for state in (weights, total))
            if has != needs:
                raise ValueError(f"{folder}: the shape of {name} is {has}, that of {folders[0]} is {needs}")
            total[name] += weights[name]
    return {name: (weight / len(folders)).to(first[name].dtype) for name, weight in total.items()}


if __name__ == "__main__":
    sys.exit(main())
