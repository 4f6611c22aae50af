"""Training and decoding are the same computation."""

import pytest
import torch

from adaspec_eagle.attention import tree_mask
from adaspec_eagle.draft import Drafter, chain
from adaspec_eagle.features import split_rows, target_rows
from adaspec_eagle.head import built_in_heads
from adaspec_eagle.unroll import Batch, TrainingCache, needed, step_masks, step_states, unroll
from tests.tiny import ARCHITECTURES, tiny_head, tiny_target


@pytest.mark.parametrize("name", built_in_heads())
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unrolled_training_equals_incremental_decoding(arch, name):
    """Hidden states of every step at every index equal those of a chain drafted from there."""
    target = tiny_target(arch)
    head = tiny_head(target, name)
    steps, begin, length = 4, 3, 12
    ids = torch.randint(8, target.vocab_size, (2, length))
    layers = head.config.feature_layers
    with torch.no_grad():
        features, _ = split_rows(target_rows(target, ids, layers), target, layers)
        window = torch.arange(begin, length).expand(2, -1)
        states = unroll(head, features, ids, steps, window)
        for end in range(begin + 1, length - steps):  # the last committed index is end - 1
            drafter = Drafter(head, chain(steps))
            lengths = torch.tensor([begin + 1, begin + 1])
            drafter.prefill(features[:, : begin + 1], ids[:, : begin + 2], lengths)
            for index in range(begin + 1, end):  # one accepted pair a round
                drafter.advance(
                    features[:, index : index + 1],
                    ids[:, index + 1 : index + 2],
                    torch.ones(2, dtype=torch.long),
                    index + 1,
                )
            torch.testing.assert_close(drafter.hidden, states[0][:, end - 1 - begin])
            hidden = drafter.hidden
            for step in range(1, steps):  # the tokens that followed, as if drafted
                tokens = ids[:, end + step][:, None]
                seen = torch.ones(2, 1, step, dtype=torch.bool)
                mask = tree_mask(drafter.cache.lengths, drafter.cache.start, seen, hidden.dtype)
                ahead = torch.full((2, 1), step - 1)
                hidden, _ = drafter._forward(hidden.view(2, 1, -1), tokens, ahead, mask, step)
                torch.testing.assert_close(hidden[:, 0], states[step][:, end - 1 - begin])


@pytest.mark.parametrize("name", built_in_heads())
def test_what_comes_before_the_answers_is_only_looked_at(name):
    """In a window that differs by row hidden states and gradients are those of the whole text's."""
    target = tiny_target("llama")
    head = tiny_head(target, name)
    ids = torch.randint(8, target.vocab_size, (3, 14))
    rows = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])  # answers of 4, 5 and 1 tokens
    positions = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9, 10, 12])
    layers, steps = head.config.feature_layers, 3
    features, hidden = split_rows(target_rows(target, ids, layers), target, layers)
    batch = Batch(ids, rows, positions, features, hidden)
    window = needed(batch, steps)
    assert window.tolist() == [list(range(b, b + 7)) for b in (0, 3, 7)]
    whole = torch.arange(14).expand(3, -1)
    found = []
    for indices in (whole, window):
        states = step_states(unroll(head, features, ids, steps, indices), batch, indices)
        loss = head.readout(torch.stack(states))[step_masks(positions, steps)].square().sum()
        states = [s[counts] for s, counts in zip(states, step_masks(positions, steps), strict=True)]
        weights = list(head.parameters())
        found.append((states, torch.autograd.grad(loss, weights, materialize_grads=True)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", built_in_heads())
def test_a_text_is_remembered_as_forward_would_leave_it(name):
    target = tiny_target("llama")
    head = tiny_head(target, name)
    ids = torch.randint(8, target.vocab_size, (2, 6))
    hidden = head.fuse(
        torch.randn(2, 6, len(head.config.feature_layers) * target.hidden_size).double()
    )
    positions = torch.arange(6).expand_as(ids)
    caches = TrainingCache(), TrainingCache()
    head(hidden, ids, positions, None, caches[0], 0)
    head.remember(hidden, ids, positions, caches[1])
    torch.testing.assert_close(caches[0].tensors(), caches[1].tensors())
