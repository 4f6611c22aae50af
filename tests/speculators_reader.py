"""Runs in an environment with the package `speculators`, without this package (test_elsewhere.py).

    python speculators_reader.py HEAD INPUTS OUT

Loads the EAGLE-3 head in HEAD, writes its logits on the features and tokens of INPUTS, trains it
for ten steps on them, saves it to OUT/trained, and writes the logits that it then has.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

STEPS = 3  # of unrolling, as in test_elsewhere.py


def logits_of(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Draft logits of every unroll step `[STEPS, T, Vd]`, caught where they are made."""
    caught: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda *call: caught.append(call[2][0]))
    with torch.no_grad():
        model(**inputs, ttt_steps=STEPS)
    hook.remove()
    return torch.stack(caught)


def main(head: Path, given: Path, out: Path) -> None:
    config = Eagle3SpeculatorConfig.from_pretrained(head)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel.from_pretrained(head, config=config, dtype=torch.float32)
    tensors = load_file(given)
    last = tensors.pop("verifier_last_hidden_states")
    before = logits_of(model, tensors)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_config = resolve_loss_config("kl_div", "eager")
    losses = []
    for _ in range(10):
        loss = model(
            **tensors,
            verifier_last_hidden_states=last,
            loss_mask=torch.ones_like(tensors["input_ids"]),
            ttt_steps=STEPS,
            loss_config=loss_config,
        )[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.eval().save_pretrained(out / "trained")
    after = logits_of(model, tensors)
    results = {"before": before, "after": after, "losses": torch.stack(losses).flatten()}
    save_file(results, out / "logits.safetensors")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
