"""The first lines of the `kvasir-operator` program."""

import sys


def main() -> None:
    """Run the command line (`kvasir_operator/__main__.py`), or say what this installation lacks for it."""
    from kvasir_engine.extras import explain

    try:
        from kvasir_operator.__main__ import main as run
    except ModuleNotFoundError as error:
        missing = explain(error, "operator")
        if missing is None:
            raise
        sys.stderr.write(f"kvasir-operator: error: {missing}\n")
        sys.exit(2)
    run()
