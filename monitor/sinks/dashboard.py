"""A W&B workspace for runs that repflow monitors: its specification, and saving it to W&B.

Panels name keys by patterns, so that one workspace serves models of any depth, whatever the loop that trained them: all
of repflow's sinks log over `repflow/step`.
"""

import json
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from repflow._imports import require
from repflow.monitor.sinks._wandb_run import STEP

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "repflow"
_ALERTS = """\
A curve is 1 while its signature is raised. W&B sends each alert by mail or Slack, as your user settings say; messages
with numbers, layers and what to do are in the run file: `open_run(path).attrs["alerts"]`, and in `repflow report`."""


def build_dashboard(project: str, *, entity: str = "", name: str = NAME) -> "Workspace":
    """A workspace with the sections overview, depth, CKA and alerts. Nothing is asked or sent over the network.

    Args:
        project: whose runs it shows.
        entity: user or team that the project belongs to.
        name: of the workspace.

    Raises:
        ModuleNotFoundError: wandb-workspaces is missing.
    """
    require("wandb_workspaces")
    from wandb_workspaces import workspaces as ws

    sections = [_overview(), _depth(), _cka(), _alerts()]
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def dashboard_spec(workspace: "Workspace") -> str:
    """The specification that W&B is given, as JSON, without what is left to W&B; the same for the same workspace."""
    view = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(_numbered(view, count()), indent=2, ensure_ascii=False)


def save_dashboard(project: str, *, entity: str = "", name: str = NAME) -> str:
    """Save it to W&B as a new view, and return its address.

    Raises:
        ModuleNotFoundError: wandb-workspaces is missing.
        ConnectionError: W&B cannot be reached, or does not take it: nobody is logged in, or there is no such project.
    """
    workspace = build_dashboard(project, entity=entity, name=name)
    try:
        return workspace.save().url
    except Exception as error:  # of W&B, of its HTTP client, or of the server, by turns
        raise ConnectionError(
            f"could not save the workspace to W&B ({type(error).__name__}: {error}); log in with `wandb login`, and "
            f"check that {entity}/{project} is a project with a run in it"
        ) from error


def _numbered(value: Any, numbers: Iterator[int]) -> Any:
    """The same with numbers in place of the ids that are drawn at random."""
    if isinstance(value, list):
        return [_numbered(entry, numbers) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(next(numbers)) if key in ("__id__", "id") and entry else _numbered(entry, numbers)
        for key, entry in value.items()
    }


def _section(name: str, panels: list[Any], *, is_open: bool = True) -> "Section":
    from wandb_workspaces import workspaces as ws

    return ws.Section(name=name, panels=panels, is_open=is_open)


def _line(title: str, *keys: str, **options: Any) -> "LinePlot":
    from wandb_workspaces.reports.v2 import LinePlot

    return LinePlot(title=title, x=STEP, y=[f"repflow/{key}" for key in keys], **options)


def _lines(title: str, quantity: str, **options: Any) -> "LinePlot":
    """One curve for each state, transition or signature of a quantity."""
    from wandb_workspaces.reports.v2 import LinePlot

    return LinePlot(title=title, x=STEP, metric_regex=f"^repflow/{quantity}/.*", **options)


def _images(title: str, *keys: str) -> "MediaBrowser":
    from wandb_workspaces.reports.v2 import MediaBrowser

    return MediaBrowser(title=title, media_keys=[f"repflow/{key}" for key in keys], num_columns=1)


def _overview() -> "Section":
    return _section(
        "overview",
        [
            _lines("Inter-token similarity, by state", "inter_token", range_y=(0, 1)),
            _line("V_loc and V_glob, relative to the scale of the states", "v_loc_rel", "v_glob_rel"),
            _line("CKA of the first and the last state", "cka_first_last", range_y=(0, 1)),
            _lines("Signatures that are raised", "alerts", range_y=(0, 1)),
            _line("Tokens measured", "tokens", "sequences"),
            _line("Time spent on monitoring a step, ms", "overhead_ms"),
        ],
    )


def _depth() -> "Section":
    return _section(
        "depth",
        [
            _images("Inter-token similarity over depth and steps", "inter_token"),
            _lines("Cosine before and after a block", "adjacent", range_y=(None, 1)),
            _lines("Inter-token similarity of updates", "update_inter_token", range_y=(None, 1)),
            _lines("Norm of the states", "norms", log_y=True),
            _lines("Local variance, by state", "local_variance", log_y=True),
            _line("V_loc and V_glob, in units of the stream", "v_loc", "v_glob", log_y=True),
            _lines("Decay of state-space blocks, median", "ssm_decay", range_y=(0, 1)),
            _lines("Memory of state-space blocks, median, tokens", "ssm_memory", log_y=True),
        ],
    )


def _cka() -> "Section":
    return _section(
        "CKA",
        [
            _images("CKA of every pair of states", "cka"),
            _line("CKA of the first and the last state", "cka_first_last", range_y=(0, 1)),
            _lines("Share of one token in CKA", "hsic_top_token", range_y=(0, 1)),
            _lines("Drift on the probe batch: CKA with the first measurement", "drift_first", range_y=(None, 1)),
            _lines("Drift on the probe batch: CKA with the measurement before", "drift_previous", range_y=(None, 1)),
        ],
    )


def _alerts() -> "Section":
    from wandb_workspaces.reports.v2 import MarkdownPanel

    return _section(
        "alerts",
        [
            MarkdownPanel(markdown=_ALERTS),
            _lines("Signatures that are raised", "alerts", range_y=(0, 1)),
            _line("Tokens that are not finite, or zero", "nonfinite", "zero"),
        ],
    )
