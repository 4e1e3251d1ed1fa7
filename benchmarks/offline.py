"""What offline analysis costs: extraction beside the bare forward pass in turns, and the training of probes.

Extraction is timed as a whole, from the call to the last file. Variants: "bare", the same batches through the model
alone; "without CKA"; "with CKA"; the latter two keep last-token features. Before anything is timed, an extraction is
compared with the float64 reference of the same states. Probes are timed from features in host memory to accuracies,
and some of them are trained again, each by itself and in float64. No row is written unless all of it is within the
tolerances.
"""

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded; read when transformers is imported

import torch
from _extraction import CASES as EXTRACTIONS
from _extraction import QUICK_CASES as QUICK_EXTRACTIONS
from _extraction import measure_extraction
from _probes import CASES as PROBES
from _probes import QUICK_CASES as QUICK_PROBES
from _probes import measure_probes
from _provenance import ROOT, write_rows

RESULTS = ROOT / "benchmarks" / "results" / "offline.csv"
Row = dict[str, object]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", "--tiny", action="store_true", help="tiny models, also without a GPU")
    parser.add_argument("--only", help="what has a name that contains this: a model, or 'probes'")
    parser.add_argument("--rounds", type=int, help="runs of each variant (default: 5, with --quick 1)")
    parser.add_argument("--out", type=Path, help=f"where the rows go (default: {RESULTS.relative_to(ROOT)})")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    if not options.quick and options.out is None:
        options.out = RESULTS
    return options


def main() -> int:
    """Measure everything; 0 if each gave checked rows."""
    options = parse()
    if not torch.cuda.is_available():
        if not options.quick:
            sys.exit("offline.py needs a CUDA GPU and found none; --quick tries everything out on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which it is not yet
        print("No GPU: Triton's interpreter runs the kernels, and the times tell nothing.")
    rows: list[Row] = []
    failed = 0
    for name, measure in parts(options).items():
        if (options.only or "") not in name:
            continue
        print(f"\n{name}", flush=True)
        try:
            rows += [show(row) for row in measure()]
            if options.out:
                write_rows(options.out, rows)
        except Exception:
            failed += 1
            traceback.print_exc()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"\n{len(rows)} rows, {f'written to {options.out}' if options.out else 'not written'}")
    return int(failed > 0 or not rows)


def parts(options: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """What gives the rows of each case, by its name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Callable[[], list[Row]]] = {}
    for model in QUICK_EXTRACTIONS if options.quick else EXTRACTIONS:
        found[model.name] = lambda case=model: measure_extraction(case, options.rounds, device)
    for probes in QUICK_PROBES if options.quick else PROBES:
        found[probes.name] = lambda case=probes: [measure_probes(case, options.rounds, device)]
    return found


def show(row: Row) -> Row:
    """Print a row."""
    if row["part"] == "extraction":
        text = (
            f"  {row['variant']:12} {row['tokens_per_second']:12,.0f} tokens/s  {row['percent_of_bare']:6.1f} % "
            f"({row['percent_low']:.1f} to {row['percent_high']:.1f}) of the bare forward"
        )
    else:
        text = f"  {row['seconds']:.2f} s, {row['memory_mib'] or 0:,.0f} MiB"
    print(text, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
