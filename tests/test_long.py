"""Long tier: the sampling law at full size."""

import pytest
import torch

from adaspec_eagle.verify import pick

pytestmark = pytest.mark.long


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_sampling_follows_the_law_over_a_million_draws(temperature, top_p):
    """Chi-square against the nucleus written out by sorting; p > 1e-4 for up to 11 degrees."""
    logits = torch.linspace(2.5, -2.5, 12)[torch.randperm(12)]
    generator = torch.Generator().manual_seed(3)
    drawn = pick(logits.expand(1_000_000, 1, 12), temperature, top_p, generator)
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    inside = order[probs[order].cumsum(0) - probs[order] < top_p]
    counts = torch.bincount(drawn.flatten(), minlength=12).double()
    expected = torch.zeros(12).double()
    expected[inside] = 1_000_000 * probs[inside] / probs[inside].sum()
    assert counts.sum() == counts[inside].sum()
    statistic = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    assert float(statistic) < 37.4
