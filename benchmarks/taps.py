"""What a tap that is not armed costs: a call of its operator, and a compiled training step that has taps in its graph.

The step is timed with and without taps, in turns in the same process, each compiled as a whole. Prints; writes nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from _models import QUICK_SHAPES, SHAPES, Training
from _steps import difference, quantile, time_steps

CALLS = 20_000


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, also without a GPU")
    parser.add_argument("--mode", choices=["default", "reduce-overhead"], default="default", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=24, help="steps of each variant")
    return parser.parse_args()


def main() -> int:
    """Measure; 0 if taps were in the graph and read it when armed."""
    options = parse()
    if not torch.cuda.is_available():
        if not options.quick:
            sys.exit("taps.py needs a CUDA GPU and found none; --quick tries everything out on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"
    from repflow.monitor import Monitor, MonitorConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"one call of a disarmed operator: {call_us(device):.2f} µs of the host")
    shape = (QUICK_SHAPES if options.quick else SHAPES)[0]
    bare, tapped = Training(shape, device), Training(shape, device)
    # On a CPU the traced graph runs as it is, so that nothing is built with a C++ compiler.
    how = {"mode": options.mode} if device.type == "cuda" else {"backend": "eager"}
    for training in (bare, tapped):
        training.model.compile(**how)
    monitor = Monitor(tapped.model, MonitorConfig(every_n_steps=10**9))
    steps: dict[str, Callable[[], None]] = {"bare": bare.step, "taps": lambda: tapped.step(1, monitor.step)}
    # Otherwise the graph of the model without hooks would serve both.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    time_steps(steps, 3, device)
    times = time_steps(steps, options.rounds, device)
    extra, error = difference(times["taps"], times["bare"])
    base = quantile(times["bare"], 0.5)
    print(
        f"{shape.name}, {shape.layers} blocks, compiled with {how}: a step of {base:.3f} ms takes "
        f"{1e3 * extra:+.1f} ± {1e3 * error:.1f} µs with {shape.layers + 1} disarmed taps ({100 * extra / base:+.3f} %)"
    )
    tapped.step(0, monitor.step)
    monitor.flush()
    return int(monitor.latest is None)


def call_us(device: torch.device) -> float:
    """Microseconds of a call of the operator, by itself."""
    state, marker, order = torch.zeros(1, 1, 1, device=device), torch.tensor([-1]), torch.zeros(1)
    tap = torch.ops.repflow.tap_state.default
    for warm_up in (True, False):
        start = time.perf_counter()
        for _ in range(CALLS):
            tap(state, True, marker, order)
        if not warm_up:
            return 1e6 * (time.perf_counter() - start) / CALLS
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
