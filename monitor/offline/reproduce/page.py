"""All that is in a folder as one HTML page, which needs no network and no other file."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.reproduce.pictures import GRID, INK
from repflow.monitor.offline.reproduce.written import Result

_PAGE = "report.html"
_SHOWN = ("claims", "unclaimed", "comparison", "reading", "target", "title", "paper", "skipped")
_HIDDEN = (*_SHOWN, "request", "models", "checkpoints")
_VERDICTS = {True: "✓", False: "✗", None: "–"}
_READ_OUT = {True: "holds", False: "does not hold", None: "cannot be told"}


def write_page(folder: Path, results: Sequence[Result]) -> Path:
    """Join results and their pictures, which are in a folder, in `report.html` there.

    Raises:
        OfflineError: the page cannot be written.
    """
    sections = [_section(folder, result) for result in results]
    report = files("repflow.monitor.report")
    page = Template((files("repflow.monitor.offline.reproduce") / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(result.target for result in results)),
        theme=(report / "theme.js").read_text(encoding="utf-8"),
        css=(report / "page.css").read_text(encoding="utf-8"),
        contents="".join(f'<a href="#{result.target}">{_name(result)}</a>' for result in results),
        sections="\n".join(sections),
    )
    path, partial = folder / _PAGE, folder / f"{_PAGE}.partial"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OfflineError(f"{path}: expected to write the page there: {error.strerror or error}") from error
    return path


def _name(result: Result) -> str:
    return re.sub(r"(\d+)", r" \1", result.target).capitalize()


def _section(folder: Path, result: Result) -> str:
    about = result.about
    skipped = "".join(f'<p class="warning">{escape(text)}</p>' for text in about["skipped"])
    kinds = [kind for kind in ("csv", "npz", "json") if (folder / f"{result.target}.{kind}").exists()]
    data = ", ".join(f"<code>{result.target}.{kind}</code>" for kind in kinds)
    parts = [
        f'<section id="{result.target}"><h2>{_name(result)}: {escape(about["title"])}</h2>',
        f"<p>{escape(about['paper'])}. Data: {data}</p>",
        skipped,
        _picture((folder / f"{result.target}.svg").read_text(encoding="utf-8"), result),
        "".join(map(_claim, about.get("claims", []))),
        "".join(f"<p><small>{escape(text)}.</small></p>" for text in about.get("unclaimed", [])),
        _comparison(about["comparison"], about.get("reading")),
        _values(result) if result.target.startswith("table") else "",
        _choices(about),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _picture(svg: str, result: Result) -> str:
    """The picture as part of the page: in the colours of its theme, and with names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)").replace("#ffffff", "none")
    svg = re.sub(r'\bid="', f'id="{result.target}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{result.target}-", svg)
    label = escape(f"{_name(result)}: {result.about['title']}")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f'<figure class="picture">{svg}</figure>'


def _claim(claim: Mapping[str, Any]) -> str:
    verdicts = claim["verdicts"]
    told = [verdict for verdict in verdicts if verdict["holds"] is not None]
    holds = sum(verdict["holds"] for verdict in told)
    policies = list(dict.fromkeys(verdict["policy"] for verdict in verdicts))
    rows: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for verdict in verdicts:
        scale = f"× {verdict['embedding_scale']:g}"
        rows.setdefault((verdict.get("model", "all"), verdict["scheme"], scale), {})[verdict["policy"]] = verdict
    scaled = len({key[2] for key in rows}) > 1
    body = [
        [*map(escape, key[: 3 if scaled else 2]), *(_mark(found.get(policy)) for policy in policies)]
        for key, found in rows.items()
    ]
    head = [
        "model",
        "scheme",
        *(["embedding"] if scaled else []),
        *(f"1-D policy: {name}" for name in policies),
    ]
    summary = f"{escape(claim['claim'])}: in {holds} of {len(told)} cases"
    return (
        f"<h3>{summary}</h3><p><small>Paper: {escape(claim['paper'])}. Number: {escape(claim['value'])}, mean over "
        f"seeds.</small></p><details><summary>Case by case</summary>{_table(claim['claim'], head, body)}</details>"
    )


def _mark(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return ""
    mark, said = _VERDICTS[verdict["holds"]], _READ_OUT[verdict["holds"]]
    return f'<span title="{said}" aria-label="{said}" role="img">{mark}</span> {_number(verdict["value"])}'


def _comparison(rows: Sequence[Mapping[str, Any]], reading: str | None) -> str:
    told = f" {escape(reading)}" if reading else ""
    if not rows:
        return f"<p><small>The paper prints no number for these models and settings.{told}</small></p>"
    several = [name for name in ("scheme", "policy", "length") if name in rows[0]]
    head = ["model", *several, f"what {escape(rows[0]['where'])} says of", "paper", "ours", "difference"]
    body = [
        [
            escape(row["model"]),
            *(escape(str(row[name])) for name in several),
            escape(row["text"]),
            _range(row["paper"]),
            _number(row["ours"]),
            _number(row["difference"], signed=True),
        ]
        for row in rows
    ]
    return f"<h3>Beside the paper</h3>{_table('Beside the paper', head, body)}<p><small>{told}</small></p>"


def _values(result: Result) -> str:
    head = [escape(name).replace("_", " ") for name in result.rows[0]]
    body = [[_cell(value) for value in row.values()] for row in result.rows]
    return f"<details><summary>All values</summary>{_table(_name(result), head, body)}</details>"


def _choices(about: Mapping[str, Any]) -> str:
    chosen = {name: value for name, value in about.items() if name not in _HIDDEN}
    chosen |= {name: about[name] for name in ("models", "checkpoints") if about.get(name)}
    text = json.dumps(chosen, indent=1, ensure_ascii=False)
    return f"<details><summary>Every choice</summary><pre tabindex='0'>{escape(text)}</pre></details>"


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML already."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    content = f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table>{content}</table></div>'


def _range(value: float | list[float]) -> str:
    return " to ".join(map(_number, value)) if isinstance(value, list) else _number(value)


def _number(value: float | None, *, signed: bool = False) -> str:
    return "n/a" if value is None else f"{value:{'+' if signed else ''}.3g}".replace("-", "−")


def _cell(value: Any) -> str:
    return "" if value is None else _number(value) if isinstance(value, float) else escape(str(value))
