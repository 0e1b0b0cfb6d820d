"""Folders of checkpoints: which are complete, and what interrupted saves and copies left."""

from __future__ import annotations

from absl import logging
from etils import epath

# Orbax writes into a folder with this in its name and renames it when all is there.
TEMPORARY = ".orbax-checkpoint-tmp"
PARTS = ("_CHECKPOINT_METADATA", "state", "position")


def is_complete(folder: epath.Path) -> bool:
    """Whether this is the folder of a checkpoint that was written to its end."""
    return folder.name.isdigit() and all((folder / part).exists() for part in PARTS)


def sweep(directory: epath.Path) -> None:
    """Clears away what an interrupted save or copy left; Orbax would count a bare "<step>"."""
    for folder in directory.iterdir():
        if TEMPORARY in folder.name:
            logging.warning("Removing %s, left by a save that was interrupted.", folder)
            folder.rmtree()
        elif folder.name.isdigit() and not is_complete(folder):
            name = f"{folder.name}.incomplete"
            logging.warning("Checkpoint %s is incomplete; renamed to %s.", folder, name)
            rename(folder, name)


def rename(folder: epath.Path, name: str) -> None:
    """Gives `folder` another name, in the place of what had it."""
    aside = folder.parent / name
    if aside.exists():
        aside.rmtree()
    folder.rename(aside)


def finished_steps(directory: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return sorted(int(folder.name) for folder in directory.iterdir() if is_complete(folder))
