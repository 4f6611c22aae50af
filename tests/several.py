"""One of several training processes (run by `accelerate launch`), or a single one like them.

several.py OUT SELECT OPTIMIZER: a window of two micro-batches of four records, two steps, in
float32. The main process writes to OUT the last weights, the first step's gradients (not under
DeepSpeed) and how many weights of target and reference head it holds itself.
"""

import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from adaspec_eagle.distill import AnswerSet, Distiller, Objective, teacher_forced
from adaspec_eagle.processes import is_main_process, join_processes, process_count
from adaspec_eagle.train import whole_head
from adaspec_eagle.zero import SplitTarget, zero_stage
from tests.records import record
from tests.tiny import tiny_head, tiny_target


def held(module: torch.nn.Module) -> torch.Tensor:
    """How many weights of a module are in this process."""
    own = [getattr(weight, "ds_tensor", weight) for weight in module.parameters()]
    return torch.tensor(sum(weight.numel() for weight in own))


def train(select: str, optimizer: str = "muon") -> dict[str, torch.Tensor]:
    """Gradients and weights, by name; weights held."""
    target = tiny_target(dtype=torch.float32)
    if zero_stage() == 3:
        target = SplitTarget(target)
    head, reference = tiny_head(target).train(), tiny_head(target)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.2)
    found: dict[str, torch.Tensor] = {}

    def remember(*args, **kwargs):
        for name, weight in head.named_parameters():
            found.setdefault(f"gradient.{name}", weight.grad.clone())

    answers = AnswerSet([record(2 + n % 3, 5 + n, seed=n) for n in range(8)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Distiller(
            head,
            target=target,
            objective=Objective(select=select, unroll=2),
            reference=reference,
            optimizer=optimizer,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2 // process_count(),
                num_train_epochs=2,
                learning_rate=1e-3,
                max_grad_norm=1e9,
                report_to=[],
                remove_unused_columns=False,
                label_names=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                ddp_find_unused_parameters=False,
                ddp_broadcast_buffers=False,
            ),
            train_dataset=answers,
            eval_dataset=answers,
        )
        if not zero_stage():
            trainer.create_optimizer_and_scheduler(2)
            trainer.optimizer.register_step_pre_hook(remember)
        trainer.train()
        teacher_forced(target, head, answers, steps=2)  # goes on with split weights
    sizes = {"target": held(target.model), "reference": held(trainer.reference)}
    made = whole_head(head)
    found |= {f"held.{name}": size for name, size in sizes.items()}
    return found | {f"weight.{name}": w.detach() for name, w in made.named_parameters()}


if __name__ == "__main__":
    join_processes("cpu")
    result = train(*sys.argv[2:]) | {"processes": torch.tensor(process_count())}
    if is_main_process():
        save_file(result, sys.argv[1])
