"""Regenerate the tables of README.md and docs/results.md from the records under results/.

    python eval/tables.py             rewrite what stands between the markers
    python eval/tables.py --check     exit status 1 if a page is out of date

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`, where NAME is a folder under
results/ (its result.json is read); of a speed-up `NAME/files` gives the table by prompt file,
`NAME/methods` that of the arms beside the baselines, and `NAME/brief` the same without its command.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adaspec_eagle import speed_tables
from adaspec_eagle.acceptance import HEADER, table_rows
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.figures import headline
from adaspec_eagle.record import markdown_table, write_text

PAGES = [Path("README.md"), Path("docs/results.md")]
PAGES += [
    Path(f"heads/pretrained/smollm2-135m-{name}/README.md") for name in ("eagle3", "eagle3-long")
]
LAST_COLUMN = {
    "generate": "Last column: lossless or not, answers identical to `generate`'s, and how far the "
    "logit of an emitted token lies below the largest at most, where it is not zero.",
    "loop": "Last column: answers identical to `loop`'s, which draws with the same random numbers.",
}  # by what answers were compared with
MARKED = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    made.add_argument("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE",
                      help=f"default: {' '.join(map(str, PAGES))}")  # fmt: skip
    made.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    made.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the pages."""
    args = parser().parse_args(argv)
    status = 0
    for page in args.pages:
        if not page.is_file():
            raise UserError(f"{page} does not exist; name the files with --pages")
        before = page.read_text(encoding="utf-8")
        if before.count("<!-- table:") != len(MARKED.findall(before)):
            raise UserError(f"{page}: a `<!-- table:NAME -->` has no `<!-- /table -->` after it")
        after = updated(page, before, args.results)
        if args.check and after != before:
            print(f"{page} is out of date: run python eval/tables.py")
            status = 1
        elif after != before:
            write_text(page, after)
    return status


def updated(page: Path, text: str, results: Path) -> str:
    """A page's text with its tables made again."""
    told: set[str] = set()

    def made(found: re.Match) -> str:
        return f"{found[1]}{section(page.parent, results, found[2], told)}\n{found[3]}"

    return MARKED.sub(made, text)


def section(here: Path, results: Path, name: str, told: set[str]) -> str:
    """A table and the line that says where it comes from, which `told` records have had."""
    folder, _, view = name.partition("/")
    path = results / folder / "result.json"
    if not path.is_file():
        raise UserError(f"table {name}: {path} does not exist")
    result = json.loads(path.read_text(encoding="utf-8"))
    key = f"{result.get('kind')}{'/' if view else ''}{view}"
    if key not in VIEWS:
        raise UserError(f"table {name}: no view for {key!r}; there are {', '.join(VIEWS)}")
    link = f"[`{path.as_posix()}`]({Path(os.path.relpath(path, here)).as_posix()})"
    source = "From the same record." if folder in told else source_line(link, view, result)
    told.add(folder)
    return f"{VIEWS[key](result)}\n\n{source}"


def source_line(link: str, view: str, result: dict[str, Any]) -> str:
    """File, command, commit and machine: what makes the figures above quotable."""
    where = result["environment"]
    git = where["git"] or {"commit": "unknown", "dirty": False}
    commit = git["commit"][:10] + (" with local changes" if git["dirty"] else "")
    machine = where["cuda"] or f"{where['cpu']}, {where['threads']} threads"
    torch, transformers = (where["packages"][name] for name in ("torch", "transformers"))
    command = "" if view == "brief" else f"`python {shlex.join(where['argv'])}`; "
    return (
        f"From {link}: {command}commit {commit}; {machine}; torch {torch}, transformers "
        f"{transformers}. Brackets: 95 % bootstrap intervals over prompts."
    )


def speedup(result: dict[str, Any]) -> str:
    """Rows are figures, columns are arms."""
    arms = result["arms"]
    rows = speed_tables.figure_rows(result)
    shapes = {key: arm["shape"] for key, arm in arms.items()}
    header = ["", *(f"{key} ({shape})" if shape else key for key, shape in shapes.items())]
    return f"{markdown_table(header, rows)}\n\n{headline(arms)['sentence']}"


def speedup_files(result: dict[str, Any]) -> str:
    """Rows are prompt files: speed-up over generate / over loop, tau."""
    drafting = [key for key, arm in result["arms"].items() if arm["shape"]]
    header = ["prompts", "n", "generate tokens/s", *drafting]
    table = markdown_table(header, speed_tables.file_rows(result, drafting))
    return f"{table}\n\nCells: speed-up over generate / over loop, acceptance length tau."


def speedup_methods(result: dict[str, Any]) -> str:
    """Rows are arms, those that lack something last."""
    return (
        f"{speedup_brief(result)}\n\n{'; '.join(speed_tables.baseline_lines(result['baselines']))}"
    )


def speedup_brief(result: dict[str, Any]) -> str:
    """The same without what the baselines are."""
    table = markdown_table(speed_tables.METHOD_COLUMNS, speed_tables.method_rows(result))
    return f"{table}\n\n{LAST_COLUMN[speed_tables.matched_with(result)]}"


def acceptance(result: dict[str, Any]) -> str:
    """Rows are tasks."""
    return markdown_table(HEADER, table_rows(result))


def lossless(result: dict[str, Any]) -> str:
    """Rows are the ways of drafting."""
    header = [
        "draft",
        "dtype",
        "equal to generate",
        "tokens rescored",
        "of them maximum",
        "gap p99",
    ]
    rows = []
    for mode in result["modes"].values():
        facts = mode["rescored"] or {}
        cells = [f"{facts[k]:{form}}" if facts else "-" for k, form in GAP_FIGURES.items()]
        dtype, equal = result["target"]["dtype"], f"{mode['matched']}/{mode['total']}"
        rows.append([mode["shape"], dtype, equal, *cells])
    return markdown_table([*header, "gap, largest"], rows)


GAP_FIGURES = {"tokens": "d", "match": ".2%", "gap_p99": ".3g", "gap_max": ".3g"}
VIEWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "speedup": speedup,
    "speedup/files": speedup_files,
    "speedup/methods": speedup_methods,
    "speedup/brief": speedup_brief,
    "acceptance": acceptance,
    "lossless": lossless,
}

if __name__ == "__main__":
    sys.exit(run_main(main))
