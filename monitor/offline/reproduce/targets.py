"""What can be reproduced: the figures and tables of the paper, and what each of them needs."""

from dataclasses import dataclass

from repflow.monitor.offline import OfflineError


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure or table of the paper."""

    name: str
    title: str
    paper: str
    """Where it stands."""
    lengths: tuple[str, ...] = ("2K",)
    """Of the prompts, unless others are asked for."""
    random: bool = False
    """Whether models drawn at random are what it is about."""
    depth: bool = False
    """Whether states of prompts are: of a checkpoint, or of a model drawn once."""
    probes: bool = False
    """Whether it needs the gold positions of a task."""


_ALL = (
    Target(name="figure1", title="Adjacent-layer similarity, token × layer", paper="Figure 1, §3.2.1", depth=True),
    Target(name="figure2", title="Inter-token similarity over depth", paper="Figure 2, §3.2.2", depth=True),
    Target(
        name="figure3",
        title="Inter-token similarity of models drawn at random",
        paper="Figure 3, §3.2.3",
        random=True,
    ),
    Target(name="figure4", title="CKA of every pair of states", paper="Figure 4, §3.3.1", depth=True),
    Target(
        name="figure5",
        title="Inter-token similarity of updates Δh, models drawn at random",
        paper="Figure 5, appendix C",
        random=True,
    ),
    Target(
        name="figure6",
        title="Norms as they are, switched off, or with their affine parameters reset",
        paper="Figure 6, appendix C",
        random=True,
    ),
    Target(name="figure7", title="Embeddings scaled by .5, 1 and 2", paper="Figure 7, appendix C", random=True),
    Target(
        name="table1",
        title="Probing accuracy of the last state, and its drop from the peak",
        paper="Table 1, §3.4",
        lengths=("300", "1K", "2K", "4K"),
        depth=True,
        probes=True,
    ),
    Target(
        name="table2",
        title="V_loc and V_glob over prompt lengths",
        paper="Table 2, §3.3.2",
        lengths=("300", "1K", "2K", "4K"),
        depth=True,
    ),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def chosen_targets(names: tuple[str, ...]) -> tuple[Target, ...]:
    """The targets of these names, in the paper's order; `all` for all of them.

    Raises:
        OfflineError: none, or one that there is not.
    """
    unknown = [name for name in names if name not in (*TARGETS, "all")]
    if unknown or not names:
        told = repr(unknown[0]) if unknown else "none"
        if unknown and unknown[0] in ("report", "draw"):
            told += (
                f", which stands first and alone: `repflow reproduce {unknown[0]} FOLDER`, once there are targets in it"
            )
        raise OfflineError(
            f"TARGET: expected some of {', '.join(TARGETS)}, or all, or report or draw first; got {told}"
        )
    return tuple(target for target in _ALL if target.name in names or "all" in names)
