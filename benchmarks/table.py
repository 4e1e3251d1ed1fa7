"""What the README and docs/performance.md say of speed, made from the results of the benchmarks."""

import argparse
import difflib
import math
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from _provenance import COLUMNS, ROOT, read_rows

START, END = "<!-- speed, from benchmarks/table.py -->", "<!-- end of speed -->"

Row = dict[str, str]
Case = dict[str, Row]
"""The rows of one input, by implementation."""

_CASE_COLUMNS = ("quantity", "S", "B", "T", "D", "dtype", "input")

_NAMES = {
    "floor": "floor",
    "reference": "float64 PyTorch, the reference",
    "eager, obvious": "PyTorch, cosines of all pairs",
    "eager, closed forms": "PyTorch, closed forms",
    "torch.compile": "the same under torch.compile",
    "autograd, all pairs": "PyTorch and autograd, cosines of all pairs",
    "autograd, closed form": "PyTorch and autograd, closed form",
    "repflow": "**repflow**",
    "repflow, CUDA graph": "**repflow** without its launches: replayed as a CUDA graph",
}

_DEPTH = (
    "**Along depth and across tokens**, {size}. The floor is one read of the states, at {rate:.2f} TB/s. PyTorch "
    "computes adjacent-layer and inter-token similarity, V_loc and V_glob in float32; repflow and the reference also "
    "norms, distances, the similarity of updates, and counts."
)

_HSIC = (
    "**CKA of every pair of states**, {size}: time, extra memory, and the largest error of CKA, also on inputs that "
    "are hard to be right on; a dash where it was not run or broke off. The floor is half the Gram products, since "
    "they are symmetric, at the {rate:.0f} TFLOP/s of a bf16 product of {product} in the same run."
)

_SIMILARITY = (
    "**The gradient of inter-token similarity**, with which the [regularizer](regularizer.md) acts on a layer, {size}. "
    "The floor is two reads of the state and one write, the budget 1.5 × as much. A single call takes at least as long "
    "as its launches on the CPU, which run ahead only of a GPU that is busy; the CUDA graph shows the GPU's part. "
    "Gradients are compared as they are returned, in the dtype of the state, relative to their largest entry."
)

_SIZES = "**At other sizes**, repflow beside the floor and the fastest of the others that ran:"

_OVERHEAD = (
    "**A training step**: bare; with a monitor that does not sample it (between); sampled; and on average when every "
    "50th is. The overhead stands with its standard error, the extra memory beside the buffer that is part of it, "
    "synchronisations of CPU and GPU as far as PyTorch tells, and the CPU time of the monitor by itself."
)

_EXTRACTION = (
    "**Extraction** of statistics and last-token features, from the call to the last file, and the same batches "
    "through the bare model, in turns; medians, and lowest and highest, of {runs} runs, and how much large models "
    "are to keep:"
)

_PROBES = "**Probes**, all states and seeds at once, from features in host memory to accuracies:"

_MEASURED = (
    "`make bench` measures this, and the kernels beside floors and other packages "
    "([docs/performance.md](docs/performance.md)); it checks each result in the run that times it."
)


def main() -> int:
    """Write the sections into both pages, or with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="page for the training step")
    parser.add_argument("--performance", type=Path, default=ROOT / "docs" / "performance.md", help="for the kernels")
    options = parser.parse_args()
    sections = {
        options.readme: steps_section(options.results),
        options.performance: performance_section(options.results),
    }
    return max([update(page, text, check=options.check) for page, text in sections.items()])


def update(page: Path, text: str, *, check: bool) -> int:
    """Put `text` into the section of a page, or only print what would change; 1 if that is anything."""
    old = page.read_text(encoding="utf-8")
    new = replace_section(old, text, page.name)
    if old == new:
        return 0
    if not check:
        page.write_text(new, encoding="utf-8")
        return 0
    print(*difflib.unified_diff(old.splitlines(), new.splitlines(), "is", "should be", n=0, lineterm=""), sep="\n")
    print(f"{page.name} is not what the results say; run: python benchmarks/table.py")
    return 1


def replace_section(page: str, text: str, name: str) -> str:
    """`page` with `text` between the two markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in rest or END in after:
        raise ValueError(f"{name}: expected one line {START!r} and after it one line {END!r}; put them back")
    return "\n".join([before + START, *([text] if text else []), END + after])


def steps_section(results: Path) -> str:
    """The README's section: what a training step pays; empty without results."""
    if not (results / "overhead.csv").exists():
        return ""
    rows = read_rows(results / "overhead.csv")
    return "\n\n".join(
        ["## Speed", prose(_MEASURED), *describe_overhead(rows), origin(rows, "overhead.csv", "", "model")]
    )


def performance_section(results: Path) -> str:
    """The section of docs/performance.md: the kernels, and offline analysis; empty without results."""
    return "\n\n".join(filter(None, [kernels_section(results), offline_section(results)]))


def kernels_section(results: Path) -> str:
    """The kernels beside floors and peers; empty without results."""
    if not (results / "kernels.csv").exists():
        return ""
    rows = read_rows(results / "kernels.csv")
    return "\n\n".join(["## The kernels", *describe_kernels(rows), origin(rows, "kernels.csv", "../", "quantity")])


def offline_section(results: Path) -> str:
    """Extraction and probes; empty without results."""
    if not (results / "offline.csv").exists():
        return ""
    rows = read_rows(results / "offline.csv")
    return "\n\n".join(["## Offline", *describe_offline(rows), origin(rows, "offline.csv", "../", "name")])


def origin(rows: list[Row], name: str, root: str, part: str) -> str:
    """Where the numbers of a file come from, and of which commit each `part` is, if they are of several.

    Args:
        rows: of the file.
        name: of the file.
        root: leads from the page to the root of the repository.
        part: the column that tells the parts apart.
    """
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        commits.setdefault("{date}, commit {commit}".format(**row), {})[row[part].partition(",")[0]] = None
    several = (f"{commit} for {', '.join(parts)}" for commit, parts in commits.items())
    told = "; ".join(several) if len(commits) > 1 else next(iter(commits))
    where = "({device}, driver {driver}, torch {torch}, triton {triton}, Python {python}; {told}; "
    text = where + "medians; [all rows]({root}benchmarks/results/{name}).)"
    return prose(text, name=name, root=root, told=told, **{column: rows[0][column] for column in COLUMNS})


def describe_kernels(rows: list[Row]) -> list[str]:
    """Tables of the first case of each quantity in full, then of repflow at all the others."""
    cases: dict[tuple[str, ...], Case] = {}
    for row in rows:
        cases.setdefault(tuple(row[column] for column in _CASE_COLUMNS), {})[row["implementation"]] = row
    depth = [case for key, case in cases.items() if key[0] == "depth and token sums"]
    hsic = [case for key, case in cases.items() if key[0] == "pairwise HSIC"]
    (product,) = next(case for key, case in cases.items() if key[0] == "matrix product").values()
    parts: list[str] = []
    if depth:
        parts += [prose(_DEPTH, size=size(depth[0]), rate=read_rate(depth[0])), depth_table(depth[0])]
    if hsic:
        edge = int(product["implementation"].removesuffix("³"))
        rate = 2 * edge**3 / float(product["ms"]) / 1e9
        parts.append(prose(_HSIC, size=size(hsic[0]), rate=rate, product=product["implementation"]))
        parts.append(hsic_table(hsic[0], [case for case in hsic if one(case)["input"] != "plain"]))
    similarity = [case for key, case in cases.items() if key[0] == "similarity gradient"]
    if similarity:
        parts += [prose(_SIMILARITY, size=size(similarity[0])), similarity_table(similarity[0])]
    others = [case for case in depth[1:] + hsic[1:] + similarity[1:] if one(case)["input"] in ("plain", "masked")]
    return [*parts, _SIZES, sizes_table(others)] if others else parts


def depth_table(case: Case) -> str:
    """All implementations of one case along depth."""
    return error_table(case, "error of cosines", "relative error of V, norms")


def similarity_table(case: Case) -> str:
    """All implementations of the gradient of the similarity of one state."""
    return error_table(case, "error of the similarity", "error of the gradient")


def error_table(case: Case, cosine: str, other: str) -> str:
    """All implementations of one case, with the errors that these two are called."""
    header = ("version", "ms", "× floor", "extra MiB", cosine, other)
    columns = ("cosine_error", "v_error")
    return markdown(
        header, ((*costs(case, name), *(error(row[kind]) for kind in columns)) for name, row in case.items())
    )


def hsic_table(case: Case, hard: list[Case]) -> str:
    """All implementations of one case of HSIC, with their errors on the `hard` ones too."""
    header = ("version", "ms", "× floor", "extra MiB", "error of CKA", *(one(other)["input"] for other in hard))
    body = (
        (*costs(case, name), *(error(other[name]["cka_error"]) if name in other else "–" for other in (case, *hard)))
        for name in case
    )
    return markdown(header, body)


def sizes_table(cases: list[Case]) -> str:
    """Where repflow stands in every one of `cases`."""
    header = (
        "quantity",
        "S, B, T, D",
        "dtype",
        "floor, ms",
        "repflow, ms",
        "× floor",
        "extra MiB",
        "as a CUDA graph, ms",
        "fastest other, ms",
    )
    body: list[tuple[str, ...]] = []
    for case in cases:
        first = one(case)
        label = first["quantity"] if first["input"] == "plain" else f"{first['quantity']}, {first['input']}"
        others = {
            name: float(row["ms"]) for name, row in case.items() if name != "floor" and not name.startswith("repflow")
        }
        best = min(others, key=others.__getitem__) if others else ""
        rival = f"{number(others[best])} ({_NAMES.get(best, best)})" if best else "–"
        shape = ", ".join(first[letter] for letter in "SBTD")
        ours = costs(case, "repflow")[1:] if "repflow" in case else ("–",) * 3
        graph = costs(case, "repflow, CUDA graph")[1] if "repflow, CUDA graph" in case else "–"
        body.append((label, shape, first["dtype"], costs(case, "floor")[1], *ours, graph, rival))
    return markdown(header, body)


def describe_overhead(rows: list[Row]) -> list[str]:
    """The table of the training steps, and the notes on its models."""
    header = ("model", "step", "ms", "overhead, %", "extra MiB", "buffer, MiB", "synchronisations", "CPU, µs")
    body: list[tuple[str, ...]] = []
    for row in rows:
        extra = f"{float(row['overhead_percent']):+.2f} ± {float(row['standard_error_percent']):.2f}"
        optional = (measured(row[column]) for column in ("extra_memory_mib", "buffer_mib", "syncs", "cpu_us"))
        model = f"{row['model']}, {row['layers']} blocks, {int(row['tokens_per_step']):,} tokens"
        body.append((model, row["variant"], measured(row["ms"]), "–" if row["variant"] == "bare" else extra, *optional))
    notes = dict.fromkeys(f"{row['model']}: {row['note']}." for row in rows if row["note"])
    return [prose(_OVERHEAD), markdown(header, body), *map(prose, notes)]


def describe_offline(rows: list[Row]) -> list[str]:
    """The table of extractions, with the notes on its models, and that of probes."""
    extractions, probes = ([row for row in rows if row["part"] == part] for part in ("extraction", "probes"))
    parts: list[str] = []
    if extractions:
        header = ("model", "samples", "variant", "tokens/s", "% of the bare forward", "budget, %")
        body: list[tuple[str, ...]] = []
        for row in extractions:
            share, low, high = (f"{float(row[f'percent_{kind}']):.1f}" for kind in ("of_bare", "low", "high"))
            model = f"{row['name']}, {int(row['states']) - 1} blocks"
            samples = f"{row['samples']} × {int(row['tokens']):,} tokens"
            percent = "–" if row["variant"] == "bare" else f"{share} ({low} to {high})"
            body.append(
                (model, samples, row["variant"], measured(row["tokens_per_second"]), percent, measured(row["budget"]))
            )
        notes = dict.fromkeys(f"{row['name']}: {row['note']}." for row in extractions if row["note"])
        parts += [prose(_EXTRACTION, runs=extractions[0]["runs"]), markdown(header, body), *map(prose, notes)]
    if probes:
        names = ("states", "seeds", "samples", "features", "classes", "epochs")
        body = [(*(f"{int(row[name]):,}" for name in names), measured(row["seconds"])) for row in probes]
        parts += [prose(_PROBES), markdown((*names, "seconds"), body)]
    return parts


def one(case: Case) -> Row:
    """Any row of `case`: they agree in the columns that describe it."""
    return next(iter(case.values()))


def size(case: Case) -> str:
    """S, B, T, D and dtype in words."""
    row = one(case)
    states = "1 state" if row["S"] == "1" else f"{row['S']} states"
    return f"{states} of {row['B']} × {row['T']} tokens, {row['D']} features, {row['dtype']}"


def read_rate(case: Case) -> float:
    """TB/s of the floor, which reads all states once."""
    row = case["floor"]
    elements = math.prod(int(row[letter]) for letter in "SBTD")
    return elements * (4 if row["dtype"] == "float32" else 2) / float(row["ms"]) / 1e9


def costs(case: Case, name: str) -> tuple[str, str, str, str]:
    """Name, milliseconds, multiple of the floor, and extra memory of one implementation."""
    if name not in case:
        return _NAMES.get(name, name), "–", "–", "–"
    row = case[name]
    multiple = number(float(row["ms"]) / float(case["floor"]["ms"])) if "floor" in case else "–"
    return _NAMES.get(name, name), measured(row["ms"]), multiple, measured(row["memory_mib"])


def prose(text: str, **values: object) -> str:
    """`text` with its values filled in, in lines of at most 120 characters."""
    return textwrap.fill(text.format(**values), 120, break_long_words=False, break_on_hyphens=False)


def number(value: float) -> str:
    """Three significant digits, or all that are before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measured(text: str) -> str:
    """`number` of a cell; a dash for an empty one."""
    return number(float(text)) if text else "–"


def error(text: str) -> str:
    """One or two significant digits; a dash for what was not measured."""
    return "–" if not text else f"{float(text):.0e}" if float(text) < 1e-3 else f"{float(text):.2g}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = tuple(header)
    lines = [header, ("---",) * len(header), *map(tuple, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
