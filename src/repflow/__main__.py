"""`python -m repflow` is the `repflow` command."""

from repflow.monitor.cli import app

if __name__ == "__main__":
    app(prog_name="repflow")
