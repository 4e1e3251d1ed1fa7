"""What the monitor costs a training step: the bare step against a monitored one, in turns in the same process.

Variants: "bare"; "between", a monitor is attached and the step is not sampled; "sampled", every step is, with the
default budget of tokens; "every 50th". Before anything is timed, a sampled step is compared with the float64 reference
of the same states, and no row is written unless all of it is within the tolerances.
"""

import argparse
import gc
import os
import sys
import time
import traceback
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import torch
from _models import QUICK_SHAPES, SHAPES, Shape, Training
from _provenance import ROOT, write_rows
from _steps import CpuTime, Step, count_syncs, cpu_time, difference, mean_difference, peak_mib, quantile, time_steps

RESULTS = ROOT / "benchmarks" / "results" / "overhead.csv"
VARIANTS = ("bare", "between", "sampled")
EVERY = 50
CPU_ROUNDS = 100
LONG_PAIRS = 2 * EVERY
"""Pairs of a bare and a monitored step, in which every 50th is sampled."""
RESOLVED_PERCENT = 0.1
"""The measured run counts if its overhead is known to half of this, at two standard errors."""

Row = dict[str, object]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", "--tiny", action="store_true", help="tiny models, also without a GPU")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--rounds", type=int, help="steps of each variant (default: 24, with --quick 3)")
    parser.add_argument("--long-seconds", type=float, default=60, help="longest run to measure every 50th step in")
    parser.add_argument("--out", type=Path, help=f"where the rows go (default: {RESULTS.relative_to(ROOT)})")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 24)
    if not options.quick and options.out is None:
        options.out = RESULTS
    return options


def main() -> int:
    """Measure every model; 0 if each gave checked rows."""
    options = parse()
    if not torch.cuda.is_available():
        if not options.quick:
            sys.exit("overhead.py needs a CUDA GPU and found none; --quick tries everything out on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which it is not yet
        print("No GPU: Triton's interpreter runs the kernels, and the times tell nothing.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [shape for shape in (QUICK_SHAPES if options.quick else SHAPES) if (options.only or "") in shape.name]
    rows: list[Row] = []
    start, failed = time.perf_counter(), 0
    for shape in shapes:
        print(f"\n{shape.name}, {shape.rows * shape.tokens} tokens per step", flush=True)
        try:
            rows += measure(shape, options, device)
            if options.out:
                write_rows(options.out, rows)
        except Exception:
            failed += 1
            traceback.print_exc()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {time.perf_counter() - start:.0f} s since the start", flush=True)
    print(f"\n{len(rows)} rows, {f'written to {options.out}' if options.out else 'not written'}")
    return int(failed > 0 or not rows)


def measure(shape: Shape, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows of one model.

    Raises:
        RuntimeError: the monitored step differs from the reference by more than is allowed, or monitoring stopped.
    """
    from _check import Reference

    from repflow.monitor import Monitor, MonitorConfig
    from repflow.triton_kernels._dispatch import force

    training = Training(shape, device)
    memory = {"bare": peak_mib(training.step, device)}
    intervals = {"between": 10**9, "sampled": 1, "every 50th": EVERY}
    monitors = {name: Monitor(training.model, MonitorConfig(every_n_steps=n)) for name, n in intervals.items()}
    steps: dict[str, Step] = {"bare": training.step}
    for name, monitor in monitors.items():
        numbers = count(1)
        steps[name] = lambda numbers=numbers, monitor=monitor: training.step(next(numbers), monitor.step)
    single = {name: steps[name] for name in VARIANTS}
    with force("triton") if device.type == "cpu" else nullcontext():
        memory["between"] = peak_mib(steps["between"], device)  # before the first sampled step, which takes the buffer
        reference = Reference(monitors["sampled"])
        steps["sampled"]()
        shared: Row = {"error_share_of_tolerance": worst(reference.compare()), "checked": "yes"}
        memory["sampled"] = peak_mib(steps["sampled"], device)
        syncs = {name: count_syncs(step, device) for name, step in single.items()}
        if syncs["bare"] is not None and any((syncs[name] or 0) > syncs["bare"] for name in single):
            raise RuntimeError(f"expected no more synchronisations than the bare step has, got {syncs}")
        shared["buffer_mib"] = monitors["sampled"]._capture.buffer.nbytes / 2**20
        times = time_steps(single, options.rounds, device)
        rare = every_50th(times, steps, options, device)
    for monitor in monitors.values():
        if not monitor.enabled or monitor._metrics != monitor.config.metrics:
            raise RuntimeError("expected monitoring to go on, but some of it stopped: the warning above says why")
        monitor.close()
    cpu = cpu_time(shape.layers, MonitorConfig(every_n_steps=1), 3 if options.quick else CPU_ROUNDS, device)
    rows = [describe(name, times, memory, syncs, cpu) for name in single]
    return [show({**shape.columns(), **row, **shared}) for row in (*rows, rare)]


def worst(errors: dict[str, float]) -> float:
    """The largest share of what is allowed.

    Raises:
        RuntimeError: it is above 1.
    """
    print("  error/allowed: " + ", ".join(f"{name} {share:.2g}" for name, share in errors.items()), flush=True)
    wrong = [name for name, share in errors.items() if not share <= 1]
    if wrong:
        raise RuntimeError(f"no time is shown, for these differ from the reference: {', '.join(wrong)}")
    return max(errors.values())


def describe(
    name: str,
    times: dict[str, list[float]],
    memory: dict[str, float | None],
    syncs: dict[str, int | None],
    cpu: CpuTime,
) -> Row:
    """What was measured of one variant."""
    bare = quantile(times["bare"], 0.5)
    extra, error = difference(times[name], times["bare"])
    peak, base = memory[name], memory["bare"]
    return {
        "variant": name, "ms": quantile(times[name], 0.5), "ms_p20": quantile(times[name], 0.2),
        "ms_p80": quantile(times[name], 0.8), "overhead_percent": 100 * extra / bare,
        "standard_error_percent": 100 * error / bare, "steps": len(times[name]),
        "how": "median of differences within a round", "syncs": syncs[name],
        "extra_memory_mib": None if peak is None or base is None else peak - base,
        "cpu_us": {"sampled": cpu.sampled, "between": cpu.between}.get(name),
        "cpu_hooks_us": cpu.hooks if name == "sampled" else None,
    }  # fmt: skip


def every_50th(
    times: dict[str, list[float]], steps: dict[str, Step], options: argparse.Namespace, device: torch.device
) -> Row:
    """The overhead when every 50th step is sampled: of a run, if that can tell, or from the single steps."""
    bare = quantile(times["bare"], 0.5)
    row: Row = {"variant": f"every {EVERY}th"}
    pairs = 3 if options.quick else LONG_PAIRS
    if 2 * pairs * bare <= 1e3 * options.long_seconds:
        run = time_steps({name: steps[name] for name in ("bare", "every 50th")}, pairs, device)
        extra, error = mean_difference(run["every 50th"], run["bare"])
        extra, error = 100 * extra / bare, 100 * error / bare
        print(f"  run of {pairs} pairs: {extra:+.3f} % ± {error:.3f}", flush=True)
        if 2 * error <= RESOLVED_PERCENT / 2:
            return row | {"overhead_percent": extra, "standard_error_percent": error, "steps": pairs, "how": "a run"}
    idle, idle_error = difference(times["between"], times["bare"])
    sampled, sampled_error = difference(times["sampled"], times["between"])
    error = (idle_error**2 + (sampled_error / EVERY) ** 2) ** 0.5
    return row | {
        "overhead_percent": 100 * (sampled / EVERY + idle) / bare, "standard_error_percent": 100 * error / bare,
        "steps": len(times["sampled"]), "how": f"(sampled − between)/{EVERY} + between − bare",
    }  # fmt: skip


def show(row: Row) -> Row:
    """Print a row in short."""
    parts = [f"{name}={row[name]:.4g}" for name in row if isinstance(row[name], float)]
    print(f"  {row['variant']:12}" + " ".join([*parts, f"syncs={row.get('syncs')}", f"[{row['how']}]"]), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
