"""Measure the committed tables again, from the heads that ship, and compare the acceptance.

    python eval/reproduce.py --data-root DIR                 what `make paper-table` runs
    python eval/reproduce.py --data-root DIR --minutes 2     on fewer prompts

The same prompts, head, dtype, arms and trees as in the record; trees "auto" are chosen by the
recorded costs, since those of this machine would give others. Questions of EAGLE's sets are found
by their hash in files of either layout (see `suites.py`); other files must be the record's. For
each arm that drafts, tau must lie in the record's bootstrap interval over the same prompts: the
exit status is 0 if all do, else 1. Times are shown and not compared.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from adaspec_eagle.auto import Costs
from adaspec_eagle.bench import Bench, Source, describe_bench, make_prompt, open_bench, texts_sha256
from adaspec_eagle.compiled import check_compiler
from adaspec_eagle.data import Prompt, read_prompts
from adaspec_eagle.draft import Auto
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.figures import measured_figures, total
from adaspec_eagle.measure import Arm, Unit, build_arms, decode, run_arms
from adaspec_eagle.record import bootstrap_ratio, one_line, sha256, with_interval, write_json
from adaspec_eagle.speed_tables import terminal_table
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.storage import read_json, weights_file
from adaspec_eagle.suites import SUITES, PromptSet, local_file, read_questions
from adaspec_eagle.targets import Target, default_device

EAGLE_SETS = {one.files[0]: one for one in SUITES["eagle"].sets}
PAGES = [Path("README.md"), Path("docs/results.md")]
NAMED = re.compile(r"<!-- table:([^\s/]+)")
WARM_UP = 1.25  # of the recorded time, for what is not recorded


@dataclass(frozen=True)
class Plan:
    """What of a record is measured again: so many prompts of each file."""

    name: str
    record: dict[str, Any]
    limit: int

    @property
    def whole(self) -> bool:
        """Whether that is all of the record."""
        return self.limit >= max(source["prompts"] for source in self.record["prompts"])

    @property
    def units(self) -> list[dict[str, Any]]:
        """The record's counts of these prompts."""
        return chosen_units(self.record, self.limit)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("--data-root", type=Path, required=True, metavar="DIR",
        help="folder with the prompt files that the records name")  # fmt: skip
    add("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE",
        help=f"with the tables; default: {' '.join(map(str, PAGES))}")  # fmt: skip
    add("--results", type=Path, default="results", help="the records; default: %(default)s")
    add("--minutes", type=float, default=50, help="for each record, by the speed of the machine "
        "that made it; fewer prompts where it took longer; default: %(default)s")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder for result.json")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and compare record after record."""
    args = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    plans = make_plans(args, console)
    found = [reproduce(plan, args, console) for plan in plans]
    agrees = all(one["agrees"] for one in found)
    result = {"kind": "reproduction", "agrees": agrees, "records": found}
    if args.out:
        write_json(args.out / "result.json", result)
    console.print("acceptance agrees" if agrees else "acceptance does NOT agree", style="bold")
    print(one_line({"agrees": agrees, "records": [brief(one) for one in found]}))
    return 0 if agrees else 1


def make_plans(args: argparse.Namespace, console: Console) -> list[Plan]:
    """The pages' records whose heads are at hand; UserError where a prompt file is missing."""
    if not args.data_root.is_dir():
        raise UserError(f"--data-root {args.data_root} is no folder")
    for page in args.pages:
        if not page.is_file():
            raise UserError(f"{page} does not exist; name the files with --pages")
    plans = []
    text = "\n".join(page.read_text(encoding="utf-8") for page in args.pages)
    for name in dict.fromkeys(NAMED.findall(text)):
        record = read_json(args.results / name / "result.json")
        why = unfit(record)
        if why:
            console.print(f"{name}: not measured, {why}", markup=False)
            continue
        plans.append(Plan(name, record, affordable(record, 60 * args.minutes / WARM_UP)))
        check_files(plans[-1], args.data_root)
    if not plans:
        raise UserError(f"no table of {' '.join(map(str, args.pages))} can be measured again")
    return plans


def unfit(record: dict[str, Any]) -> str | None:
    """Why a record cannot be measured again; None if it can."""
    if record["kind"] != "speedup":
        return f"it is a record of kind {record['kind']}"
    folder = Path(record["head"]["folder"])
    if not (folder / "config.json").is_file():
        return f"its head {folder} does not ship"
    if sha256(weights_file(folder)) != record["head"]["sha256"]:
        return f"its head {folder} has changed since"
    if record["arguments"].get("compile"):
        try:
            check_compiler(default_device())
        except UserError as error:
            return str(error)
    return None


def affordable(record: dict[str, Any], seconds: float) -> int:
    """The most prompts of each file that took no longer than that, at least a batch of them."""
    most = max(source["prompts"] for source in record["prompts"])
    batch = max(len(unit["ids"]) for unit in record["per_prompt"])
    whole = [*range(batch, most, batch), most]  # a batch is measured as one

    def took(limit: int) -> float:
        runs = [run for unit in chosen_units(record, limit) for run in unit["arms"].values()]
        return sum(sum(run["seconds"].values()) for run in runs)

    return max((n for n in whole if took(n) <= seconds), default=whole[0])


def chosen_units(record: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """The record's units of the first `limit` prompts of each file."""
    seen: dict[str, int] = {}
    chosen = []
    for unit in record["per_prompt"]:
        seen[unit["file"]] = seen.get(unit["file"], 0) + len(unit["ids"])
        if seen[unit["file"]] <= limit:
            chosen.append(unit)
    return chosen


def check_files(plan: Plan, root: Path) -> None:
    """UserError that lists what is missing under the data root, or other than in the record."""
    wrong = []
    for source in plan.record["prompts"]:
        try:
            recorded_prompts(plan, source, root)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        lines = "\n  ".join(wrong)
        raise UserError(
            f"table {plan.name} needs prompts that --data-root {root} does not have:\n  {lines}\n"
            "EAGLE's questions are those of its repository (SafeAILab/EAGLE, eagle/data)"
        )


def recorded_prompts(plan: Plan, source: dict[str, Any], root: Path) -> tuple[Path, list[Prompt]]:
    """A source's file under the root and the plan's prompts of it, their first turns only.

    Raises UserError where the file is missing or its prompts are not the record's.
    """
    name = Path(source["file"]).name
    one = EAGLE_SETS.get(name, PromptSet(name, name, (name,), ""))
    path = local_file(one, root)
    if path is None:
        raise UserError(f"{' or '.join(one.files)}: missing")
    if name not in EAGLE_SETS:
        if sha256(path) != source["sha256"]:
            raise UserError(f"{path.name}: another file than the record's (sha256 differs)")
        return path, read_prompts(path, plan.limit)
    there = {texts_sha256(prompt["messages"]): prompt for prompt in read_questions(path, one)}
    units = [unit for unit in plan.units if unit["file"] == source["file"]]
    asked = [pair for u in units for pair in zip(u["ids"], u["sha256"], strict=True)]
    lost = [key for key, digest in asked if digest not in there]
    if lost:
        raise UserError(f"{path}: no question has the text (sha256) of the record's {lost[0]}")
    return path, [{**there[digest], "later": []} for _, digest in asked]


def reproduce(plan: Plan, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure one record again and show both."""
    record = plan.record
    count = sum(len(unit["ids"]) for unit in plan.units)
    which = "all" if plan.whole else f"a subset, the first {plan.limit} of each file:"
    console.print(f"{plan.name}: {which} {count} prompts", markup=False)
    given = {"dtype": record["target"]["dtype"], "limit": plan.limit, "out": args.out}
    given["head"] = record["head"]["folder"]
    settings = argparse.Namespace(**record["arguments"] | given)
    bench = open_bench(settings, partial(sources, plan, args.data_root))
    bench = replace(
        bench,
        compiled=bool(record["arguments"].get("compile")),
        temperature=record.get("temperature") or 0.0,  # records of before could not be sampled
    )
    arms = recorded_arms(bench, record)
    units = run_arms(bench, arms, "measuring")
    compared = compare(plan, arms, units, bench.seed)
    console.print(shown(plan, compared))
    return {
        "name": plan.name,
        "agrees": all(one["agrees"] for one in compared.values()),
        "prompts_measured": count,
        "whole": plan.whole,
        "compared": compared,
        **describe_bench(bench, settings),
        **measured_figures(bench, arms, units),
    }


def sources(plan: Plan, root: Path, settings: argparse.Namespace, target: Target) -> list[Source]:
    """The plan's prompts, file by file."""
    made = []
    for source in plan.record["prompts"]:
        path, found = recorded_prompts(plan, source, root)
        name = str(path)
        prompts = [make_prompt(one, name, target, settings.max_new_tokens) for one in found]
        made.append(Source(name, sha256(path), prompts))
    return made


def recorded_arms(bench: Bench, record: dict[str, Any]) -> list[Arm]:
    """The record's arms of its own head; auto trees follow the recorded costs."""
    kept = {"chain", "tree", "auto", "dynamic", "static"}
    shapes = {key: arm["shape"] for key, arm in record["arms"].items() if key in kept}
    auto = Auto(costs=Costs(**record["costs"]))
    return [
        replace(arm, decode=partial(decode, bench, auto)) if arm.shape == "auto" else arm
        for arm in build_arms(bench, shapes)
    ]


def compare(
    plan: Plan, arms: Sequence[Arm], units: Sequence[Unit], seed: int
) -> dict[str, dict[str, Any]]:
    """Arm -> tau recorded and here, with intervals over the same prompts, and tokens/s."""
    compared = {}
    for arm in arms:
        then = [AcceptanceStats.from_dict(unit["arms"][arm.key]) for unit in plan.units]
        now = [unit.outcomes[arm.key].stats for unit in units]
        (tau, bounds), (tau_here, bounds_here) = tau_of(then, seed), tau_of(now, seed)
        compared[arm.key] = {
            "tau": tau,
            "tau_ci95": bounds,
            "tau_here": tau_here,
            "tau_here_ci95": bounds_here,
            "tokens_per_s": speed(then),
            "tokens_per_s_here": speed(now),
            "agrees": bounds[0] - 1e-9 <= tau_here <= bounds[1] + 1e-9,
        }
    return compared


def tau_of(stats: Sequence[AcceptanceStats], seed: int) -> tuple[float, list[float]]:
    """tau over all prompts, and its 95 % bootstrap interval."""
    columns = np.array([[one.tokens, one.rounds] for one in stats])  # [P, 2]
    bounds = bootstrap_ratio(columns, lambda sums: sums[0] / sums[1] if sums[1] else 1.0, seed)
    return total(stats).tau, bounds


def speed(stats: Sequence[AcceptanceStats]) -> float:
    """Tokens/s end to end."""
    return sum(s.new_tokens for s in stats) / sum(sum(s.seconds.values()) for s in stats)


def shown(plan: Plan, compared: dict[str, dict[str, Any]]) -> Table:
    """Recorded and here, side by side."""
    header = ["arm", "tau, recorded", "tau, here", "agrees", "tokens/s, recorded", "tokens/s, here"]
    rows = []
    for key, one in compared.items():
        taus = [with_interval(one[n], one[f"{n}_ci95"]) for n in ("tau", "tau_here")]
        speeds = [f"{one[name]:.1f}" for name in ("tokens_per_s", "tokens_per_s_here")]
        rows.append([key, *taus, "yes" if one["agrees"] else "NO", *speeds])
    return terminal_table(f"table {plan.name}", header, rows)


def brief(found: dict[str, Any]) -> dict[str, Any]:
    """What the last line says of a record."""
    return {key: found[key] for key in ("name", "agrees", "prompts_measured", "whole", "compared")}


if __name__ == "__main__":
    sys.exit(run_main(main))
