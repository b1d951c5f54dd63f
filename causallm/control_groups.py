"""The control groups of this process, in which containers and service managers hold it to less than the machine has.

Formats: docs.kernel.org, admin-guide/cgroup-v1 and admin-guide/cgroup-v2.
"""

from pathlib import Path
from typing import NamedTuple


class ControlGroup(NamedTuple):
    """unified: of version 2, whose files have other names than version 1's."""

    unified: bool
    folder: Path

    def text(self, file: str) -> str:
        """What a file says, "" where there is none."""
        try:
            return (self.folder / file).read_text().strip()
        except OSError:
            return ""

    def number(self, file: str) -> int | None:
        """The number that a file holds; None without one, as where it says "max"."""
        text = self.text(file)
        return int(text) if text.isdecimal() else None


def control_groups(controller: str, root: Path = Path("/")) -> list[ControlGroup]:
    """The groups of this process for a controller ("memory", "cpu") and all that contain them; [] where Linux is not.

    root: where /proc and /sys are.
    """
    groups = []
    for line in ControlGroup(True, root / "proc/self").text("cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        unified = number == "0"
        if not unified and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if unified else controller)
        group = top / path.lstrip("/")
        # A container sees its own group as the topmost, whatever the path says.
        folders = [folder for folder in (group, *group.parents) if folder == top or top in folder.parents]
        groups += [ControlGroup(unified, folder) for folder in folders]
    return groups
