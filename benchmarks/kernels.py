"""The kernels of repflow against their floors, their float64 reference, plain PyTorch and public packages.

Every implementation runs on two fresh inputs, and each result is compared with the float64 reference of the same input.
repflow must keep its tolerances, or no time of it is shown; of the others, the largest error stands beside the time.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

import _cases
import _depth
import _hsic
import _similarity
import torch
from _cases import Case
from _measure import Product, Run, Timing, run_once, time_call
from _provenance import ROOT, write_rows
from torch import Tensor

RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
SEEDS = (0, 1)
SUITES: dict[str, tuple[ModuleType, list[Case], list[Case]]] = {
    "depth": (_depth, _cases.DEPTH, _cases.QUICK_DEPTH),
    "hsic": (_hsic, _cases.HSIC, _cases.QUICK_HSIC),
    "similarity": (_similarity, _cases.SIMILARITY, _cases.QUICK_SIMILARITY),
}

Row = dict[str, object]
Value = TypeVar("Value")


class Checked(NamedTuple):
    """An implementation on the last input, its run there, and its largest errors over all inputs."""

    call: Callable[[], object]
    run: Run
    errors: dict[str, float]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try everything out, also without a GPU")
    parser.add_argument("--only", default=",".join(SUITES), help="parts, separated by commas (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"CSV to write (default: {RESULTS.relative_to(ROOT)})")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(SUITES):
        parser.error(f"--only: expected some of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    if not options.quick and options.out is None:
        options.out = RESULTS
    return options


@torch.no_grad()
def main() -> int:
    """Measure what the command line asks for; 0 if every case gave checked times of repflow and of its floor."""
    options = parse()
    if not torch.cuda.is_available():
        if not options.quick:
            sys.exit("kernels.py needs a CUDA GPU and found none; --quick tries everything out on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which it is not yet
        print("No GPU: Triton's interpreter runs the kernels, and the times tell nothing.")
    from _floors import square_product

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    product = square_product(128 if options.quick else 8192, device)
    labels = {"quantity": "matrix product", **dict.fromkeys("SBTD"), "dtype": "bfloat16", "input": "random"}
    rows = [row(labels, f"{product.size}³", product.time)]
    chosen = [SUITES[name] for name in options.only]
    cases = [(suite, case) for suite, full, quick in chosen for case in (quick if options.quick else full)]
    for suite, case in cases:
        rows += attempt("this case", lambda *given: list(measure(*given)), suite, case, product, device) or []
        if options.out:  # after every case, so that a run cut short leaves what it measured
            write_rows(options.out, rows)
        print(f"  {time.perf_counter() - start:.0f} s since the start", flush=True)
    missing = 2 * len(cases) - sum(entry["implementation"] in ("floor", "repflow") for entry in rows)
    print(f"\n{len(rows)} rows, {f'written to {options.out}' if options.out else 'not written'}")
    if missing:
        print(f"FAILED: {missing} checked times of repflow or of its floor are missing, in {len(cases)} cases")
    return int(missing > 0)


def measure(suite: ModuleType, case: Case, product: Product, device: torch.device) -> Iterator[Row]:
    """Rows of one case: its floor, and every implementation that ran and was checked."""
    labels = {"quantity": suite.QUANTITY, **case.columns()}
    print(f"\n{', '.join(map(str, labels.values()))}", flush=True)
    states, checked = check(suite, case, device)
    if floor := attempt("floor", suite.floor, case, states, product):
        yield row(labels, "floor", floor)
    tolerances = suite.tolerances(case)
    for name, (call, run, errors) in checked.items():
        if name.startswith("repflow") and not all(errors[kind] <= allowed for kind, allowed in tolerances.items()):
            print(f"  {name}: no time is shown, for it is wrong: {errors}, allowed {tolerances}")
        elif timing := attempt(name, time_call, call, run.ms, device):
            yield row(labels, name, timing, run.memory_mib, errors)


def check(suite: ModuleType, case: Case, device: torch.device) -> tuple[Tensor, dict[str, Checked]]:
    """The last input, and every implementation that ran on all inputs and whose errors are known."""
    checked: dict[str, Checked] = {}
    states = torch.empty(0)
    for seed in SEEDS:
        states, mask = case.make(seed, device)
        calls = suite.calls(case, states, mask)
        truth = run_once(calls["reference"], device)
        checked["reference"] = Checked(calls.pop("reference"), truth, {})
        for name, call in calls.items():
            before = checked.pop(name, None)
            run = attempt(name, run_once, call, device) if before or seed == SEEDS[0] else None
            if run:
                errors = suite.errors(run.result, truth.result)
                worst = {kind: max(error, before.errors[kind]) if before else error for kind, error in errors.items()}
                checked[name] = Checked(call, Run(None, run.ms, run.memory_mib), worst)
    return states, checked


def row(
    labels: Row, name: str, timing: Timing, memory_mib: float | None = None, errors: dict[str, float] | None = None
) -> Row:
    """One row of results, which is printed too."""
    entry = {**labels, "implementation": name, **timing.columns(), "memory_mib": memory_mib}
    entry |= {kind: (errors or {}).get(kind) for kind in ("cosine_error", "v_error", "cka_error")}
    memory = "" if memory_mib is None else f"{memory_mib:10.1f} MiB"
    shown = " ".join(f"{kind}={error:.1e}" for kind, error in (errors or {}).items())
    print(f"  {name:32}{timing.ms:12.4f} ms{memory}  {shown}", flush=True)
    return {**entry, "checked": "yes"}


def attempt(name: str, function: Callable[..., Value], *arguments: object) -> Value | None:
    """What the function returns, or None and a line that says why there is nothing."""
    try:
        return function(*arguments)
    except Exception as error:
        print(f"  {name} is left out: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}")
        return None


if __name__ == "__main__":
    sys.exit(main())
