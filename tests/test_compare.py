"""The grid of compared runs, and what is made of its cells."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adaspec_eagle import grid
from adaspec_eagle.contrasts import (
    METRICS,
    Arm,
    _row,
    compare,
    difference,
    draws,
    holm,
    metrics,
    read_cells,
    t_test,
)
from adaspec_eagle.errors import UserError
from adaspec_eagle.grid import (
    Cell,
    CellArm,
    GridSettings,
    Plan,
    cells_of,
    config_of,
    head_folder,
    on_task,
    read_plan,
    run_cell,
    run_grid,
)
from adaspec_eagle.grid_speed import heads_there
from adaspec_eagle.paths import taken
from adaspec_eagle.record import sha256, write_json
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target
from adaspec_eagle.train import Workshop
from adaspec_eagle.work import forward_flops
from eval import compare as script
from tests.records import answers_file
from tests.tiny import tiny_head, tiny_target, tiny_target_folder

ARMS = """
train: {draft_vocab: 60, batch_size: 6, evaluations: 1, lr: 0.02}
arms:
  distillspec: {method: distillspec}
  adaspec: {method: adaspec, keep: "0.5", reference: distillspec}
  equal: {method: distillspec, match: adaspec}
  ema: {select: adaspec-ema}
primary: [adaspec, equal]
seeds: {ema: 1}
"""
COMPUTING_FLOAT32 = Workshop(
    SimpleNamespace(dtype=torch.float32, fingerprint="ours", vocab_size=99)
)
TARGET = COMPUTING_FLOAT32.target


@pytest.fixture
def plan(tmp_path) -> Plan:
    path = tmp_path / "arms.yaml"
    path.write_text(ARMS)
    return read_plan(path)


def test_budgets_are_matched_by_head_flops(plan):
    """Reference 3 x 3, its losses 1, draft 3 x 3: 19, which plain distillation takes 19 / 3 for."""
    assert plan.cost("distillspec", 3) == 9
    assert plan.cost("adaspec", 3) == 19
    assert plan.epochs("equal", 3) == pytest.approx(19 / 3)
    assert plan.cost("equal", 3) == pytest.approx(19)
    assert plan.cost("ema", 3) == 12
    matched = replace(plan.arms["ema"], match="adaspec")
    other = Plan(plan.arms | {"ema": matched}, plan.primary)
    assert other.cost("ema", 3) == pytest.approx(19)
    written = replace(plan.arms["ema"], config={"on_policy": 0.5})
    each = 2 * 0.5 / 3  # half of the answers, by two passes of one step of three
    other = Plan(plan.arms | {"ema": written}, plan.primary)
    assert other.uncounted("ema") == ["ema"]
    assert other.cost("ema", 3) == pytest.approx(9 + 2 * each)
    assert other.cost("ema", 2.5) == pytest.approx(7.5 + 2 * each)
    counted = replace(other, work={"ema": (1.0, 0.4)})
    assert counted.cost("ema", 3) == pytest.approx(9 + 2 * 2 * 0.5 * 0.4)
    both = replace(plan.arms["adaspec"], config=plan.arms["adaspec"].config | {"on_policy": 0.5})
    other = Plan(plan.arms | {"adaspec": both}, plan.primary)
    wanted = 9 + (3 + 1) * 3 + 2 * each  # the reference's losses every epoch
    assert other.cost("adaspec", 3) == pytest.approx(wanted)
    again = plan.arms["adaspec"].config | {"features": "recompute"}
    other = Plan(plan.arms | {"adaspec": replace(plan.arms["adaspec"], config=again)}, plan.primary)
    assert other.cost("adaspec", 3) == 9 + (3 + 1) * 3
    assert plan.cost("adaspec", 0.5) == 1.5 + 1.5 + 0.5  # half of the records were scored
    for epochs in (0.5, 3):
        held = replace(plan.arms["adaspec"], match="equal", config={})
        for config in ({}, {"features": "recompute"}):
            arms = plan.arms | {"held": replace(held, config=held.config | config)}
            other = Plan(arms, plan.primary)
            assert other.cost("held", epochs) == pytest.approx(plan.cost("equal", epochs))


def test_unroll_steps_that_are_left_out_or_added_count_by_their_share(plan):
    """In units of three unroll steps."""
    mixed = CellArm("mixed", {"method": "mixed", "draft_vocab": 60}, match="adaspec")
    deep = CellArm("deep", {"method": "distillspec", "unroll": 5})
    reference = CellArm("reading", {"unroll": 5, "shallow": 0.5}, reference="deep")
    other = Plan(plan.arms | {"mixed": mixed, "deep": deep, "reading": reference}, plan.primary)
    other.check()
    assert other.epochs("mixed", 3) == pytest.approx(19 / 1.5)  # 1, 1, 1 and 3 unroll steps
    assert other.cost("mixed", 3) == pytest.approx(19)
    assert other.cost("deep", 3) == pytest.approx(15)
    assert other.cost("reading", 3) == pytest.approx(15 + 5 / 3 + 9)


def test_flops_are_those_of_the_products():
    """A text of 20 + 10 tokens, by hand: what is done for all tokens, and for the answer's."""
    target = tiny_target()
    head = tiny_head(target).eval()
    size, inner, vocab = 32, head.config.intermediate_size, head.config.draft_vocab_size
    narrow = head.config.num_key_value_heads * head.config.head_dim
    text = 3 * size * size + 2 * 2 * size * narrow  # features fused, keys and values
    token = 2 * size * size + 2 * 2 * size * narrow + size * size + 3 * size * inner
    for steps in (1, 3):
        window = 10 + steps - 1  # indices that some step needs
        attention = 2 * window * (20 + 10) * size  # over the text, at every step
        one = window * token + attention + 10 * size * vocab
        found = forward_flops(head, steps, 20, 10)
        assert found == pytest.approx(2 * (30 * text + steps * one), rel=0.02)


def test_an_unroll_step_of_three_is_more_than_a_third_where_prompts_are_long(plan, tmp_path):
    target = tiny_target()
    mixed = CellArm("mixed", {"method": "mixed", "draft_vocab": 60}, match="adaspec")
    plan = Plan(plan.arms | {"mixed": mixed}, plan.primary)
    settings = script.settings_of(
        script.parser().parse_args(["--data", str(tmp_path / "{task}.jsonl")])
    )
    for name, words in (("short", 1), ("long", 60)):
        lines = []
        for n in range(12):
            turns = [("user", f"w{n} " * words), ("assistant", "w2 " * 12)]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.append({"id": f"r{n}", "task": name, "messages": messages})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = Workshop(target)
    first = {
        task: on_task(plan, task, ["mixed"], settings, work).work["mixed"][1]
        for task in ("short", "long")
    }
    assert 1 / 3 < first["short"] < first["long"] < 0.8
    on_long = on_task(plan, "long", ["mixed"], settings, work)
    each = 0.75 * first["long"] + 0.25
    assert on_long.epochs("mixed", 3) == pytest.approx(19 / 3 / each)
    assert on_long.cost("mixed", 3) == pytest.approx(19)
    assert on_long.uncounted("mixed") == []
    assert on_task(plan, "gone", ["mixed"], settings, work).uncounted("mixed") == ["mixed"]
    assert on_task(plan, "long", ["adaspec"], settings, work).work == {}


def test_cells_go_seed_by_seed(plan):
    cells = cells_of(plan, ["a", "b"], 2)
    assert cells[:4] == [Cell("a", name, 0) for name in plan.arms]
    assert {cell.arm for cell in cells if cell.seed == 1} == {"distillspec", "adaspec", "equal"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reference: distillspec", "reference: equal", "put that before it"),
        (", reference: distillspec", "", "need a reference head"),
        ("draft_vocab", "draft_vocabulary", "no setting"),
        ("[adaspec, equal]", "[adaspec, other]", "no arm 'other'"),
        ("match: adaspec}", "match: adaspec, epochs: 2}", "sets the epochs"),
        ("reference: distillspec", "reference: distillspec, unroll: 2", "differ in unroll"),
        ("match: adaspec}", "match: adaspec, max_length: 99}", "differ in max_length"),
        ("lr: 0.02", "lr: 2e-2", "lr '2e-2' is text"),
        ("{select: adaspec-ema}", "{select: adaspec-ema, seed: 3}", "seed is the grid's"),
        ("[adaspec, equal]", "[adaspec]", "two arms"),
        ("{select: adaspec-ema}", "{select: adaspec-ema, data: x.jsonl}", "list of files"),
        ("{select: adaspec-ema}", "{select: none, match: distillspec, head: eagle1}", "in head"),
        ("primary:", "first:", "no arms file"),
        ("select: adaspec-ema", "select: adaspec-emma", "arm ema: unknown --select"),
        ("primary: [adaspec, equal]", "primary: [adaspec, equal", "line 9"),
        ("  ema:", "  0.4:", "arm 0.4: a name is text"),
        ("  ema:", "  of/us:", "arm 'of/us': a name is text"),
        ("{ema: 1}", "{ema: 2.5}", "seeds of ema: 2.5"),
        ("{select: adaspec-ema}", "{device: cpu}", "device is the grid's"),
        ("match: adaspec}", "match: adaspec, init: x}", "differ in init"),
        ("seeds:", "tasks: {words: {lr: 0.1}}\nseeds:", "task words: lr: a task's own settings"),
        ("seeds:", "tasks: {words: {max_length: -1}}\nseeds:", "arm distillspec: .*max.length"),
        ("seeds:", "tasks: {words: 3}\nseeds:", "task words: 3: a task's own settings"),
        ("seeds:", "tasks: {words:}\nseeds:", "task words: None: a task's own settings"),
        ("seeds:", "tasks: {words: {batch_size: 2}}\nseeds:", "task words: batch_size: a task"),
    ],
)
def test_an_arms_file_with_a_mistake_is_refused(tmp_path, old, new, message):
    path = tmp_path / "arms.yaml"
    path.write_text(ARMS.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_plan(path)


def test_a_task_has_settings_of_its_own(tmp_path):
    path = tmp_path / "arms.yaml"
    path.write_text(ARMS.replace("seeds:", "tasks: {words: {max_length: 99}}\nseeds:"))
    plan = read_plan(path)
    for name in plan.arms:
        assert config_of(plan.arm(name, "words"), {}).max_length == 99
        assert config_of(plan.arm(name, "others"), {}).max_length == 512


def test_a_cell_is_worked_on_by_one_at_a_time(tmp_path):
    lock = tmp_path / "cell.lock"
    with taken(lock) as first, taken(lock) as second:
        assert (first, second) == (True, False)
    with taken(lock) as again:
        assert again


def test_the_lock_of_a_killed_worker_is_free(tmp_path):
    lock = tmp_path / "cell.lock"
    hold = "import sys, time\nfrom pathlib import Path\nfrom adaspec_eagle.paths import taken\n"
    hold += "with taken(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout.readline() == "held\n"
        with taken(lock) as mine:
            assert not mine
        worker.kill()
    with taken(lock) as mine:
        assert mine


def test_an_arm_has_at_least_the_seeds_of_those_that_need_it(tmp_path):
    path = tmp_path / "arms.yaml"
    path.write_text(ARMS.replace("seeds: {ema: 1}", "seeds: {ema: 1, distillspec: 1}"))
    cells = cells_of(read_plan(path), ["a"], 2)
    assert Cell("a", "distillspec", 1) in cells


# ---- statistics ----------------------------------------------------------------------------------


def arm(counts: np.ndarray, seeds: list[int] | None = None) -> Arm:
    return Arm([], seeds or list(range(len(counts))), counts)


def counts(seed: int, share: float, seeds: int = 5, prompts: int = 30) -> np.ndarray:
    """Prompts of 40 drafts, of which about `share` are accepted; `[S, P, C]`."""
    rng = np.random.default_rng(seed)
    accepted = rng.binomial(40, share, size=(seeds, prompts))
    columns = [accepted, np.full_like(accepted, 40)] * 2
    columns += [accepted + 40, np.full_like(accepted, 40), accepted, np.full_like(accepted, 40)]
    columns += [accepted, np.full_like(accepted, 40)]
    return np.stack(columns, -1).astype(float)


def test_metrics_are_those_of_their_definitions():
    stats = AcceptanceStats([3, 2, 4, 1], [10, 7, 5], 10, 21, 22)
    forced = {"sums": [[1, 1], [6.0, 2], [5, 3]], "counts": [12, 11], "products": 9, "indices": 10}
    row = _row({"greedy": stats.to_dict(), "sampled": stats.to_dict(), "greedy_forced": forced})
    found = metrics(np.array(row))
    assert found["greedy_alpha"] == pytest.approx(stats.greedy_alpha)
    assert found["tau"] == pytest.approx(stats.tau)
    assert found["overlap"] == pytest.approx(0.5)
    assert found["tau_sim"] == pytest.approx(1.9)


def test_answers_too_short_for_the_chains_have_figures():
    """Yes or no: no index has all steps behind it, no draft is judged."""
    short = counts(0, 0.5)
    short[..., -2:] = 0
    short[0] = 0
    found = compare({"task": {"a": arm(short), "base": arm(counts(1, 0.5))}}, ("a", "base"))["task"]
    assert found["a"]["tau_sim"]["value"] == 1
    assert found["a"]["tau_sim"]["ci95"] == [1, 1]
    assert [found["a"][name]["by_seed"][0] for name in METRICS] == [0, 0, 0, 1, 1]


def test_draws_are_paired_and_of_the_right_size():
    one = counts(0, 0.5)
    assert np.array_equal(draws(one), draws(one))
    assert draws(one).shape == (20_000, one.shape[-1])
    assert (draws(one)[:, 1] == 40 * 5 * 30).all()  # as many prompts and seeds in every draw
    same = difference(arm(one), arm(one))
    assert same["greedy_alpha"]["difference_ci95"] == [0, 0]
    assert same["greedy_alpha"]["p"] == 1


@pytest.mark.parametrize(
    ("t", "free", "wanted"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (4.604, 4, 0.01)],
)
def test_t_tests_agree_with_the_tables(t, free, wanted):
    """Critical values of Student's distribution; gaps of mean t and standard error 1."""
    gaps = np.linspace(-1, 1, free + 1)
    gaps = gaps / (gaps.std(ddof=1) / len(gaps) ** 0.5) + t
    assert t_test(gaps) == pytest.approx(wanted, rel=2e-3)
    assert t_test(np.array([0.1])) == 0


@pytest.mark.parametrize("seeds", [3, 5])
def test_seeds_that_differ_are_no_difference_of_arms(seeds):
    """Of 200 pairs of arms that are the same but for their seeds' luck, few may seem to differ."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        pair = [
            np.concatenate([counts(int(rng.integers(1 << 30)), share, 1) for share in shares])
            for shares in rng.normal(0.5, 0.03, size=(2, seeds))
        ]
        wrong += t_test(np.subtract(*(metrics(c.sum(1))["greedy_alpha"] for c in pair))) < 0.05
    assert wrong <= 20


def test_the_interval_is_wider_where_seeds_differ():
    """Five seeds that differ by more than prompts do: prompts alone would hide it."""
    alike = counts(0, 0.5)
    apart = np.concatenate(
        [counts(n, share, 1) for n, share in enumerate((0.3, 0.4, 0.5, 0.6, 0.7))]
    )
    width = {}
    for name, one in (("alike", alike), ("apart", apart)):
        spread = metrics(draws(one))["greedy_alpha"]
        width[name] = np.subtract(*np.percentile(spread, [97.5, 2.5]))
    assert width["apart"] > 5 * width["alike"]


def test_a_true_difference_holds_and_none_does_not():
    arms = {"base": arm(counts(0, 0.5)), "same": arm(counts(1, 0.5)), "better": arm(counts(2, 0.6))}
    arms["few"] = arm(counts(3, 0.6, seeds=2))
    found = compare({"task": arms}, ("better", "base"))["task"]
    assert found["better"]["greedy_alpha"]["holds"]
    assert not found["same"]["greedy_alpha"]["holds"]
    assert not found["few"]["greedy_alpha"]["holds"]  # two seeds are too few to say
    assert found["few"]["greedy_alpha"]["seeds"] == 2
    assert (
        found["few"]["greedy_alpha"]["p"] is None
    )  # and do not make the others' correction dearer
    without = compare({"task": {k: v for k, v in arms.items() if k != "few"}}, ("better", "base"))
    assert found["same"] == without["task"]["same"]
    assert "difference" not in found["base"]["greedy_alpha"]


def test_a_difference_uses_the_seeds_that_both_have():
    both = difference(arm(counts(0, 0.5), [0, 1, 2, 3, 4]), arm(counts(1, 0.5, 2), [3, 1]))
    assert both["tau"]["seeds"] == 2
    assert difference(arm(counts(0, 0.5, 1), [0]), arm(counts(0, 0.5, 1), [1])) is None


def test_holm_is_step_down_and_monotone():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_first_head_that_is_there_is_timed(plan, tmp_path):
    settings = GridSettings("t", "", "", "1", 6, 4, 8, 3)
    for arm in ("ema", "equal"):
        folder = head_folder(Cell("words", arm, 0), tmp_path, settings)
        folder.mkdir(parents=True)
        (folder / "train.json").touch()
    assert heads_there(plan, "words", settings, tmp_path) == {"eagle3": Cell("words", "equal", 0)}


# ---- the whole -----------------------------------------------------------------------------------


def test_a_grid_is_made_once_resumed_and_shown(tmp_path, capsys):
    target = tiny_target_folder(tmp_path / "target")
    answers_file(tmp_path / "words.jsonl")
    answers_file(tmp_path / "dev-words.jsonl", records=4)
    (tmp_path / "arms.yaml").write_text(ARMS)
    given = ["--target", target, "--tasks", "words", "--data", str(tmp_path / "{task}.jsonl")]
    given += ["--prompts", str(tmp_path / "dev-{task}.jsonl"), "--dtype", "float32"]
    given += ["--arms", str(tmp_path / "arms.yaml"), "--epochs", "1", "--max-new-tokens", "8"]
    given += ["--depth", "3"]
    given += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert script.main([*given, "--seeds", "1", "--only", "adaspec"]) == 0
    cells = sorted((tmp_path / "out").glob("cells/1/words/*.json"))
    assert [path.name for path in cells] == ["adaspec-seed0.json", "distillspec-seed0.json"]
    before = {path: path.stat().st_mtime_ns for path in cells}
    shutil.rmtree(tmp_path / "work" / "1" / "words" / "distillspec-seed0")  # as on another machine
    (tmp_path / "out" / "cells" / "1" / "words" / "adaspec-seed0.json").rename(tmp_path / "first")
    assert script.main([*given, "--seeds", "1", "--only", "adaspec"]) == 0
    again = json.loads(cells[0].read_text())
    assert again["per_prompt"] == json.loads((tmp_path / "first").read_text())["per_prompt"]
    before[cells[0]] = cells[0].stat().st_mtime_ns
    assert script.main([*given, "--seeds", "2", "--speed", "2"]) == 0
    assert all(path.stat().st_mtime_ns == before[path] for path in cells)
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    every = {"distillspec": [0, 1], "adaspec": [0, 1], "equal": [0, 1], "ema": [0]}
    assert shown["cells"]["words"] == every
    record = json.loads(cells[0].read_text())
    assert record["config"]["reference"].endswith("distillspec-seed0/head")
    assert record["config"]["take"] == "last"
    assert record["head_flops"] == 7
    assert len(record["per_prompt"]) == 4
    assert len(list((tmp_path / "work" / "features").glob("*/index.jsonl"))) == 1
    assert not list((tmp_path / "work").rglob("checkpoints"))
    found = json.loads((tmp_path / "out" / "summary-1.json").read_text())
    assert found["tasks"]["words"]["equal"]["steps"] > found["tasks"]["words"]["adaspec"]["steps"]
    text = (tmp_path / "out" / "table-1.md").read_text()
    assert "| published | Phi-2 |" in text
    assert "| words | eagle3 (distillspec) | 2 |" in text
    assert "| here |  | adaspec, 1 epochs |" in text
    tex = (tmp_path / "out" / "table-1.tex").read_text()
    assert tex.count("\\\\") >= 5
    unequal = {name for name, arm in found["tasks"]["words"].items() if not arm["equal_compute"]}
    assert unequal == {"distillspec", "ema"}
    marked = {
        line.split(" & ")[0] for line in tex.splitlines() if "\\dagger" in line and "&" in line
    }
    assert marked == unequal
    assert (tmp_path / "out" / "forest-1.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "out" / "table-1.md").read_bytes()
    assert script.main([*given, "--tables-only", "--against", "distillspec"]) == 0
    assert (tmp_path / "out" / "table-1.md").read_bytes() == before
    found = json.loads((tmp_path / "out" / "summary-1-against-distillspec.json").read_text())
    arms = found["tasks"]["words"]
    assert "difference" not in arms["distillspec"]["metrics"]["tau"]
    assert not any(arm["metrics"]["tau"].get("primary") for arm in arms.values())
    lone = arms["ema"]["metrics"]["tau"]
    assert lone["difference"] == pytest.approx(
        lone["by_seed"][0] - arms["distillspec"]["metrics"]["tau"]["by_seed"][0]
    )
    for options, words in ((["--against", "distillspec"], "goes with --tables-only"),
                           (["--against", "none", "--tables-only"], "no such arm")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            script.main([*given, *options])
    lines = (tmp_path / "out" / "table-1.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 5


def test_an_arm_with_data_of_its_own_makes_as_many_passes(tmp_path):
    """Over answer tokens; twice as many records are half as many epochs."""
    target = Target.load(tiny_target_folder(tmp_path / "target"), "float32")
    answers_file(tmp_path / "dev-words.jsonl", records=4)
    for name, records in (("words", 40), ("words-more", 80)):
        answers_file(tmp_path / f"{name}.jsonl", records)
    more = f'more: {{method: distillspec, data: ["{tmp_path}/{{task}}-more.jsonl"]}}'
    (tmp_path / "arms.yaml").write_text(ARMS.replace("primary:", f"  {more}\nprimary:"))
    plan = read_plan(tmp_path / "arms.yaml")
    given = ["--data", str(tmp_path / "{task}.jsonl"), "--epochs", "2", "--depth", "3"]
    given += ["--prompts", str(tmp_path / "dev-{task}.jsonl"), "--max-new-tokens", "8"]
    settings = script.settings_of(script.parser().parse_args([*given, "--dtype", "float32"]))
    settings = replace(settings, target=str(tmp_path / "target"))
    out, cells = tmp_path / "out", [Cell("words", name, 0) for name in ("distillspec", "more")]
    assert run_grid(plan, cells, settings, Workshop(target), out, tmp_path / "work") == 2
    one, other = (json.loads(path.read_text()) for path in sorted(out.rglob("*-seed0.json")))
    assert (one["arm"], other["arm"]) == ("distillspec", "more")
    assert other["answer_tokens"] > 1.8 * one["answer_tokens"]
    assert other["answer_token_passes"] == pytest.approx(one["answer_token_passes"], rel=0.05)
    assert other["head_flops"] == one["head_flops"]
    (tmp_path / "words.jsonl").unlink()
    with pytest.raises(UserError, match="there is no .*words.jsonl"):
        run_grid(
            plan, [Cell("words", "more", 1)], settings, Workshop(target), out, tmp_path / "work"
        )


def test_an_arm_that_changed_under_way_is_refused(tmp_path, plan):
    settings = script.settings_of(script.parser().parse_args(["--epochs", "1"]))
    cell = Cell("words", "distillspec", 0)
    given = {"target": settings.target, "data": ["runs/data/words.jsonl"], "epochs": 1.0}
    config = config_of(plan.arms["distillspec"], given | {"take": "last"})
    folder = tmp_path / "1" / "words" / "distillspec-seed0"
    begun = asdict(replace(config, lr=0.5))
    del begun["report_to"]  # as a run that was begun before there was such a setting
    write_json(folder / "run.json", {"config": begun})
    with pytest.raises(UserError, match="begun with lr 0.5"):
        run_cell(plan, cell, settings, None, tmp_path)


def as_made(arm: grid.CellArm, seed: int = 0, **changes) -> dict:
    """The record of a cell of task words as the command's defaults make it in float32, changed."""
    settings = asdict(script.settings_of(script.parser().parse_args([])))
    config = grid.filled(config_of(arm, {"epochs": 3.0, "seed": seed, "take": "last"}), TARGET)
    made = {
        "task": "words",
        "arm": arm.name,
        "seed": seed,
        "settings": settings,
        "target_fingerprint": "ours",
        "config": asdict(config) | {"data": ["runs/data/words.jsonl"]},
        "as_planned": grid._as_planned(arm),
        "head_flops": 9.0,
        "prompts": {"ids": [], "sha256": "of prompts"},
        "data_sha256": ["of data"],
        "per_prompt": [],
    }
    for name, value in changes.items():
        made[name] = made[name] | value if isinstance(value, dict) else value
    return made


def write_cell(out, made: dict) -> None:
    write_json(out / "cells" / "3" / "words" / f"{made['arm']}-seed{made['seed']}.json", made)


@pytest.mark.parametrize(
    ("arm", "change", "message"),
    [
        ("distillspec", {"config": {"seed": 1, "device": "cuda:1", "target": "/elsewhere"}}, None),
        ("distillspec", {"config": {"data": ["elsewhere"], "dtype": "float32"}}, None),
        ("distillspec", {"settings": {"data": "elsewhere", "prompts": "x", "target": "y"}}, None),
        ("distillspec", {"settings": {"most_epochs": 9.0}}, None),
        ("distillspec", {"config": {"lr": 0.5}}, "has lr 0.02, .* has 0.5"),
        ("distillspec", {"config": {"epochs": 2.0}}, "has epochs 3.0, .* has 2.0"),
        ("distillspec", {"head_flops": 12.0}, "has head FLOPs 9.0, .* has 12.0"),
        ("distillspec", {"as_planned": {"match": "ema"}}, "has match None, .* has 'ema'"),
        ("distillspec", {"data_sha256": ["other"]}, "has data of SHA-256 "),
        ("ema", {"config": {"lr": 0.5}, "head_flops": 12.0}, None),
        ("ema", {"data_sha256": ["other"]}, "has data of SHA-256 "),
        ("ema", {"data_sha256": ["other"], "as_planned": {"data": ["other.jsonl"]}}, None),
        ("ema", {"target_fingerprint": "theirs"}, "has target weights 'ours', .* has 'theirs'"),
        ("ema", {"prompts": {"sha256": "other"}}, "has prompts of SHA-256 "),
        ("ema", {"settings": {"limit": 7}}, "has limit 64, .* has 7"),
        ("ema", {"config": {"dtype": "bfloat16"}}, "has --dtype 'float32', .* has 'bfloat16'"),
    ],
)
def test_cells_that_differ_in_more_than_arm_and_seed_share_no_table(
    tmp_path, plan, arm, change, message
):
    write_cell(tmp_path, as_made(plan.arms["distillspec"]))
    write_cell(tmp_path, as_made(plan.arms[arm], 1, **change))
    if message is None:
        assert read_cells(tmp_path)["words"][arm].seeds[-1] == 1
    else:
        with pytest.raises(UserError, match=message):
            read_cells(tmp_path)


def test_chains_deeper_than_answers_or_heads_are_refused_before_any_work(plan, tmp_path):
    settings = script.settings_of(script.parser().parse_args(["--max-new-tokens", "5"]))
    with pytest.raises(UserError, match="--max-new-tokens 5"):
        run_grid(plan, [Cell("a", "ema", 0)], settings, COMPUTING_FLOAT32, tmp_path, tmp_path)
    medusa = replace(plan.arms["ema"], config={"head": "medusa", "method": "distillspec"})
    plan = Plan({"medusa": medusa}, ("medusa", "medusa"))
    settings = replace(settings, max_new_tokens=64)
    with pytest.raises(UserError, match="medusa: its head drafts 4 tokens deep; give --depth 4"):
        run_grid(plan, [Cell("a", "medusa", 0)], settings, COMPUTING_FLOAT32, tmp_path, tmp_path)


def test_a_budget_that_an_arm_cannot_train_on_is_refused_before_any_work(plan, tmp_path):
    written = replace(plan.arms["ema"], config={"method": "distillspec", "on_policy": 0.5})
    plan = Plan({"written": written}, ("written", "written"))
    settings = script.settings_of(script.parser().parse_args(["--epochs", "1"]))
    with pytest.raises(UserError, match="arm ema: .*raise --epochs"):
        run_grid(plan, [Cell("a", "written", 0)], settings, COMPUTING_FLOAT32, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("flags", "arm", "message"),
    [
        (["--most-epochs", "9", "--data", "elsewhere/{task}.jsonl", "--target", "x"], {}, None),
        (["--limit", "7"], {}, "has limit 64, this command for arm distillspec has 7"),
        ([], {"lr": 0.5}, "has lr 0.02, this command for arm distillspec has 0.5"),
        ([], {"unroll": 2}, "has unroll 3, "),
        ([], {"epochs": 2}, "has epochs 3.0, .* has 6.0"),
        ([], {"method": "adaspec", "select": "adaspec-ema"}, "has method 'distillspec', "),
    ],
)
def test_what_is_on_record_must_be_what_would_be_made(plan, tmp_path, flags, arm, message):
    """Also where nothing is left to do, and with the files of the command not here."""
    write_cell(tmp_path, as_made(plan.arms["distillspec"]))
    changed = replace(plan.arms["distillspec"], config=plan.arms["distillspec"].config | arm)
    plan = Plan(plan.arms | {"distillspec": changed}, plan.primary)
    work = (script.settings_of(script.parser().parse_args(flags)), COMPUTING_FLOAT32)
    cells = [Cell("words", "distillspec", 0)]
    if message is None:
        assert run_grid(plan, cells, *work, tmp_path, tmp_path) == 0
        assert list(read_cells(tmp_path)["words"]) == ["distillspec"]
    else:
        with pytest.raises(UserError, match=message):
            run_grid(plan, cells, *work, tmp_path, tmp_path)


def test_what_an_arm_no_longer_says_is_missed(plan, tmp_path):
    arm = plan.arms["distillspec"]
    write_cell(tmp_path, as_made(replace(arm, config=arm.config | {"unroll": 2, "decay": 0.9})))
    settings = script.settings_of(script.parser().parse_args([]))
    with pytest.raises(UserError, match="has unroll 2, .* has 3"):
        run_grid(
            plan, [Cell("words", arm.name, 0)], settings, COMPUTING_FLOAT32, tmp_path, tmp_path
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"config": {"dtype": "bfloat16"}}, "has --dtype 'bfloat16', this command .* 'float32'"),
        ({"target_fingerprint": "theirs"}, "has target weights 'theirs', "),
        ({"prompts": {"sha256": "other"}}, "has prompts of SHA-256 'other', "),
        ({"data_sha256": ["other"]}, "has data of SHA-256 .'other'., "),
    ],
)
def test_a_new_arm_must_fit_the_others_before_it_is_trained(
    plan, tmp_path, monkeypatch, change, message
):
    """--only ema beside another arm's cell, with the files that the command reads elsewhere."""
    data = answers_file(tmp_path / "moved-words.jsonl")
    given = ["--data", str(tmp_path / "moved-{task}.jsonl"), "--prompts", data]
    settings = script.settings_of(script.parser().parse_args(given))
    made = as_made(
        plan.arms["distillspec"], data_sha256=[sha256(data)], prompts={"sha256": sha256(data)}
    )
    for name, value in change.items():
        made[name] = made[name] | value if isinstance(value, dict) else value
    write_cell(tmp_path, made)
    source = SimpleNamespace(describe=lambda: {"sha256": sha256(data)})
    monkeypatch.setattr(grid, "prompts_of", lambda *_: source)
    monkeypatch.setattr(grid, "_ready", lambda *_: True)
    monkeypatch.setattr(
        grid, "run_cell", lambda plan, cell, *_: as_made(plan.arms[cell.arm], head_flops=12.0,
                                                         data_sha256=made["data_sha256"],
                                                         prompts=made["prompts"])
    )  # fmt: skip
    cells = cells_of(plan, ["words"], 1, ["ema"])
    if message is None:
        assert run_grid(plan, cells, settings, COMPUTING_FLOAT32, tmp_path, tmp_path) == 1
        assert set(read_cells(tmp_path)["words"]) == {"distillspec", "ema"}
    else:
        with pytest.raises(UserError, match=message):
            run_grid(plan, cells, settings, COMPUTING_FLOAT32, tmp_path, tmp_path)


def test_files_that_are_not_there_are_named_before_any_work(plan, tmp_path, monkeypatch):
    cells, settings = [Cell("a", "ema", 0)], script.settings_of(script.parser().parse_args([]))
    work = (COMPUTING_FLOAT32, tmp_path, tmp_path)
    monkeypatch.setattr(grid, "run_cell", None)
    with pytest.raises(UserError, match="task a: there is no runs/data/a.jsonl; make it"):
        run_grid(plan, cells, settings, *work)
    settings = replace(settings, data="{set}.jsonl")
    with pytest.raises(UserError, match="'{set}.jsonl': {task} is the only field"):
        run_grid(plan, cells, settings, *work)
    answers_file(tmp_path / "a.jsonl")
    settings = replace(settings, data=str(tmp_path / "{task}.jsonl"), prompts="no-{task}.jsonl")
    with pytest.raises(UserError, match="no-a.jsonl does not exist"):
        run_grid(plan, cells, settings, *work)


def test_best_of_more_epochs_is_another_budget(plan):
    settings = script.settings_of(
        script.parser().parse_args(["--epochs", "best", "--most-epochs", "5"])
    )
    assert settings.epochs == 5
    assert replace(settings, budget="3").epochs == 3


@pytest.mark.parametrize("wrong", ["0", "-1", "many"])
def test_a_budget_that_is_none_is_refused(wrong):
    with pytest.raises(UserError, match="--epochs"):
        script.settings_of(script.parser().parse_args(["--epochs", wrong]))


def test_nothing_to_show_is_said(tmp_path, plan):
    with pytest.raises(UserError, match="no cells"):
        script.main(["--out", str(tmp_path), "--tables-only"])


def test_tables_of_another_budget_are_not_emptied(tmp_path):
    assert script.settings_of(script.parser().parse_args(["--epochs", "3.0"])).budget == "3"
    write_json(tmp_path / "cells" / "3" / "words" / "equal-seed0.json", {})
    (tmp_path / "table-1.md").write_text("kept")
    with pytest.raises(UserError, match="no cells of --epochs 2 .*for 3"):
        script.main(["--out", str(tmp_path), "--tables-only", "--epochs", "2"])
    assert (tmp_path / "table-1.md").read_text() == "kept"


def test_the_arms_that_come_with_the_program_are_sound():
    plan = read_plan(script.ARMS)
    first, other = plan.primary
    assert plan.cost(first, 3) == pytest.approx(plan.cost(other, 3))
    assert len(cells_of(plan, ["gsm8k"], 5)) == 4 * 5 + (len(plan.arms) - 4) * 3


def test_the_arms_of_the_data_study_take_the_same_flops_but_on_policy():
    plan = read_plan(script.ARMS.with_name("arms_data.yaml"))
    costs = {name: plan.cost(name, 3) for name in plan.arms}
    # Two epochs, half of them by the head, with two passes of one step of three.
    assert costs.pop("on-policy") == pytest.approx(9 + 2 * 0.5 * 2 / 3)
    assert set(costs.values()) == {9}
