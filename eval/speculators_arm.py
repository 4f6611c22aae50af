"""The `speculators` package as an arm of bench_training.py, run by its own environment's Python.

    DIR/bin/python eval/speculators_arm.py TARGET_FOLDER ROWS LENGTH DRAFT_VOCAB UNROLL LAYERS...

Trains its EAGLE-3 head (sdpa attention, eager KL loss, bfloat16 autocast, AdamW, gradients clipped
at 1, as its trainer does) on random features. One row at a time, gradients added up: packed into
one sequence, as its trainer would have them, the same rows take half as long again, for attention
over them is dense. For every line on stdin, a number of steps, one line of JSON: seconds a step.
"""

import json
import sys
import time

import torch
from transformers import AutoConfig


def build(folder: str, draft_vocab: int, steps: int, layers: list[int]) -> torch.nn.Module:
    """One layer of the target's sizes, the first `draft_vocab` ids as draft vocabulary."""
    from speculators.models.eagle3.core import Eagle3DraftModel  # that environment has it

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    inside = torch.arange(config.vocab_size) < draft_vocab
    model = Eagle3DraftModel.from_training_args(
        config,
        t2d=inside,
        d2t=torch.zeros(draft_vocab, dtype=torch.long),
        draft_vocab_size=draft_vocab,
        norm_before_residual=False,
        ttt_steps=steps,
        verifier_name_or_path=folder,
        target_layer_ids=layers,
        draft_attn_impl="sdpa",
    )
    return model.to(torch.float32)


def main() -> None:
    """Build, then train as many steps as each line asks for."""
    if len(sys.argv) < 7:
        sys.exit(__doc__)
    folder, (rows, length, draft_vocab, steps, *layers) = sys.argv[1], map(int, sys.argv[2:])
    torch.manual_seed(0)
    model = build(folder, draft_vocab, steps, layers)
    kwargs, _ = model.get_trainer_kwargs(
        loss_fn="kl_div", loss_implementation="eager", ttt_steps=steps, ttt_step_loss_decay=0.8
    )
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    size = model.hidden_size
    features = torch.randn(rows, 1, length, len(layers) * size).bfloat16()
    last = torch.randn(rows, 1, length, size).bfloat16()
    ids = torch.randint(draft_vocab, (rows, 1, length))
    document = torch.zeros(1, length, dtype=torch.long)
    print(json.dumps({"weights": sum(weight.numel() for weight in trained)}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            optimizer.zero_grad()
            for row in range(rows):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(
                        hidden_states=features[row],
                        input_ids=ids[row],
                        document_ids=document,
                        loss_mask=torch.ones(1, length, dtype=torch.bool),
                        verifier_last_hidden_states=last[row],
                        **kwargs,
                    )[1]
                (loss / rows).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
