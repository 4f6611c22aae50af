"""Show result folders as one HTML page that needs no network.

    python eval/report.py results/dev6 --out report.html
    python eval/report.py results/*/ runs/mine --out report.html --figures figures/

A folder holds the result.json of a measurement, or the train.json of a head (also in `head` and
`reference`). --figures writes every drawing as PNG and PDF for a paper.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adaspec_eagle.errors import command_line, run_main
from adaspec_eagle.record import write_text
from adaspec_eagle.report import write_report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="folders with results or heads")
    add(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s"
    )
    add("--figures", type=Path, metavar="DIR", help="also write the figures as PNG and PDF there")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    args = parser().parse_args(argv)
    write_text(args.out, write_report(args.folders, args.figures))
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
