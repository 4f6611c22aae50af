"""Suites, the report and the reproduction, through their `main`, on a tiny target and head."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from adaspec_eagle import Target, generate
from adaspec_eagle.bench import make_prompt
from adaspec_eagle.contrasts import METRICS
from adaspec_eagle.errors import UserError, run_main
from adaspec_eagle.plots import Drawing, canvas, svg, training_drawings
from adaspec_eagle.report import write_report
from adaspec_eagle.suite_tables import published, suite_tables
from adaspec_eagle.suites import SUITES, chosen_sets, read_questions, read_sets
from adaspec_eagle.targets import left_padded
from tests.test_eval_scripts import script, write_prompts
from tests.tiny import tiny_head, tiny_target, tiny_target_folder

HEAT = 1.3


def two_turns(path: Path) -> None:
    """A question file as EAGLE's repository has them: two prompts of two turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question_id": 80 + n, "category": "writing", "turns": [f"w{n} w2 w3", "w30 w31"]}
        for n in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A target, a head, and stand-ins for EAGLE's and Spec-Bench's files."""
    folder = tmp_path_factory.mktemp("suites")
    target = Target.load(tiny_target_folder(folder / "target"), dtype="float32")
    tiny_head(target).save(folder / "runs" / "one" / "head")
    data = folder / "data"
    two_turns(data / "mt_bench" / "question.jsonl")
    for one in SUITES["eagle"].sets[1:]:
        write_prompts(data / f"eagle_{one.name}.test.jsonl", ("w1 w2", "w4 w5 w6"))
    rows = [
        {"question_id": n, "category": category, "turns": [f"w{n} w{n + 1}"]}
        for n, category in enumerate(["coding", "translation", "summarization", "qa", "qa",
                                      "math_reasoning", "rag"])
    ]  # fmt: skip
    (data / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for one in SUITES["adaspec"].sets:
        write_prompts(data / f"{one.name}.test.jsonl", ("w7 w8", "w9"))
    return folder


@pytest.fixture
def here(work, monkeypatch):
    """Work in that folder."""
    monkeypatch.chdir(work)
    return work


def arguments(suite: str, *more: str) -> list[str]:
    """Tiny settings of bench.py."""
    target = ["--target", "target", "--dtype", "float32", "--max-new-tokens", "6"]
    return ["--suite", suite, "--data-root", "data", *target, *more]


@pytest.fixture(scope="module")
def measured(work):
    """EAGLE's six sets, greedy and sampled, as result.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        heats = ("--temperature", "0", str(HEAT), "--tree", "dynamic", "--out", "out")
        assert script("bench").main(arguments("eagle", *heats)) == 0
    return json.loads((work / "out" / "result.json").read_text())


# ---- suites --------------------------------------------------------------------------------------


def test_a_second_turn_is_asked_behind_the_arms_own_first_answer(work, measured):
    """Counted again by hand: both turns of the tree arm, from its own answers."""
    target = Target.load(work / "target", dtype="float32")
    row = read_questions(work / "data/mt_bench/question.jsonl", SUITES["eagle"].sets[0])[0]
    prompt = make_prompt(row, "mt_bench", target, 6)
    first = generate(target, None, *left_padded(target, [prompt.ids]), max_new_tokens=6).answers[0]
    messages = [
        *prompt.messages,
        {"role": "assistant", "content": target.tokenizer.decode(first, skip_special_tokens=True)},
        {"role": "user", "content": "w30 w31"},
    ]
    following = make_prompt({"id": "x", "messages": messages}, "", target, 6)
    row = left_padded(target, [following.ids])
    second = generate(target, None, *row, max_new_tokens=6).answers[0]
    unit = measured["runs"][0]["per_prompt"][0]
    assert unit["ids"] == ["mt_bench-80"]
    for arm in unit["arms"].values():
        assert arm["answer_tokens"] == [len(first), len(second)]
        assert arm["new_tokens"] == len(first) + len(second)
        assert arm["matched"] == [True, True]


def test_sampled_arms_give_the_loops_own_answers(measured):
    greedy, sampled = measured["runs"]
    assert (greedy["temperature"], sampled["temperature"]) == (0.0, HEAT)
    assert sampled["matched_with"] == "loop"
    for key in ("loop", "chain", "tree"):
        assert sampled["arms"][key]["matched"] == sampled["arms"][key]["total"]
    assert all(arm["matched"] == arm["total"] for arm in greedy["arms"].values())
    assert sampled["arms"]["generate"]["matched"] < sampled["arms"]["generate"]["total"]


def test_a_result_holds_hashes_and_no_text_of_a_prompt(work, measured):
    text = json.dumps(measured)
    assert "w30" not in text.replace(json.dumps(measured["traces"]), "")
    target = Target.load(work / "target", dtype="float32")
    (source,) = read_sets(chosen_sets("eagle", ["qa"]), work / "data", target, None, 6)
    units = [u for u in measured["runs"][0]["per_prompt"] if u["file"] == "qa"]
    assert [u["sha256"] for u in units] == [[prompt.sha256] for prompt in source.prompts]
    assert len({u["sha256"][0] for u in measured["runs"][0]["per_prompt"][:4]}) == 4


def test_a_finished_set_is_not_measured_again_and_other_settings_are_refused(
    here, measured, monkeypatch, capsys
):
    module = script("bench")
    monkeypatch.setattr(module, "run_arms", None)  # would fail if it were called
    heats = ("--temperature", "0", str(HEAT), "--tree", "dynamic", "--out", "out")
    assert module.main(arguments("eagle", *heats)) == 0
    again = json.loads(Path("out/result.json").read_text())
    assert again["runs"][0]["arms"]["tree"] == measured["runs"][0]["arms"]["tree"]
    assert run_main(module.main, [*arguments("eagle", *heats), "--seed", "5"]) == 2
    assert "measured with another" in capsys.readouterr().err


def test_specbench_is_split_by_category(here, capsys):
    assert script("bench").main(arguments("specbench", "--temperature", "0", "--tree")) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    counts = {name: one["prompts"] for name, one in result["runs"][0]["files"].items()}
    assert counts == {one.name: 1 + (one.name == "qa") for one in SUITES["specbench"].sets}
    assert "Leaderboard" in printed
    assert "RTX 3090" in printed


def test_adaspec_shows_greedy_alpha_beside_the_papers(here, capsys):
    assert script("bench").main(arguments("adaspec", "--temperature", "0", "--chain", "3")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (table,) = suite_tables(result)
    assert table.header[4:] == ["GSM8K", "Alpaca", "MBPP", "CNN/DM", "XSUM"]
    ours, *theirs = table.rows
    alpha = result["runs"][0]["files"]["gsm8k"]["arms"]["chain"]["greedy_alpha"]
    assert ours[4].split(" [")[0] == f"{100 * alpha:.2f}"
    assert ["published", "AdaSPEC, Pythia-31M, 3 epochs", "Pythia-1.4B"] in [r[:3] for r in theirs]


def test_eagles_table_has_the_papers_columns_and_mean(measured):
    greedy, sampled = suite_tables(measured)
    assert greedy.header[4:] == ["MT-bench", "HumanEval", "GSM8K", "Alpaca", "CNN/DM", "Mean",
                                 "Natural Questions"]  # fmt: skip
    run = measured["runs"][0]
    base = run["headline"]["over"]
    five = [run["files"][name]["arms"]["tree"] for name in ("mt_bench", "humaneval", "gsm8k",
                                                            "alpaca", "sum")]  # fmt: skip
    tau = sum(arm["tau"] for arm in five) / 5
    speed = sum(arm[f"speedup_vs_{base}"] for arm in five) / 5
    (row,) = [row for row in greedy.rows if row[1] == "eagle3 head, dynamic"]
    assert row[9] == f"{speed:.2f}x / {tau:.2f}"
    best = [row for row in greedy.rows if row[:3] == ["published", "EAGLE-3", "Vicuna-13B"]]
    assert best[0][4:10] == ["5.58x / 6.65", "6.47x / 7.54", "5.32x / 6.29", "5.16x / 6.17",
                             "5.01x / 6.47", "5.51x / 6.62"]  # fmt: skip
    assert [row for row in sampled.rows if row[0] == "published"] == []  # of temperature 1 only


def test_published_means_are_those_of_their_rows():
    """Figures were copied by hand: a slip shows in the mean (one of the paper's is off by 0.04)."""
    for row in published("eagle")["rows"]:
        cells = [value for name, value in row["sets"].items() if name != "mean"]
        if len(cells) == 5:
            for place in range(2):
                mean = sum(cell[place] for cell in cells) / 5
                assert mean == pytest.approx(row["sets"]["mean"][place], abs=0.06), row


def test_missing_sets_are_all_named_with_a_way_out(here, capsys):
    shutil.copytree("data", "some", ignore=shutil.ignore_patterns("*gsm8k*", "mt_bench"))
    asked = [*arguments("eagle"), "--data-root", "some"]
    assert run_main(script("bench").main, asked) == 2
    message = capsys.readouterr().err
    assert "lacks 2 of 6" in message
    assert "eagle_gsm8k.test.jsonl or gsm8k/question.jsonl" in message
    assert "--sets humaneval alpaca sum qa" in message


def test_what_may_be_training_data_is_no_test_set(tmp_path):
    write_prompts(tmp_path / "gsm8k.jsonl")
    with pytest.raises(UserError, match=r"gsm8k\.test\.jsonl"):
        read_sets(chosen_sets("adaspec", ["gsm8k"]), tmp_path, tiny_target(), 1, 4)


def test_a_set_is_fetched_from_its_address_once(work, tmp_path, monkeypatch):
    import dataclasses

    monkeypatch.setattr("adaspec_eagle.suites.default_cache_dir", lambda: tmp_path)
    file = tmp_path / "question.jsonl"
    two_turns(file)
    (known,) = chosen_sets("eagle", ["mt_bench"])
    one = dataclasses.replace(known, hub=file.as_uri())
    target = tiny_target()
    (source,) = read_sets([one], None, target, 1, 4)
    assert [prompt.later for prompt in source.prompts] == [("w30 w31",)]
    file.unlink()
    assert read_sets([one], None, target, 1, 4) == [source]
    gone = dataclasses.replace(known, hub=(tmp_path / "none.jsonl").as_uri())
    with pytest.raises(UserError, match="--data-root"):
        read_sets([gone], None, target, 1, 4)


# ---- reproduction --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(work):
    """A README with a table, its record, and the file that was measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        target = ["--target", "target", "--dtype", "float32", "--max-new-tokens", "8"]
        more = ["--prompts", "data/eagle_qa.test.jsonl", "--out", "results/one"]
        more += ["--head", "runs/one/head"]
        assert script("speedup").main(["--tree", *target, *more]) == 0
        Path("README.md").write_text("<!-- table:one -->\n<!-- /table -->\n")
        Path("docs").mkdir()
        Path("docs/results.md").write_text("<!-- table:one/files -->\n<!-- /table -->\n")
    return work / "results" / "one" / "result.json"


def test_a_table_measured_again_agrees_and_an_altered_record_does_not(here, recorded, capsys):
    reproduce = script("reproduce").main
    assert reproduce(["--data-root", "data", "--out", "again"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["records"][0]["whole"] is True
    assert set(last["records"][0]["compared"]) == {"chain", "tree"} | {"generate", "loop"}
    before = recorded.read_text()
    altered = json.loads(before)
    for unit in altered["per_prompt"]:
        unit["arms"]["chain"]["tokens"] *= 3
    recorded.write_text(json.dumps(altered))
    try:
        assert reproduce(["--data-root", "data"]) == 1
        assert reproduce(["--data-root", "data", "--minutes", "0.0001"]) == 1
        assert "a subset, the first 1 of each file" in capsys.readouterr().out
    finally:
        recorded.write_text(before)


def test_the_recorded_head_is_measured_again_not_the_newest(here, recorded):
    before = recorded.read_text()
    altered = json.loads(before)
    altered["arguments"]["head"] = None
    target = Target.load("target", dtype="float32")
    tiny_head(target).save(Path("runs", "newer", "head"))
    recorded.write_text(json.dumps(altered))
    try:
        assert script("reproduce").main(["--data-root", "data", "--out", "again"]) == 0
        (found,) = json.loads(Path("again", "result.json").read_text())["records"]
        assert found["head"]["folder"] == str(Path("runs", "one", "head"))
    finally:
        recorded.write_text(before)
        shutil.rmtree(Path("runs", "newer"))


def test_questions_are_found_by_text_in_eagles_own_layout(here, recorded, tmp_path):
    """The file of EAGLE's repository: all questions, in its form, with second turns."""
    lines = Path("data", "eagle_qa.test.jsonl").read_text().splitlines()
    texts = ["w9", *(json.loads(line)["messages"][0]["content"] for line in lines)]
    rows = [{"question_id": 322 + n, "turns": [text, "w8"]} for n, text in enumerate(texts)]
    (tmp_path / "qa").mkdir()
    file = tmp_path / "qa" / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("reproduce").main(["--data-root", str(tmp_path)]) == 0


def test_missing_or_other_prompts_are_named(here, recorded, tmp_path, capsys):
    reproduce = script("reproduce").main
    assert run_main(reproduce, ["--data-root", str(tmp_path)]) == 2
    assert "eagle_qa.test.jsonl or qa/question.jsonl: missing" in capsys.readouterr().err
    write_prompts(tmp_path / "eagle_qa.test.jsonl", ("w1",))
    assert run_main(reproduce, ["--data-root", str(tmp_path)]) == 2
    assert "no question has the text (sha256)" in capsys.readouterr().err
    mine, source = script("reproduce"), {"file": "mine.jsonl", "sha256": "0"}
    write_prompts(tmp_path / "mine.jsonl")
    with pytest.raises(UserError, match="another file than the record's"):
        mine.recorded_prompts(mine.Plan("one", {}, 1), source, tmp_path)


# ---- report --------------------------------------------------------------------------------------

FIGURES = ("speed", "round", "acceptance", "histogram", "cost")


@pytest.fixture(scope="module")
def page(work, measured, recorded):
    """The page about both results, its figures exported."""
    other = work / "other"
    other.mkdir(exist_ok=True)
    rows = {"a": {"alpha": 0.5, "<b>": "x & y"}}
    (other / "result.json").write_text(json.dumps({"kind": "lossless", "n": 3, "modes": rows}))
    for seed in range(2):
        cell = {"arm": "adaspec", "seed": seed, "figures": {"tau": 1.25 + seed}, "config": {}}
        (other / "cells").mkdir(exist_ok=True)
        (other / "cells" / f"{seed}.json").write_text(json.dumps(cell))
    gain = {"difference": 0.1, "difference_ci95": [0.05, 0.2], "holds": True, "primary": True}
    arms = {
        name: {
            "seeds": [0, 1],
            "steps": 7,
            "answer_token_passes": 1e6,
            "head_flops": flops,
            "train_tokens_per_s": 100.0,
            "equal_compute": flops == 9,
            "metrics": dict.fromkeys(METRICS, value),
        }
        for name, flops, value in (
            ("distillspec", 9.0, {"value": 0.5, "ci95": [0.4, 0.6]}),
            ("adaspec", 19.0, {"value": 0.625, "ci95": [0.5, 0.7]} | gain),
        )
    }
    summary = {"kind": "compare", "budget": "3", "primary": ["adaspec", "distillspec"],
               "baseline": "distillspec", "tasks": {"gsm8k": arms}, "definitions": {}}  # fmt: skip
    (other / "summary-3.json").write_text(json.dumps(summary))
    notes = {"stage": "head", "curves": [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_tau_sim": 1.2} | {f"eval_match_{n}": 0.4 for n in range(12)},
    ]}  # fmt: skip
    (work / "runs" / "one" / "head" / "train.json").write_text(json.dumps(notes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        folders = ["out", "results/one", "other", "runs/one"]
        found = script("report").main([*folders, "--out", "page.html", "--figures", "figs"])
        assert found == 0
    return (work / "page.html").read_text()


def test_a_page_has_every_figure_and_needs_no_network(page):
    ids = re.findall(r'<svg id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in FIGURES:  # two temperatures, one speed-up
        assert sum(one.endswith(f"-{name}") for one in ids) == 3
    assert any("tree-tree" in name for name in ids)
    assert {"loss", "match", "tau_sim"} <= {name.partition("-")[2] for name in ids}
    assert not re.search(r'(src|href)="(https?:)?//', page)
    for element in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(element)


def test_a_comparison_says_where_compute_differs(page):
    """In its table, beside its forest and in words: the difference is not the method's alone."""
    assert "19.0 †" in page
    assert "9.0 †" not in page.replace("19.0 †", "")
    assert "gsm8k: adaspec †" in page
    assert "† other head FLOPs" in page


def test_curves_of_more_steps_than_colours_are_all_there_in_order():
    lines = [{"step": 1, "eval_tau_sim": 1.0} | {f"eval_match_{n}": n / 20 for n in range(12)}]
    match = next(d for d in training_drawings({"curves": lines}) if d.name == "match")
    drawn = canvas(match).axes[0].get_lines()
    assert [line.get_ydata()[0] for line in drawn] == [n / 20 for n in range(12)]


def test_records_of_batches_are_measured_again_by_whole_batches():
    """Five prompts in batches of two, a second each."""
    arms = {"tree": {"seconds": {"draft": 1.0}}}
    units = [{"file": "a", "ids": ids, "arms": arms} for ids in ("ab", "cd", "e")]
    record = {"prompts": [{"prompts": 5}], "per_prompt": units}
    affordable = script("reproduce").affordable
    assert [affordable(record, seconds) for seconds in (0.1, 1, 2.5, 9)] == [2, 2, 4, 5]


def test_a_compiled_or_sampled_record_is_measured_again_as_it_was(
    here, recorded, monkeypatch, capsys
):
    seen = []

    def measured(bench, arms, words):
        seen.append((bench.compiled, bench.temperature))
        raise UserError("far enough")

    before = recorded.read_text()
    altered = json.loads(before)
    altered["arguments"]["compile"] = True
    altered["temperature"] = 0.7
    module = script("reproduce")
    monkeypatch.setattr(module, "run_arms", measured)
    monkeypatch.setattr(module, "check_compiler", lambda device: None)
    recorded.write_text(json.dumps(altered))
    try:
        assert run_main(module.main, ["--data-root", "data"]) == 2
    finally:
        recorded.write_text(before)
    assert seen == [(True, 0.7)]


def test_a_page_colours_what_was_drafted(page, measured):
    pieces = measured["traces"]["tree"]["pieces"]
    marked = re.search(r'<p class="answer">(.*?)</p>', page, re.DOTALL)[1]
    assert marked.count("<mark>") in {
        sum(drafted for _, drafted in one["pieces"]) for one in measured["traces"].values()
    }
    assert re.sub(r"</?mark>", "", marked) == "".join(text for text, _ in pieces)


def test_an_unknown_result_is_listed_and_text_is_escaped(page):
    assert "A result of another kind (lossless)" in page
    assert "&lt;b&gt;" in page
    assert "x &amp; y" in page
    assert "<td>2.25</td>" in page  # a cell of a comparison
    assert "0.625 [0.500, 0.700]" in page
    assert "+0.100 [+0.050, +0.200] *" in page
    assert 'forest-alpha_t1"' in page
    assert "<b>" not in page.split("A result of another kind", 1)[1]
    drawing = Drawing("x", 'a "b" & <c>', "", lambda axes: None)
    element = ElementTree.fromstring(svg(drawing, 'p"<x>'))
    assert element.get("aria-label") == drawing.title
    assert element.get("id") == 'p"<x>'


def test_figures_are_exported_for_a_paper(work, page):
    for ending, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        files = list((work / "figs").glob(f"*.{ending}"))
        assert len(files) == page.count("<svg id=")
        assert all(file.read_bytes().startswith(begin) for file in files)


def test_latex_rows_hold_the_figures(page, measured):
    tree = measured["runs"][0]["arms"]["tree"]
    assert r"\toprule" in page
    assert f"{tree['tau']:.2f}" in page.split(r"\toprule")[1]


def test_a_folder_without_results_is_named(work, measured, tmp_path, capsys):
    with pytest.raises(UserError, match="no result.json"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="no folder .*gone"):
        write_report([work / "out", tmp_path / "gone"])
    assert "<svg id=" in write_report([work / "out", tmp_path])
    assert f"left out, {tmp_path}: no result.json" in capsys.readouterr().err


@pytest.mark.long
def test_a_browser_shows_the_page_without_an_error(work, page, tmp_path):
    """Headless Chromium, desktop light and phone dark: no console line, pictures not empty."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    browser = next(filter(None, found), None)
    if browser is None:
        pytest.skip("no Chromium on the path; on Debian: apt-get install chromium")
    look = """
      <script>
      addEventListener("load", () => {
        const figures = [...document.querySelectorAll("svg[id]")];
        const empty = figures.filter(s => s.getBoundingClientRect().height < 60).map(s => s.id);
        const head = document.querySelector("th:nth-child(3) button");
        head.click();
        const cells = [...head.closest("table").tBodies[0].rows].map(r => parseFloat(r.cells[2].textContent));
        const sorted = cells.every((c, i) => !i || cells[i - 1] <= c);
        document.getElementById("theme").click();
        const wide = document.documentElement.scrollWidth - innerWidth;
        console.log("SEEN " + JSON.stringify({n: figures.length, empty, sorted, wide,
          theme: document.documentElement.dataset.theme}));
      });
      </script></body>"""  # noqa: E501 - one expression
    (tmp_path / "page.html").write_text(page.replace("</body>", look))
    for name, size in (("desktop", "1280,1600"), ("phone", "500,1200")):
        shot = tmp_path / f"{name}.png"
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--enable-logging=stderr",
                   f"--user-data-dir={tmp_path / name}", f"--window-size={size}",
                   f"--screenshot={shot}", (tmp_path / "page.html").as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        said = re.findall(r'CONSOLE[^"]*"(.*)", source', done.stderr)
        assert len(said) == 1, said
        seen = json.loads(said[0].removeprefix("SEEN "))
        assert seen["n"] == page.count("<svg id=")
        assert (seen["empty"], seen["sorted"]) == ([], True)
        assert seen["wide"] <= 0
        assert seen["theme"] == "dark"
        assert shot.stat().st_size > 20_000
