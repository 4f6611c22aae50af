"""What a head's training pass costs in FLOPs, by how often it is unrolled: counted, not assumed.

Step 0 reads the whole text, prompts included (features fused, keys and values of every token); the
steps behind it work on the answer's tokens alone. One step of three is therefore more than a third
of the work, and the more so the longer prompts are.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from adaspec_eagle.head import DraftHead
from adaspec_eagle.unroll import Batch, needed, step_states, unroll


def forward_flops(head: DraftHead, steps: int, prompt: int, answer: int) -> int:
    """FLOPs of products in one forward pass over a text of `prompt + answer` tokens.

    With `steps` unroll steps, output rows at the answer's tokens included; at least one token each.
    The head must be bound.
    """
    device, config = head.embed_rows.device, head.config
    length = prompt + answer
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    positions = torch.arange(prompt - 1, length - 1, device=device)
    width = max(1, len(config.feature_layers)) * config.hidden_size
    features = head.embed_rows.new_zeros(1, length, width)
    hidden = features[..., : config.hidden_size]
    batch = Batch(ids, torch.zeros_like(positions), positions, features, hidden)
    window = needed(batch, steps)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for states in step_states(unroll(head, features, ids, steps, window), batch, window):
            head.logits(states)
    return counter.get_total_flops()
