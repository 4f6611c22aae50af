"""The Distiller: normalisation, selection, evaluation, features from a table."""

from decimal import Decimal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from adaspec_eagle import distill
from adaspec_eagle.distill import (
    AnswerSet,
    Distiller,
    LengthBuckets,
    Objective,
    collate,
    make_batch,
    step_losses,
    target_tokens,
    teacher_forced,
)
from adaspec_eagle.errors import UserError
from adaspec_eagle.features import make_table, split_rows, target_rows
from adaspec_eagle.head import built_in_heads
from adaspec_eagle.losses import feature_regression, forward_kl
from adaspec_eagle.prepare import reference_losses
from adaspec_eagle.selection import SELECTIONS, needs, select
from adaspec_eagle.unroll import step_masks, unroll
from tests.records import record
from tests.tiny import tiny_head, tiny_target

RECORDS = [record(2 + n % 3, 5 + n, seed=n) for n in range(8)]


def distiller(tmp_path, head, target, objective, batch=8, accumulate=1, reference=None, known=None):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-3,
        max_grad_norm=1e9,
    )
    return Distiller(
        head,
        target=target,
        objective=objective,
        reference=reference,
        args=arguments,
        train_dataset=AnswerSet(RECORDS, reference=known),
        eval_dataset=AnswerSet(RECORDS),
    )


def trained_gradients(
    tmp_path, batch, accumulate, objective, reference=False, name="eagle3", known=False
):
    """Gradients of one optimiser step over all eight records."""
    target = tiny_target()
    head = tiny_head(target, name).train()
    other = tiny_head(target, name) if reference else None
    if other is not None:
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1.2)
    losses = None
    if known:
        *_, (_, losses) = reference_losses(target, other, AnswerSet(RECORDS), objective)
        other.fuse = None  # must not run again
    trainer = distiller(tmp_path, head, target, objective, batch, accumulate, other, losses)
    found = {}

    def remember(*args, **kwargs):
        found.update({n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None})

    trainer.create_optimizer_and_scheduler(1)
    trainer.optimizer.register_step_pre_hook(remember)
    trainer.train()
    return found


@pytest.mark.parametrize("name", built_in_heads())
def test_eight_batches_of_one_equal_one_batch_of_eight(tmp_path, name):
    objective = Objective("feature=1,fkl=0.1" if name == "eagle1" else "fkl", unroll=2)
    one = trained_gradients(tmp_path, 8, 1, objective, name=name)
    eight = trained_gradients(tmp_path, 1, 8, objective, name=name)
    assert one
    assert one.keys() == eight.keys()
    for weight in one:
        torch.testing.assert_close(one[weight], eight[weight], rtol=1e-7, atol=1e-12)


def test_keep_one_equals_plain_distillation_to_the_bit(tmp_path):
    plain = trained_gradients(tmp_path, 4, 2, Objective())
    whole = trained_gradients(tmp_path, 4, 2, Objective(select="adaspec", keep=Decimal(1)), True)
    assert all(torch.equal(plain[weight], whole[weight]) for weight in plain)


def test_adaspec_gradient_is_that_of_its_equation(tmp_path):
    """sum over steps of decay^s x mean over the ceil(k n) tokens of largest dL, by hand."""
    objective = Objective(select="adaspec", keep=Decimal("0.4"), unroll=2, decay=0.8)
    found = trained_gradients(tmp_path, 8, 1, objective, True)
    target = tiny_target()
    head, other = tiny_head(target).train(), tiny_head(target)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.2)
    order = list(LengthBuckets([len(r.ids) for r in RECORDS], 8, 42))
    batch = make_batch(target, head, collate([AnswerSet(RECORDS)[i] for i in order]))
    tokens = target_tokens(target, head, batch, full=False)
    losses = step_losses(head, objective, batch, tokens).total
    with torch.no_grad():
        reference = step_losses(other, objective, batch, tokens).distilled
    mask, total = step_masks(batch.positions, 2), 0.0
    for step in range(2):
        chosen = select(losses[step], reference[step], mask[step], "0.4")
        total = total + 0.8**step * losses[step][chosen].mean()
    total.backward()
    for name, weight in head.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-5, atol=1e-9)


def test_reference_losses_known_beforehand_give_the_same_gradient(tmp_path):
    """The pass over all records against one in each step, which then must not happen."""
    objective = Objective(select="adaspec", keep=Decimal("0.4"), unroll=2)
    wanted = trained_gradients(tmp_path, 4, 2, objective, True)
    known = trained_gradients(tmp_path, 4, 2, objective, True, known=True)
    for weight in wanted:
        torch.testing.assert_close(known[weight], wanted[weight], rtol=1e-9, atol=1e-12)


def test_reference_losses_stand_at_the_positions_that_predict():
    target = tiny_target()
    reference, objective = tiny_head(target), Objective(unroll=2, loss="tv")
    *_, (done, found) = reference_losses(target, reference, AnswerSet(RECORDS), objective, 20)
    assert done == sum(AnswerSet(RECORDS).lengths())
    for made, losses in zip(RECORDS, found, strict=True):
        batch = make_batch(target, reference, collate([AnswerSet([made])[0]]))
        tokens = target_tokens(target, reference, batch, full=True)
        wanted = step_losses(reference, objective, batch, tokens).distilled
        torch.testing.assert_close(losses[len(made.prompt_ids) - 1 : -1], wanted.t())
        assert not losses[: len(made.prompt_ids) - 1].any()
        assert not losses[-1].any()


def test_losses_compare_step_s_at_i_with_the_target_at_i_1_s():
    """Against a loop over rows, indices and steps, with the loss written out."""
    target = tiny_target("phi")  # its output bias must be borrowed, too
    head = tiny_head(target)
    objective = Objective(unroll=3)
    batch = make_batch(target, head, collate([AnswerSet(RECORDS)[i] for i in (0, 5)]))
    tokens = target_tokens(target, head, batch, full=True)
    with torch.no_grad():
        losses = step_losses(head, objective, batch, tokens).total
        states = unroll(head, batch.features, batch.input_ids, 3)
        logits = target.model(input_ids=batch.input_ids).logits[..., head.draft_ids]
    mask = step_masks(batch.positions, 3)
    for step in range(3):
        for m, (b, p) in enumerate(zip(batch.rows, batch.positions, strict=True)):
            if mask[step, m]:
                mine = head.logits(states[step][b, p - 1 - step])
                wanted = forward_kl(mine[None], logits[b, p][None])[0]
                torch.testing.assert_close(losses[step, m], wanted)


def test_tokens_outside_the_draft_vocabulary_are_left_out_only_if_asked(tmp_path):
    target = tiny_target()
    head = tiny_head(target)
    for mask_oov in (False, True):
        trainer = distiller(tmp_path, head, target, Objective(mask_oov=mask_oov, unroll=1))
        window, counts = trainer.get_batch_samples(
            iter([collate([AnswerSet(RECORDS)[i] for i in range(8)])]), 1, torch.device("cpu")
        )
        batch = window[0]["batch"]
        best = (
            target.model(input_ids=batch.input_ids).logits[batch.rows, batch.positions].argmax(-1)
        )
        inside = torch.isin(best, head.draft_ids)
        wanted = step_masks(batch.positions, 1)[0] & (inside | torch.tensor(not mask_oov))
        assert torch.equal(window[0]["mask"][0], wanted)
        assert counts.tolist() == [int(wanted.sum())]


def test_losses_about_acceptance_train_on_the_full_vocabulary(tmp_path):
    """The total variation that is trained on is the one that is defined: p is not renormalised."""
    target = tiny_target()
    head = tiny_head(target)
    trainer = distiller(tmp_path, head, target, Objective(loss="tv", unroll=1))
    item = collate([AnswerSet(RECORDS)[i] for i in range(8)])
    (sample,), _ = trainer.get_batch_samples(iter([item]), 1, torch.device("cpu"))
    batch = sample["batch"]
    with torch.no_grad():
        losses = step_losses(head, trainer.objective, batch, sample["tokens"]).total
        p = target.model(input_ids=batch.input_ids).logits.softmax(-1)
        p = p[batch.rows, batch.positions][:, head.draft_ids]
        states = unroll(head, batch.features, batch.input_ids, 1)
        q = head.logits(states[0][batch.rows, batch.positions - 1]).softmax(-1)
    torch.testing.assert_close(losses[0], 1 - torch.minimum(p, q).sum(-1))


def test_selection_compares_the_distillation_loss_without_the_feature_term():
    target = tiny_target()
    head = tiny_head(target, "eagle1")
    objective = Objective(head.default_loss, unroll=1)
    batch = make_batch(target, head, collate([AnswerSet(RECORDS)[i] for i in range(4)]))
    tokens = target_tokens(target, head, batch, full=False)
    with torch.no_grad():
        found = step_losses(head, objective, batch, tokens)
        hidden = unroll(head, batch.features, batch.input_ids, 1)[0]
        logits = head.logits(hidden[batch.rows, batch.positions - 1])
    torch.testing.assert_close(found.distilled[0], 0.1 * forward_kl(logits, tokens.logits()))
    true = batch.hidden[batch.rows, batch.positions]
    regression = feature_regression(hidden[batch.rows, batch.positions - 1], true)
    torch.testing.assert_close(found.total[0], found.distilled[0] + regression)


def test_the_feature_term_compares_what_the_output_rows_read(tmp_path):
    """Of any head: Medusa's states, for one, are wider than that."""
    target = tiny_target()
    head = tiny_head(target, "medusa")
    objective = Objective("feature=1,fkl=0.1", unroll=1)
    batch = make_batch(target, head, collate([AnswerSet(RECORDS)[i] for i in range(4)]))
    tokens = target_tokens(target, head, batch, full=False)
    with torch.no_grad():
        found = step_losses(head, objective, batch, tokens)
        (hidden,) = unroll(head, batch.features, batch.input_ids, 1)
    predicted = head.readout(hidden[batch.rows, batch.positions - 1])
    regression = feature_regression(predicted, batch.hidden[batch.rows, batch.positions])
    torch.testing.assert_close(found.total[0], found.distilled[0] + regression)
    head.output_rows = torch.zeros(60, 8)
    with pytest.raises(UserError, match="8 wide"):
        distiller(tmp_path, head, target, objective)


@pytest.mark.parametrize("name", ["eagle3", "lm"])
def test_the_black_box_loss_asks_nothing_of_the_target_but_its_text(name):
    """Value and gradient stay when the hidden states that give the target's logits are lost."""
    target = tiny_target()
    head = tiny_head(target, name).train()
    objective = Objective("text", unroll=head.default_unroll)
    assert not objective.needs_full
    found = []
    for lost in (False, True):
        batch = make_batch(target, head, collate([AnswerSet(RECORDS)[i] for i in range(8)]))
        if lost:
            batch.hidden.fill_(torch.nan)
        tokens = target_tokens(target, head, batch, objective.needs_full)
        losses = step_losses(head, objective, batch, tokens).total
        head.zero_grad()
        losses.sum().backward()
        gradients = [weight.grad.clone() for weight in head.parameters() if weight.grad is not None]
        found.append([losses, *gradients])
    assert found[0][0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_adaspec_without_a_reference_is_refused(tmp_path):
    target = tiny_target()
    with pytest.raises(UserError, match="reference"):
        distiller(tmp_path, tiny_head(target), target, Objective(select="adaspec"))


@pytest.mark.parametrize(
    ("name", "own", "select", "words"),
    [
        ("eagle3", True, "none", "the eagle3 head with output rows of its own"),
        ("lm", False, "none", "the lm head with output rows of its own"),
        ("eagle3", False, "adaspec-ema", "adaspec-ema reads"),
        ("reference", True, "adaspec", "the eagle3 head with output rows of its own"),
    ],
)
def test_weights_read_apart_from_their_layers_are_refused_under_zero_3(
    tmp_path, monkeypatch, name, own, select, words
):
    """Before anything is split, whichever of the two heads it is."""
    monkeypatch.setattr(distill, "zero_stage", lambda: 3)
    monkeypatch.setattr(distill, "split_frozen", lambda head: pytest.fail("split already"))
    target = tiny_target()
    kind, more = ("eagle3", {}) if name == "reference" else (name, {"train_output": own})
    head, reference = tiny_head(target, kind, **more), None
    if name == "reference":
        reference = tiny_head(target, train_output=True)
    with pytest.raises(UserError, match=f"{words}.*zero2.yaml"):
        distiller(tmp_path, head, target, Objective("fkl", select), reference=reference)


def test_a_feature_table_holds_what_the_target_gives():
    target = tiny_target()
    head = tiny_head(target)
    layers = head.config.feature_layers
    ids = [r.ids for r in RECORDS]
    done, table = list(make_table(target, ids, layers, batch_tokens=40))[-1]
    assert done == sum(map(len, ids))
    for index, record_ids in enumerate(ids):
        features, hidden = split_rows(table[index][None], target, layers)
        wanted = target_rows(target, torch.tensor([record_ids]), layers)
        torch.testing.assert_close(torch.cat([features, hidden], -1), wanted)


def test_tau_sim_is_one_plus_the_mean_product_of_matches():
    """Against a loop over the indices at which all steps are answers."""
    target = tiny_target()
    head = tiny_head(target, draft_vocab=None)
    found = teacher_forced(target, head, RECORDS, steps=3, batch_size=3)
    sums, places, matches = 0, 0, [[], [], []]
    for item in RECORDS:
        ids = torch.tensor([item.ids])
        features, _ = split_rows(
            target_rows(target, ids, head.config.feature_layers), target, head.config.feature_layers
        )
        with torch.no_grad():
            states = unroll(head, features, ids, 3)
            best = target.model(input_ids=ids).logits[0].argmax(-1)
        hits = [[int(head.logits(h[0, i]).argmax()) for i in range(ids.shape[1])] for h in states]
        first, last = len(item.prompt_ids) - 2, ids.shape[1]
        for i in range(ids.shape[1]):
            run = [hits[s][i] == best[i + 1 + s] for s in range(3) if i + 2 + s < last]
            for s, hit in enumerate(run):
                if i + s >= first:
                    matches[s].append(bool(hit))
            if i >= first and i >= 0 and len(run) == 3:
                places += 1
                sums += sum(all(run[: s + 1]) for s in range(3))
    assert found["tau_sim"] == pytest.approx(1 + sums / places)
    assert found["match"] == pytest.approx([sum(m) / len(m) for m in matches])


@pytest.mark.parametrize("name", ["eagle1", "eagle3"])
def test_activations_computed_again_give_the_same_gradient(name):
    """To the bit, with less kept for the backward pass."""
    target = tiny_target()
    head, objective = tiny_head(target, name).train(), Objective(unroll=3)
    batch = make_batch(target, head, collate([AnswerSet(RECORDS)[i] for i in range(8)]))
    tokens = target_tokens(target, head, batch, full=False)
    kept, gradients = [], []
    for recompute in (False, True):
        head.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept[-1].append(t.nbytes) or t, lambda t: t
        ):
            kept.append([])
            losses = step_losses(head, objective, batch, tokens, recompute)
        losses.total.sum().backward()
        gradients.append({n: w.grad.clone() for n, w in head.named_parameters()})
    assert sum(kept[1]) < sum(kept[0]) / 2
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize(
    ("select", "name"), [("none", "eagle3"), ("adaspec", "eagle3"), ("none", "medusa")]
)
def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tmp_path, select, name):
    """Medusa's and EAGLE-1's features are the last hidden states: one tensor, saved twice."""
    target = tiny_target()
    ids = [r.ids for r in RECORDS]
    *_, (_, table) = make_table(target, ids, tiny_head(target, name).config.feature_layers)
    table[3][4, 0] = torch.inf  # a feature of a record, and what follows from it
    head = tiny_head(target, name).train()
    before = {name: weight.clone() for name, weight in head.named_parameters()}
    objective = Objective(select=select, unroll=2)
    trainer = distiller(tmp_path, head, target, objective, 8, reference=tiny_head(target))
    trainer.train_dataset = AnswerSet(RECORDS, table)
    with pytest.raises(UserError, match="step 1 is not finite.*bad-batch-1-0"):
        trainer.train()
    saved = load_file(tmp_path / "bad-batch-1-0.safetensors")
    (row, place), wanted = (saved["features"][..., 0].isinf()).nonzero()[0].tolist(), ids[3]
    assert place == 4
    assert saved["input_ids"][row, : len(wanted)].tolist() == wanted
    assert saved["mask"].shape == (2, len(saved["positions"]))
    assert all(torch.equal(weight, before[name]) for name, weight in head.named_parameters())


def test_batches_hold_every_record_once_and_follow_from_seed_and_epoch():
    epoch = 0
    sampler = LengthBuckets([5, 9, 1, 7, 3, 8, 2], 2, seed=4, epoch=lambda: epoch)
    first = list(sampler)
    assert sorted(first) == list(range(7))
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first


def test_shallow_steps_come_as_often_as_said_and_evenly():
    objective = Objective(unroll=5, shallow=0.75)
    depths = [objective.at(step).unroll for step in range(400)]
    assert set(depths) == {1, 5}
    assert all(abs(depths[first : first + 40].count(1) - 30) <= 1 for first in range(0, 400, 40))
    assert all(Objective(shallow=0).at(step) == Objective() for step in range(50))
    assert all(Objective(shallow=1).at(step).unroll == 1 for step in range(50))


@pytest.mark.parametrize("selection", ["none", "adaspec", "adaspec-ema", "reach"])
def test_a_shallow_step_trains_the_first_unroll_step_alone(tmp_path, selection):
    """Its gradient is that of an objective of one step; reference losses have all steps or one."""
    k, reads = Decimal("0.4"), "reference" in needs(selection)
    wanted = trained_gradients(tmp_path, 4, 2, Objective(select=selection, keep=k, unroll=1), reads)
    shallow = Objective(select=selection, keep=k, unroll=3, shallow=1.0)
    for known in (False, True)[: 1 + reads]:
        found = trained_gradients(tmp_path, 4, 2, shallow, reads, known=known)
        for weight in wanted:
            torch.testing.assert_close(found[weight], wanted[weight], rtol=1e-9, atol=1e-12)


def test_after_a_shallow_step_all_unroll_steps_are_evaluated(tmp_path):
    target = tiny_target()
    trainer = distiller(tmp_path, tiny_head(target).train(), target, Objective(shallow=1.0))
    trainer.train()
    assert "eval_match_2" in trainer.evaluate()


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_trains(tmp_path, name):
    objective = Objective(select=name, unroll=2)
    found = trained_gradients(tmp_path, 4, 2, objective, "reference" in needs(name))
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any(gradient.abs().sum() > 0 for gradient in found.values())


def test_the_average_follows_its_equation_and_takes_the_references_place(tmp_path):
    """average <- 0.99 average + 0.01 head before every step, from the weights at the start."""
    target = tiny_target()
    head = tiny_head(target).train()
    objective = Objective(select="adaspec-ema", unroll=2)
    trainer = distiller(tmp_path, head, target, objective, batch=4)
    seen = []

    def remember(*args, **kwargs):
        pairs = zip(head.parameters(), trainer.student.average.parameters(), strict=True)
        seen.append([(weight.detach().clone(), mean.clone()) for weight, mean in pairs])

    trainer.create_optimizer_and_scheduler(2)
    trainer.optimizer.register_step_pre_hook(remember)
    trainer.train()
    for (before, start), (weight, mean) in zip(*seen, strict=True):
        assert torch.equal(before, start)
        torch.testing.assert_close(mean, 0.99 * start + 0.01 * weight)
    assert not any("average" in name for name in head.state_dict())
