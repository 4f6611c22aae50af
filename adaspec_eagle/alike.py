"""Whether cells of a grid may stand in one table: what each was made with, fact by fact.

Machines may keep things in different places: weights and files are compared by their digests.
"""

from collections.abc import Iterable
from typing import Any

from adaspec_eagle.errors import UserError

Facts = dict[tuple[str, str], Any]  # (arm, or "" for all arms of a task; what) -> value

OF_MACHINE = {"features", "device", "report_to"}  # settings of a run that change no result
PLACES = {"target", "data", "prompts"}  # names, whose contents are compared
OWN = {"seed", "reference", "dtype"} | OF_MACHINE | PLACES  # dtype: all arms must share it


def facts(made: dict[str, Any]) -> Facts:
    """What a cell's record says that others of its task, or of its arm, must have too.

    A record that is still to be made may lack keys, as may the config of an older one: what is not
    known is not compared.
    """
    arm, config, settings = made["arm"], made["config"], made["settings"]
    own_data = "data" in made["as_planned"]
    free = {"dtype"} | PLACES | ({"most_epochs"} if settings.get("budget") != "best" else set())
    found: Facts = {("", name): value for name, value in settings.items() if name not in free}
    found["", "--dtype"] = config["dtype"]
    found |= {(arm, name): value for name, value in config.items() if name not in OWN}
    found |= {(arm, link): made["as_planned"].get(link) for link in ("reference", "match")}
    further = {
        ("", "target weights"): made.get("target_fingerprint"),
        ("", "prompts of SHA-256"): made.get("prompts", {}).get("sha256"),
        (arm if own_data else "", "data of SHA-256"): made.get("data_sha256"),
        (arm, "head FLOPs"): made.get("head_flops"),
    }
    return found | {name: value for name, value in further.items() if value is not None}


def check_alike(made: Iterable[tuple[str, Facts]]) -> None:
    """Raise UserError where two of (what it is, its facts) differ in a fact that both know."""
    known: dict[tuple[str, str], tuple[str, Any]] = {}
    for what, own in made:
        for fact, value in own.items():
            other, theirs = known.setdefault(fact, (what, value))
            if theirs != value:
                raise UserError(
                    f"{other} has {fact[1]} {theirs!r}, {what} has {value!r}: their difference "
                    "would not be that of the arms alone; choose another --out (and --work), give "
                    "an arm that has changed another name, or put it back"
                )
