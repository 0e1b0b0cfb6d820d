"""Publishes a converted model on the Hugging Face hub: its card tells what the run's files hold."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oneformer_jax.train.checkpoint import Trained


def check(name: str, form: str) -> None:
    """Checks what a push needs before anything is computed.

    Raises:
      ValueError: another format, or the hub does not know the user.
    """
    from oneformer_jax.weights import hub

    if form != "hugging_face":
        raise ValueError("--push needs --format=hugging_face, which the hub's own programs read")
    hub.check_login(name)


def push(output: str, name: str, trained: Trained, source: pathlib.Path, license: str) -> str:
    """Pushes the folder `output` and a card made of the run; see `weights.hub.push`.

    Args:
      output: the converted model.
      name: on the hub.
      trained: the model.
      source: the workdir or file that it is from; the scores of the workdir go into the card.
      license: of the weights, see `weights.card.model_card`.
    """
    import jax

    from oneformer_jax.weights import card, hub

    count = sum(x.size for x in jax.tree.leaves(trained.params)) / 1e6
    backbone = trained.model["backbone"]["kind"]
    metadata = trained.metadata
    trained_for = f" after {trained.step:,} steps" if trained.step else ""
    text = card.model_card(
        summary=(
            f"A OneFormer for panoptic, instance and semantic segmentation: {backbone}, "
            f"{trained.model['num_queries']} queries, {metadata.num_classes} classes of "
            f"{metadata.dataset}, {count:.1f} M parameters{trained_for}."
        ),
        dataset=metadata.dataset,
        scores=_scores(source, trained.step),
        config=trained.settings,
        license=license,
    )
    return hub.push(pathlib.Path(output).expanduser(), name, text)


def _scores(source: pathlib.Path, step: int) -> dict[str, float | None]:
    """The scores of a step that a workdir holds, {} if it has not been evaluated."""
    from oneformer_jax.train import evaluator

    workdir = source.parent.parent if source.name == str(step) else source
    results = evaluator.read_results(workdir, step)
    return {} if results is None else results.metrics
