"""Decoding, training and measuring on a device that is not the CPU, imitated (imitated.py)."""

from decimal import Decimal

import pytest
import torch

from adaspec_eagle import generate, speculative
from adaspec_eagle.acceptance import acceptance_figures
from adaspec_eagle.compiled import _Graphs
from adaspec_eagle.distill import (
    AnswerSet,
    Objective,
    collate,
    make_batch,
    step_losses,
    target_tokens,
)
from adaspec_eagle.features import make_table
from adaspec_eagle.generate import Stopwatch, _Run
from adaspec_eagle.onpolicy import draft_answers
from adaspec_eagle.optim import make_optimizer
from adaspec_eagle.prepare import reference_losses
from adaspec_eagle.rescore import token_gaps
from adaspec_eagle.selection import OBSERVED, SELECTIONS, TokenStats, chosen_weights
from tests.imitated import NAME, Remote, imitated, moved
from tests.records import record
from tests.test_sampling import batch
from tests.tiny import tiny_head, tiny_target

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_acc"), reason="this torch takes no device from Python"
)
RECORDS = [record(2 + n % 3, 5 + n, seed=n) for n in range(4)]
SAMPLED = {"temperature": 1.0}
NUCLEUS = {"temperature": 1.5, "top_p": 0.6}
CUT = {"temperature": 0.7, "top_k": 20, "min_p": 0.02}


@pytest.fixture
def device(monkeypatch):
    """The imitated device, and what went between it and the host."""
    with imitated(monkeypatch) as traffic:
        yield traffic


def good_head(target):
    """Drafts what the target says: made of its own layers."""
    head = tiny_head(target, "lm:layers=3", draft_vocab=None)
    head.start_from(target)
    return head


def there(target, head):
    """Both on the imitated device."""
    moved(target.model)
    return moved(head).bind(target)


# ---- the imitation itself ------------------------------------------------------------------------


def test_tensors_of_two_devices_are_refused(device):
    here, far = torch.ones(3), torch.ones(3, device=NAME)
    assert torch.equal((far + 2).cpu(), here * 3)
    with pytest.raises(RuntimeError, match="two devices"):
        far + here
    with pytest.raises(RuntimeError, match="two devices"):
        torch.cat([far, here])


def test_reads_and_sends_are_counted(device):
    far = torch.tensor([3.0, 0.0], device=NAME)
    assert (device.reads, device.sends) == (0, 1)
    assert far.tolist() == [3.0, 0.0]
    assert bool(far.any())
    assert far[far > 1].shape == (1,)
    assert (device.reads, device.sends) == (3, 1)


def test_a_graph_computes_again_and_refuses_to_read(device):
    def step(x, mask, columns, buffer):
        buffer.index_copy_(0, columns, x)
        return (buffer * 2).sum(0), None

    buffer = torch.zeros(2, 1, 1, 1, 4, 1, device=NAME)
    graphs = _Graphs(lambda x, mask, columns, kept: step(x, mask, columns, kept.flatten()))
    mask = torch.zeros(1, 1, 1, 4, device=NAME)
    for number, place in ((1.0, 0), (5.0, 3)):
        x, columns = torch.tensor([number], device=NAME), torch.tensor([place], device=NAME)
        total = graphs(x, mask, columns, buffer)[0].item()
    assert total == 12.0
    assert len(graphs.graphs) == 1
    reading = _Graphs(lambda *inputs: (inputs[0] * inputs[0].item(), None))
    with pytest.raises(RuntimeError, match="captured"):
        reading(torch.ones(1, device=NAME), mask, torch.zeros(1, device=NAME), buffer)


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "tree", "how"),
    [
        (tiny_head, None, NUCLEUS),
        (tiny_head, "dynamic", {}),
        (tiny_head, "sampled:3", SAMPLED),
        (good_head, "chain:3", {}),
        (good_head, "auto", {}),
        (good_head, "static", SAMPLED),
        (good_head, "dynamic", NUCLEUS),
        (good_head, "chain:3", CUT),
        (good_head, "sampled:3", NUCLEUS),
    ],
)
def test_answers_are_the_cpus_with_one_read_a_round(make, tree, how, monkeypatch):
    """Where rows are sampled alike, whatever their history; a greedy round sends nothing."""
    target = tiny_target(num_hidden_layers=3)
    head = make(target) if tree else None
    ids, mask = batch(3)
    how = how | {"tree": tree or "dynamic", "max_new_tokens": 12}
    wanted = generate(target, head, ids, mask, **how)
    traffic, round_ = [], _Run.round

    def counted(run, running):
        before = (device.reads, device.sends)
        made = round_(run, running)
        traffic.append((device.reads - before[0], device.sends - before[1], all(running)))
        return made

    monkeypatch.setattr(_Run, "round", counted)
    with imitated(monkeypatch) as device:
        head = there(target, head) if head else moved(target.model) and None
        found = generate(target, head, ids.to(NAME), mask.to(NAME), **how)
    assert found.answers == wanted.answers
    assert found.stats.accepted == wanted.stats.accepted or tree == "auto"
    assert make is tiny_head or tree is None or sum(found.stats.accepted[1:])
    assert {reads for reads, _, _ in traffic} == {1}
    sends = [sent for _, sent, whole in traffic[1:] if whole]  # the first sends a tree's shape
    assert sends
    assert sum(sends) == 0 or "temperature" in how or tree == "auto"  # auto: of some later ones


@pytest.mark.parametrize("how", [{"repetition_penalty": 1.3}, {"min_new_tokens": 8, **SAMPLED}])
def test_rows_with_a_history_are_walked(how, device):
    target = tiny_target(num_hidden_layers=3)
    head = good_head(target)
    ids, mask = batch(3)
    wanted = generate(target, head, ids, mask, max_new_tokens=10, **how)
    there(target, head)
    found = generate(target, head, ids.to(NAME), mask.to(NAME), max_new_tokens=10, **how)
    assert found.answers == wanted.answers


@pytest.mark.parametrize(
    ("name", "tree", "how"),
    [("eagle3", "chain:3", {}), ("eagle3", "dynamic", NUCLEUS), ("medusa", "dynamic", {}),
     ("lm:layers=2", "chain:3", {})],
)  # fmt: skip
def test_captured_graphs_give_the_cpus_answers(name, tree, how, device):
    """Every forward of a round is a replay; prompts of several lengths."""
    target = tiny_target(num_hidden_layers=3)
    head = tiny_head(target, name)
    ids, mask = batch(3)
    wanted = generate(target, None, ids, mask, max_new_tokens=16, **how)
    there(target, head)
    ids, mask = ids.to(NAME), mask.to(NAME)
    found = generate(target, head, ids, mask, tree, 16, compiled=True, **how)
    assert found.answers == wanted.answers


# ---- training and measuring ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("eagle3", "fkl"),
        ("eagle3", "lk"),
        ("eagle1", "feature=1,fkl=0.1"),
        ("medusa", "nla=1,jsd=1"),
        ("lm:layers=2", "tv"),
        ("eagle3", "rkl=1,ce=1,text=1"),
    ],
)
def test_gradients_are_the_cpus(name, loss, device):
    target = tiny_target(num_hidden_layers=3)
    head = tiny_head(target, name).train()
    objective = Objective(loss, unroll=2)
    wanted = gradients(target, head, objective)
    head.zero_grad()
    there(target, head)
    found = gradients(target, head, objective)
    assert found
    assert found.keys() == wanted.keys()
    for weight, gradient in found.items():
        torch.testing.assert_close(gradient.cpu(), wanted[weight])


def gradients(target, head, objective):
    """Of the sum of a batch's losses."""
    items = [AnswerSet(RECORDS)[n] for n in range(len(RECORDS))]
    found = make_batch(target, head, collate(items))
    tokens = target_tokens(target, head, found, full=objective.needs_full)
    step_losses(head, objective, found, tokens).total.sum().backward()
    return {n: w.grad for n, w in head.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_choose_the_same(name, device):
    numbers = torch.Generator().manual_seed(0)
    steps = {
        part: torch.rand(3, 40, generator=numbers) for part in ("loss", "reference", *OBSERVED)
    }
    where = {"mask": steps["loss"] > 0.2, "rows": torch.arange(40) // 10}
    where["positions"] = torch.arange(40) % 10

    def stats(move):
        tensors = {part: move(value) for part, value in (steps | where).items()}
        return TokenStats(
            **tensors, keep=Decimal("0.4"), generator=torch.Generator().manual_seed(1)
        )

    found = chosen_weights(name, stats(Remote))
    assert torch.equal(found.cpu(), chosen_weights(name, stats(torch.clone)))


def test_acceptance_figures_are_the_cpus(device):
    target = tiny_target(num_hidden_layers=3)
    head = good_head(target)
    prompts = [[9, 10, 11, 12], [20, 21, 22]]
    wanted = acceptance_figures(target, head, prompts, 12, 3)
    there(target, head)
    found = acceptance_figures(target, head, prompts, 12, 3)
    assert found["greedy_alpha"] == wanted["greedy_alpha"] == 1
    for name, value in wanted.items():
        if name != "per_prompt":
            assert found[name] == pytest.approx(value), name


# ---- what else runs on the target's device -------------------------------------------------------


def trained(target, head):
    """Weights behind two steps of Muon and AdamW."""
    optimizer = make_optimizer("muon", head.train(), 1e-3, torch.bfloat16)
    for _ in range(2):
        gradients(target, head, Objective(unroll=2))
        optimizer.step()
    return [weight.detach().cpu() for weight in head.parameters()]


def reference(target, head):
    """Losses of a reference head."""
    *_, (_, found) = reference_losses(target, head, AnswerSet(RECORDS), Objective(unroll=2))
    return found


def table(target, head):
    """Features in memory."""
    ids = [one.ids for one in RECORDS]
    *_, (_, found) = make_table(target, ids, head.config.feature_layers)
    return found.rows


def on_policy(target, head):
    """Answers that the head writes."""
    return draft_answers(target, head, [[1, 20, 21], [1, 30]], [9, 8], [5, 0], 3, 3)


def gaps(target, head):
    """How far answers are from the target's own."""
    return token_gaps(target, [1, 20, 21], [[22, 23, 24], [22, 23, 25]])


def plugged(target, head):
    """transformers' generate with the plug, sampled."""
    ids, mask = (x.to(target.device) for x in batch(2))
    torch.manual_seed(0)
    plug = speculative(head, tree="dynamic")
    how = {"do_sample": True, "top_p": 0.7, "max_new_tokens": 6, "pad_token_id": 0}
    made = target.model.generate(ids, attention_mask=mask, custom_generate=plug, **how)
    return made.tolist()


@pytest.mark.parametrize("work", [trained, reference, table, on_policy, gaps, plugged])
def test_other_work_gives_what_it_gives_on_the_cpu(work, device):
    target = tiny_target(num_hidden_layers=3)
    head = tiny_head(target)
    copied = tiny_head(target)
    copied.load_state_dict(head.state_dict())
    wanted = work(target, copied)
    there(target, head)
    torch.testing.assert_close(work(target, head), wanted)


# ---- time ----------------------------------------------------------------------------------------


def test_on_cuda_parts_are_timed_by_events_that_nothing_waits_for(monkeypatch):
    """Milliseconds in the stream; the device is waited for at begin and end alone."""
    waits, stream = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            stream[0] += 250.0
            self.at = stream[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = Stopwatch(torch.device("cuda"))
    clock.begin -= 10
    for name in ("draft", "verify", "draft"):
        with clock.part(name):
            pass
    assert clock.forward(lambda x: 2 * x)(3) == 6
    assert len(waits) == 1
    seconds, forwards = clock.stop()
    assert forwards == 0.25
    assert (seconds["draft"], seconds["verify"]) == (0.5, 0.25)
    assert seconds["rest"] == pytest.approx(9.25, abs=0.1)
    assert len(waits) == 2
