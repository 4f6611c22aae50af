"""The measuring scripts, through their `main`, on a tiny random target and head."""

import importlib.util
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from adaspec_eagle.heads.eagle3 import Head as Eagle3Head
from tiny import tiny_head, tiny_target, tiny_target_folder
from torch._inductor.exc import InvalidCxxCompiler

from adaspec_eagle import Target
from adaspec_eagle.auto import SIZES
from adaspec_eagle.bench import Prompt, draft_shapes, find_head
from adaspec_eagle.errors import UserError, run_main
from adaspec_eagle.figures import headline, total
from adaspec_eagle.measure import PARTS, Outcome, Unit, greedy_baseline
from adaspec_eagle.rescore import agreement, difference, judge, token_gaps
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import left_padded

EVAL = Path(__file__).parents[1] / "eval"
RATIOS = ["tokens_per_s", "decode_tokens_per_s", "tau"]
BASELINES = ("generate", "loop")
RATIOS += [f"{kind}speedup_vs_{base}" for kind in ("", "decode_") for base in BASELINES]
WORDS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9")


def script(name: str):
    """A script of eval/ as a module; importing it does no work."""
    spec = importlib.util.spec_from_file_location(f"eval_{name}", EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_prompts(path: Path, words=WORDS, more=()) -> str:
    """A prompt file; `more` are user messages that follow in every prompt, unanswered."""
    lines = [
        {
            "id": f"{path.stem}-{i}",
            "task": path.stem,
            "messages": [{"role": "user", "content": text} for text in (content, *more)],
        }
        for i, content in enumerate(words)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with a target, a head under runs/ and two prompt files."""
    folder = tmp_path_factory.mktemp("work")
    target = Target.load(tiny_target_folder(folder / "target"), dtype="float32")
    tiny_head(target).save(folder / "runs" / "one" / "head")
    write_prompts(folder / "a.jsonl")
    write_prompts(folder / "b.jsonl", WORDS[:2], more=["w11 w12"])
    return folder


@pytest.fixture
def here(work, monkeypatch):
    """Work in that folder."""
    monkeypatch.chdir(work)
    return work


def arguments(*more: str) -> list[str]:
    """Tiny settings for any of the scripts."""
    return ["--target", "target", "--dtype", "float32", "--max-new-tokens", "8", *more]


# ---- speedup.py ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(work):
    """One run of speedup.py over two files: its stdout's last line, and its result.json."""
    out = work / "measured"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        files = ["--prompts", "a.jsonl", "--prompts", "b.jsonl", "--out", str(out)]
        assert script("speedup").main(arguments("--tree", *files)) == 0
    return json.loads((out / "result.json").read_text())


def test_tree_alone_runs_both_baselines_a_chain_of_four_and_the_auto_tree(measured):
    assert [(key, arm["shape"]) for key, arm in measured["arms"].items()] == [
        ("generate", None),
        ("loop", None),
        ("chain", "chain:4"),
        ("tree", "auto"),
    ]


@pytest.mark.parametrize("name", ["speedup", "acceptance", "lossless"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(here, monkeypatch, name):
    (here / "taken").write_text("a file")
    monkeypatch.setattr(Target, "load", None)
    options = arguments("--tree") if name == "speedup" else arguments()
    with pytest.raises(UserError, match="--out taken: .*can be written to"):
        script(name).main([*options, "--prompts", "a.jsonl", "--out", "taken"])


def test_acceptance_of_another_targets_head_can_be_asked_for(here, tmp_path):
    shutil.copytree(here / "runs" / "one" / "head", tmp_path / "head")
    config = tmp_path / "head" / "config.json"
    fields = json.loads(config.read_text()) | {"target_fingerprint": "another"}
    config.write_text(json.dumps(fields))
    options = arguments("--prompts", "a.jsonl", "--head", str(tmp_path / "head"))
    with pytest.raises(UserError, match="--allow-other-target"):
        script("acceptance").main(options)
    assert script("acceptance").main([*options, "--allow-other-target"]) == 0


def test_one_prompt_has_no_interval():
    arm = {"tokens_per_s": 2.0, "speedup_vs_loop": 2.0, "speedup_vs_loop_ci95": [2.0, 2.0]}
    found = headline({"loop": {"tokens_per_s": 1.0}, "tree": arm})
    assert "2.00 times (one prompt, no interval) as fast as `loop`" in found["sentence"]


def test_every_ratio_has_an_interval_that_holds_it(measured):
    for arm in measured["arms"].values():
        for name in RATIOS:
            low, high = arm[f"{name}_ci95"]
            assert low <= arm[name] * 1.000001
            assert arm[name] <= high * 1.000001


def test_a_ratio_is_one_of_sums_over_all_prompts(measured):
    for key, arm in measured["arms"].items():
        runs = [unit["arms"][key] for unit in measured["per_prompt"]]
        tokens = sum(run["new_tokens"] for run in runs)
        seconds = sum(sum(run["seconds"].values()) for run in runs)
        assert arm["tokens_per_s"] == pytest.approx(tokens / seconds)
        rounds, after = (sum(run[name] for run in runs) for name in ("rounds", "tokens"))
        assert arm["tau"] == pytest.approx(after / rounds)


def test_speedup_columns_agree_with_tokens_per_second(measured):
    arms = measured["arms"]
    for arm in arms.values():
        for base in BASELINES:
            ratio = arm["tokens_per_s"] / arms[base]["tokens_per_s"]
            assert arm[f"speedup_vs_{base}"] == pytest.approx(ratio)


def test_parts_of_the_time_add_up_to_the_wall_time(measured):
    for arm in measured["arms"].values():
        assert set(arm["seconds"]) == set(PARTS)
        assert sum(arm["seconds"].values()) == pytest.approx(arm["wall_s"])
        assert arm["seconds"]["prefill"] > 0
        inside = arm["wall_s"] - arm["seconds"]["prefill"]
        assert 0 < arm["forward_seconds"] < inside or arm is measured["arms"]["generate"]


def test_the_order_of_the_arms_rotates_from_prompt_to_prompt(measured):
    orders = [list(unit["arms"]) for unit in measured["per_prompt"]]
    assert orders[0] == ["generate", "loop", "chain", "tree"]
    assert orders[1] == ["loop", "chain", "tree", "generate"]
    assert {order[0] for order in orders} == set(measured["arms"])


def test_float32_answers_equal_those_of_generate(measured):
    assert all(arm["matched"] == arm["total"] == 5 for arm in measured["arms"].values())


def test_only_the_first_of_two_turns_is_measured(measured):
    lengths = {unit["ids"][0]: unit["prompt_tokens"] for unit in measured["per_prompt"]}
    assert measured["turns"] == "first"
    assert lengths["b-0"] == lengths["a-0"]


def test_files_are_named_hashed_and_reported_apart(measured):
    assert [(one["file"], one["prompts"]) for one in measured["prompts"]] == [
        ("a.jsonl", 3),
        ("b.jsonl", 2),
    ]
    assert all(len(one["sha256"]) == 64 for one in measured["prompts"])
    for key, arm in measured["arms"].items():
        parts = [one["arms"][key]["new_tokens"] for one in measured["files"].values()]
        assert sum(parts) == arm["new_tokens"]


def test_headline_is_over_the_faster_baseline(measured):
    arms, headline = measured["arms"], measured["headline"]
    faster = max(BASELINES, key=lambda key: arms[key]["tokens_per_s"])
    assert headline["over"] == faster
    assert headline["speedup"] == arms["tree"][f"speedup_vs_{faster}"]
    assert f"`{faster}`" in headline["sentence"]


def test_a_result_carries_what_a_citation_needs(measured, work):
    assert measured["target"]["fingerprint"] == measured["head"]["config"]["target_fingerprint"]
    packed = measured["target"]["packed"]  # float32 is, where torch has oneDNN
    assert packed is torch.backends.mkldnn.is_available()
    assert measured["head"]["folder"] == "runs/one/head"
    assert measured["environment"]["packages"]["torch"] == torch.__version__
    assert {"tau", "alpha_by_depth", "ci95"} <= set(measured["definitions"])
    assert (work / "measured" / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_alpha_belongs_to_chains_and_acceptance_to_both(measured):
    arms = measured["arms"]
    assert arms["tree"]["alpha_by_depth"] == []
    assert len(arms["chain"]["acceptance_by_depth"]) == 4
    assert len(arms["chain"]["alpha_by_depth"]) >= 1
    assert len(arms["tree"]["acceptance_by_depth"]) >= 1


def test_last_line_is_the_result_without_per_prompt_data(here, capsys):
    limits = ("--chain", "2", "--prompts", "a.jsonl", "--limit", "2", "--batch-size", "2")
    assert script("speedup").main(arguments(*limits)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["arms"]) == ["generate", "loop", "chain"]
    assert result["arms"]["chain"]["total"] == 2
    assert "per_prompt" not in result


# ---- speedup.py --compile ------------------------------------------------------------------------


def compiled_run(monkeypatch, capsys, generate_compiled):
    """`speedup.py --compile` with steps as they are for compiled ones: its result, how many."""
    steps = []
    monkeypatch.setattr("adaspec_eagle.compiled._wrapped", lambda *a: steps.append(a) or a[0])
    monkeypatch.setattr("adaspec_eagle.baselines.compiled_baseline", generate_compiled)
    module = script("speedup")
    monkeypatch.setattr(module, "check_compiler", lambda device: None)
    assert module.main(arguments("--tree", "--compile", "--prompts", "a.jsonl")) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), steps, out


def test_sampled_arms_draw_what_the_loop_draws(here):
    more = ["--prompts", "a.jsonl", "--batch-size", "2", "--temperature", "0.9", "--seed", "3"]
    out = here / "sampled"
    run = arguments("--tree", "auto", "dynamic", *more, "--out", str(out))
    assert script("speedup").main(run) == 0
    found = json.loads((out / "result.json").read_text())
    assert (found["matched_with"], found["temperature"]) == ("loop", 0.9)
    for key in ("chain", "tree", "dynamic"):
        arm = found["arms"][key]
        assert (arm["matched"], arm["total"]) == (3, 3)
        assert "lossless" not in arm  # a rule for greedy answers
    page = here / "page.md"
    page.write_text("<!-- table:sampled -->\n<!-- /table -->\n<!-- table:sampled/brief -->\n"
                    "<!-- /table -->\n")  # fmt: skip
    assert script("tables").main(["--pages", str(page), "--results", str(here)]) == 0
    assert "answers equal to loop's" in page.read_text()
    assert "identical to `loop`'s" in page.read_text()


def test_compile_is_for_every_arm_and_the_headline_is_over_the_fastest(here, monkeypatch, capsys):
    def made(bench, ids, mask):
        return greedy_baseline(bench.target, bench.max_new_tokens, ids, mask)

    result, steps, _ = compiled_run(monkeypatch, capsys, made)
    arms = result["arms"]
    assert list(arms) == ["generate", "loop", "chain", "tree", "generate-compiled"]
    assert len(steps) == 3  # the head, the target with the head's features and without
    assert all(arm["matched"] == arm["total"] == 3 for arm in arms.values())
    bases = ("generate", "loop", "generate-compiled")
    fastest = max(bases, key=lambda key: arms[key]["tokens_per_s"])
    assert result["headline"]["over"] == fastest
    ratio = arms["tree"]["tokens_per_s"] / arms["generate-compiled"]["tokens_per_s"]
    assert arms["tree"]["speedup_vs_generate-compiled"] == pytest.approx(ratio)
    assert list(result["compiled"]["seconds"]) == list(arms)
    assert result["compiled"]["graphs_while_timed"] == 0


def test_a_generate_that_does_not_compile_stays_in_the_table_with_its_error(
    here, monkeypatch, capsys
):
    def failing(*_):
        raise RuntimeError("no vectors\nand much more")

    result, _, out = compiled_run(monkeypatch, capsys, failing)
    assert list(result["arms"]) == ["generate", "loop", "chain", "tree"]
    lacks = result["baselines"]["generate-compiled"]["lacks"]
    assert lacks == "a graph: RuntimeError: no vectors"
    assert "lacks a graph" in out


def test_compile_without_a_compiler_is_refused_before_anything_is_loaded(monkeypatch):
    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(UserError, match="install g\\+\\+"):
        script("speedup").main(["--compile", "--target", "no-such-folder/at-all/here"])


# ---- lossless.py, acceptance.py, tables.py -------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_lossless_passes_in_every_dtype_by_its_own_rule(here, capsys, dtype):
    more = ("--dtype", dtype, "--prompts", "a.jsonl", "--tree", "static", "--chain", "3")
    assert script("lossless").main(arguments(*more)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["passed"] is True
    assert set(result["modes"]) == {"chain", "tree"}
    for mode in result["modes"].values():
        assert (mode["rescored"] is not None) == (dtype == "bfloat16")
        assert len(mode["differences"]) == mode["total"] - mode["matched"]


def test_in_half_precision_a_different_answer_is_judged_at_all_its_tokens(monkeypatch):
    """A near tie first and a bad token behind it: the first difference alone would pass."""
    target = tiny_target()
    target.model.to(torch.bfloat16)
    ids = [5, 6, 7]

    def ranked(tokens: list[int]) -> list[int]:
        logits = target.model(torch.tensor([tokens])).logits[0, -1]
        return logits.argsort(descending=True).tolist()

    best, second = ranked(ids)[:2]
    wanted, answer = [best, 9], [second, ranked([*ids, second])[-1]]
    prompt = Prompt("p", "", "s", [], ids)
    outcomes = {
        key: Outcome([row], AcceptanceStats(), 0)
        for key, row in (("generate", wanted), ("same", wanted), ("other", answer))
    }
    units = [Unit([prompt], outcomes)]
    same = agreement(target, units, ["same"])["same"]
    assert same == {"lossless": True, "gap": 0.0, "differences": []}
    small, large = token_gaps(target, ids, [answer])[0]
    assert small < large
    monkeypatch.setattr("adaspec_eagle.rescore.MARGIN", (small + large) / 2)
    found = agreement(target, units, ["generate", "same", "other"])["other"]
    assert (found["lossless"], found["gap"]) == (False, large)


def test_in_float32_what_comes_behind_a_tie_is_judged_too():
    """Two equal rows of the output layer: a tie first, and a bad token behind it."""
    target = tiny_target(dtype=torch.float32)
    rows, ids = target.model.get_output_embeddings().weight.data, [5, 6, 7]
    logits = target.model(torch.tensor([ids])).logits[0, -1]
    best = int(logits.argmax())
    twin, last = (best + 1) % 97, int(logits.argmin())
    rows[twin] = rows[best]
    prompt = Prompt("p", "", "s", [], ids)
    scored = {"same": [best, 9], "tie": [twin], "bad": [twin, last]}
    after = target.model(torch.tensor([[*ids, twin]])).logits[0, -1]
    scored["tie"].append(int(after.argmax()))
    assert after.max() - after[last] > 1e-3
    outcomes = {key: Outcome([row], AcceptanceStats(), 0) for key, row in scored.items()}
    units = [Unit([prompt], outcomes | {"generate": outcomes["same"]})]
    found = agreement(target, units, [*scored])
    assert [one["lossless"] for one in found.values()] == [True, True, False]
    first = [difference(target, prompt, scored["same"], scored[key]) for key in ("tie", "bad")]
    assert all(one.tie for one in first)
    for key, one in zip(("tie", "bad"), first, strict=True):
        gaps = token_gaps(target, ids, [scored[key]])[0]
        record = judge("chain:3", torch.float32, [one], gaps, 1, margin=0.5)
        assert record["passed"] == (key == "tie")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lossless_fails_where_an_answer_stops_short(dtype, here, monkeypatch):
    def short(bench, shape, ids, mask):
        answers, stats = greedy_baseline(bench.target, bench.max_new_tokens, ids, mask)
        return [answer[:-2] for answer in answers], stats

    monkeypatch.setattr("adaspec_eagle.rescore.decode", short)
    more = ("--prompts", "a.jsonl", "--chain", "2", "--dtype", dtype, "--margin", "0.01")
    assert script("lossless").main(arguments(*more)) == 1


def test_answers_rescored_together_score_as_each_does_in_one_forward():
    """They share their beginnings: one goes on, one stops early, one differs from the start."""
    target = tiny_target()
    answers = [[9, 10, 11, 12], [9, 10, 13, 14, 15], [9, 10], [16, 17]]
    for answer, gaps in zip(answers, token_gaps(target, [5, 6, 7], answers), strict=True):
        logits = target.model(torch.tensor([[5, 6, 7, *answer]])).logits[0, 2:-1].detach()
        wanted = logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(gaps), wanted.float())


def test_lossless_fails_where_an_answer_is_not_the_targets(here, capsys, monkeypatch):
    def wrong(bench, shape, ids, mask):
        answers, stats = greedy_baseline(bench.target, bench.max_new_tokens, ids, mask)
        return [[*answer[:3], (answer[3] + 1) % 97, *answer[4:]] for answer in answers], stats

    module = script("lossless")
    monkeypatch.setattr("adaspec_eagle.rescore.decode", wrong)
    assert module.main(arguments("--prompts", "a.jsonl", "--chain", "2")) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    first = result["modes"]["chain"]["differences"][0]
    assert first["position"] == 3
    assert first["gap"] > 1e-4
    assert module.main(arguments("--dtype", "bfloat16", "--prompts", "a.jsonl")) == 1


def test_acceptance_names_its_figures_apart(here, capsys):
    files = ("--prompts", "a.jsonl", "b.jsonl", "--chain", "3", "--out", "accepted")
    assert script("acceptance").main(arguments(*files)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    whole = json.loads((here / "accepted" / "result.json").read_text())
    assert [len(rows) for rows in whole.pop("per_prompt").values()] == [3, 2]
    assert result == whole
    assert list(result["tasks"]) == ["a.jsonl", "b.jsonl"]
    for one in [*result["tasks"].values(), result["all"]]:
        assert len(one["overlap"]) == 3
        assert all(0 <= share <= 1 for share in one["overlap"] + one["alpha_by_depth"])
        for name in ("greedy_alpha", "alpha_t1"):
            low, high = one[f"{name}_ci95"]
            assert low <= one[name] <= high


def test_tables_come_from_the_record_and_check_sees_a_stale_one(measured, here, capsys):
    readme = here / "README.md"
    readme.write_text(
        "top\n<!-- table:measured -->\nold\n<!-- /table -->\n"
        "<!-- table:measured/files -->\n<!-- /table -->\nend\n"
    )
    where = ["--pages", str(readme), "--results", str(here)]
    tables = script("tables")
    assert tables.main([*where, "--check"]) == 1
    assert "old" in readme.read_text()
    assert tables.main(where) == 0
    assert tables.main([*where, "--check"]) == 0
    text = readme.read_text()
    assert f"{measured['arms']['tree']['tau']:.2f}" in text
    assert measured["headline"]["sentence"] in text
    assert text.startswith("top\n<!-- table:measured -->\n|")
    assert text.endswith("<!-- /table -->\nend\n")


# ---- choices and bad input -----------------------------------------------------------------------


def test_a_head_for_other_weights_is_passed_over(work, here):
    target = Target.load("target", dtype="float32")
    config = json.loads((work / "runs/one/head/config.json").read_text())
    newer = work / "runs" / "two" / "head"
    newer.mkdir(parents=True, exist_ok=True)
    (newer / "config.json").write_text(json.dumps(config | {"target_fingerprint": "0" * 16}))
    assert find_head(target).folder == Path("runs/one/head")


def test_without_a_head_the_error_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match=r"train_head\.py"):
        find_head(tiny_target(), tmp_path)


def test_a_prompt_longer_than_the_context_is_named(here, capsys):
    write_prompts(here / "long.jsonl", ["w1", "w2 " * 600])
    prompts = arguments("--prompts", "long.jsonl")
    assert run_main(script("speedup").main, prompts) == 2
    message = capsys.readouterr().err
    assert "long-1" in message
    assert "context of 512" in message


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("speedup", ["--max-new-tokens", "1"], "nothing is drafted"),
        ("acceptance", ["--max-new-tokens", "1"], "nothing is drafted"),
        ("speedup", ["--arm", "decoder"], "my_decoder.py:forward"),
        ("speedup", ["--tree", "chain:3"], "--chain K"),
        ("speedup", ["--temperature", "1", "--baselines", "lookup"], "greedily"),
        ("speedup", ["--temperature", "1", "--arm", "decoder.py:forward"], "greedily"),
        ("speedup", ["--temperature", "nan"], "at least 0"),
        ("lossless", ["--margin", "nan"], "at least 0"),
        ("lossless", ["--margin", "-1"], "at least 0"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_any_work(
    here, monkeypatch, capsys, name, options, words
):
    monkeypatch.setattr(Target, "load", None)
    with suppress(SystemExit):  # argparse's own way
        assert run_main(script(name).main, [*arguments(), *options]) == 2
    assert words in capsys.readouterr().err


def test_chains_deeper_than_the_head_drafts_name_their_flag(here, monkeypatch, capsys):
    monkeypatch.setattr(Eagle3Head, "deepest", 4)
    assert run_main(script("acceptance").main, arguments("--prompts", "a.jsonl")) == 2
    assert "give --chain 4" in capsys.readouterr().err


def test_a_missing_prompt_file_is_named(here, capsys):
    assert run_main(script("speedup").main, arguments("--prompts", "none.jsonl")) == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tree", "chain", "shapes"),
    [
        (None, None, {"chain": "chain:4", "tree": "auto"}),
        ([], None, {"chain": "chain:4", "tree": "auto"}),
        (["static"], None, {"chain": "chain:4", "tree": "static"}),
        (["auto", "static"], 3, {"chain": "chain:3", "tree": "auto", "static": "static"}),
        (None, 6, {"chain": "chain:6"}),
        (["dynamic"], 2, {"chain": "chain:2", "tree": "dynamic"}),
    ],
)
def test_shapes_follow_tree_and_chain(tree, chain, shapes):
    assert draft_shapes(tree, chain) == shapes


def test_the_baseline_leaves_the_models_own_settings_as_they_were():
    target = tiny_target()
    target.model.generation_config.repetition_penalty = 5.0
    plain, _ = greedy_baseline(target, 6, *tokens([7, 8, 9]))
    assert target.model.generation_config.repetition_penalty == 5.0
    target.model.generation_config.repetition_penalty = 1.0
    assert greedy_baseline(target, 6, *tokens([7, 8, 9]))[0] == plain


def tokens(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of ids and its mask."""
    row = torch.tensor([ids])
    return row, torch.ones_like(row)


def test_rows_of_unequal_length_count_the_same_alone_and_in_a_batch():
    target = tiny_target()
    prompts = [Prompt(str(n), "", "", [], list(range(9, 9 + n))) for n in (3, 5)]
    both, stats = greedy_baseline(target, 6, *left_padded(target, [p.ids for p in prompts]))
    alone = [greedy_baseline(target, 6, *left_padded(target, [p.ids])) for p in prompts]
    assert both == [answers[0] for answers, _ in alone]
    summed = total([one for _, one in alone])
    assert (stats.rounds, stats.new_tokens) == (summed.rounds, summed.new_tokens)
    assert AcceptanceStats(stats.accepted).accepted_tokens == 0


@pytest.mark.slow
def test_training_arms_take_turns_and_count_useful_work(here, capfd):
    """Three processes at tiny sizes; the useful work is counted by hand."""
    bench = script("bench_training")
    sizes = ["--target", "target", "--dtype", "float32", "--rows", "2", "--length", "12"]
    sizes += ["--draft-vocab", "40", "--steps", "1", "--turns", "2", "--out", "t.json"]
    assert bench.main(sizes) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found == json.loads(Path("t.json").read_text())
    assert set(found["arms"]) == set(bench.ARMS)
    assert all(len(arm["seconds"]) == 2 for arm in found["arms"].values())
    assert found["arms"]["adaspec ahead"]["ahead"] > 0
    layers = 64 * 32 * 2 + 2 * 64 * 16 + 32 * 32 - 32 * 64 + 3 * 32 * 48  # q, k, v, o, gates
    assert found["useful_flop_per_token"] == 3 * (6 * layers + 4 * 40 * 32) + 4 * 96 * 32 + 2 * 1280


def test_one_step_is_refused_before_any_work():
    with pytest.raises(UserError, match="one step, which shows no spread"):
        script("bench_training").main(["--steps", "1", "--turns", "1", "--target", "nowhere"])


# ---- bench_forwards.py, bench_rounds.py ----------------------------------------------------------


@pytest.mark.parametrize("given", [["--target", "target"], ["--random", "target"]])
def test_forwards_are_timed_by_size(given, here, capsys):
    """By real weights and a real head, and by random ones of that size, which the output says."""
    options = [*given, "--dtype", "float32", "--turns", "1", "--out", "forwards"]
    assert script("bench_forwards").main(options) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert result["random_weights"] == ("--random" in given)
    assert ("times only" in shown) == result["random_weights"]
    assert {int(n) for n in result["forward_seconds"]} == set(SIZES)
    assert all(seconds > 0 for seconds in result["level_seconds"].values())
    assert json.loads((here / "forwards" / "result.json").read_text()) == result


def test_a_size_that_is_not_known_is_refused(here, capsys):
    assert run_main(script("bench_forwards").main, ["--random", "phi-3"]) == 2
    assert "phi-2" in capsys.readouterr().err


def test_what_a_round_costs_by_itself_is_part_of_it(here, capsys):
    given = ["--target", "target", "--dtype", "float32", "--contexts", "32", "64", "--rounds", "3"]
    assert script("bench_rounds").main([*given, "--out", "rounds"]) == 0
    assert "against the first" in capsys.readouterr().out
    result = json.loads((here / "rounds" / "result.json").read_text())
    assert len(result["head"]["sha256"]) == 64
    assert result["target"]["dtype"] == "float32"
    assert min(result["rounds"].values()) >= 3
    answers = [costs for context in ("32", "64") for costs in result["answers"][context]]
    assert all(0 < costs["own_seconds"] < costs["round_seconds"] for costs in answers)
    assert {costs["nodes"] for costs in answers} == {8}  # as many every round
    assert all(1 <= costs["depth"] <= 4 for costs in answers)
