"""docs/report.md, with links to what the report defines.

`python -m tests.report_page` writes it; a test compares.
"""

from pathlib import Path

from repflow.monitor.report._definitions import DEFINITIONS

PAGE = Path(__file__).parents[1] / "docs" / "report.md"

INTRODUCTION = """\
# The report

```
repflow report repflow-runs/*.db -o report.html     # one page, to keep and to send
repflow watch repflow-runs/my-run.db                # the same page, following a run while it trains
```

![Three runs of the demo: inter-token similarity over depth and steps](images/report-light.png)

The page is one file: it asks nothing of any network, opens from a disk, prints, and is read with the mouse or with
the keyboard alone. `repflow report` and `repflow watch` show the same figures. (The list below is written by
`python -m tests.report_page`, the pictures by `python -m tests.screenshots`, from `repflow demo --quick`.)

## How to read it

- **Runs stand side by side** on the same scales, each over its whole depth: equal places are equal relative depths.
- **The slider** at the top chooses the training step of all matrices, of all maps of positions, of the curves of all
  runs over depth, and of the differences. Each run shows its nearest snapshot, and each figure says which. ← and →
  move it; Home and End go to the first and to the last step.
- **Kinds of blocks** are a strip along depth, by colour and by letter: A attention, S ssm, H hybrid, R recurrent, M
  mlp, E moe, C conv. The card of a run spells out their order, such as `2S A 3S A S`.
- **Alerts** are listed at the top, the worst first, and marked at the top of every figure over steps; hovering tells
  what was found and what to do.
- **Before training**: the first snapshot of a run stands dotted beside the chosen one if it is of step 0, before the
  first update. If the run was trained from scratch, that is random initialisation; a run file does not know. With
  `--baseline RUN`, the first snapshot of another run, such as the same model with random weights, stands beside them
  in grey.
- **Drift** stands there for runs with a [probe batch](probe.md): CKA of each state with itself at the first
  measurement, and at the one before.
- **A − B** takes two runs apart: curves and matrices where both have as many blocks, else curves over relative depth,
  B interpolated linearly; drift where both measure a probe batch. CKA and drift of different estimators are not
  compared.
- **With the keyboard**, Tab goes from the slider to the lists, the definitions and the figures; in a figure the arrow
  keys go from point to point, and what hovering shows is shown and read out.
- **Definition** beside each heading opens its formula, its unit, how to read it and what to do; the list below leads
  to a page of each.
- **Long runs are thinned**, which the page says where it does so: 300 columns of a heatmap and 2,000 points of a
  curve per run (largest values where outliers matter, else single snapshots), 30 steps of the slider.
- **Colours** follow the system, or the choice at the top, which the browser remembers. On paper the page is light and
  without controls, with its figures at the chosen step.

![The same page in the dark: adjacent-layer similarity by position and depth, for one step](images/report-dark.png)

![The difference of two runs](images/report-compare.png)

## While a run trains

`repflow watch RUN...` serves the page on 127.0.0.1, on port 8714 unless `--port` says otherwise (0: any that is
free), and says its address. The page renews itself when there are new snapshots; it keeps the step of the slider,
unless that stands at its end and so follows the run, the place that is read, and open definitions. A run file may not
exist yet, be resumed, be replaced or be removed meanwhile. Ctrl-C ends it. Reading and drawing rest four times as
long as they take, so that a training on the same machine keeps its processors.

Where training runs on another machine, a tunnel brings the page to yours:

```
ssh -t -L 8714:127.0.0.1:8714 machine repflow watch repflow-runs/my-run.db
```

It answers to this machine alone, and only under its names, so that no page of another site can read it through your
browser.

## Limits

The whole run file is read for each page, which takes several times its size in memory.

## Definitions

"""


def page_text() -> str:
    """The whole page."""
    rows = (f"- [{definition.title}](quantities/{name}.md)\n" for name, definition in DEFINITIONS.items())
    return INTRODUCTION + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page_text(), encoding="utf-8")
