"""What the training job adds to the Trainer's loop: Ctrl-C, a line an evaluation, checkpoints."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from adaspec_eagle.processes import any_of, is_main_process


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: trainer_state.json is what the Trainer writes last."""
    found = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if p.stat().st_size]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class StopGently(TrainerCallback):
    """Ctrl-C finishes the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT inside the block."""

        def ask(signum: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say("stopping after this step ...")

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop if any process was asked to."""
        if any_of(self.asked):
            control.should_save = control.should_training_stop = True
        return control


class ProgressLine(TrainerCallback):
    """A line a held-back evaluation; the bar itself is the Trainer's."""

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print tau_sim and the matches of all steps."""
        found = kwargs["metrics"]
        match = [v for k, v in found.items() if k.startswith("eval_match_")]
        text = " ".join(f"{value:.3f}" for value in match)
        say(
            f"step {state.global_step}/{state.max_steps}: tau_sim {found['eval_tau_sim']:.3f}, "
            f"top-1 match by step {text}{_speed(state)}"
        )


def _speed(state: TrainerState) -> str:
    """The speed of the last line about training, if there was one."""
    speeds = [line["tokens_per_s"] for line in state.log_history if "tokens_per_s" in line]
    return f"; {speeds[-1]:,.0f} tokens/s" if speeds else ""


def say(text: str) -> None:
    """A line for the user, on stderr, from one of several processes."""
    if is_main_process():
        sys.stderr.write(text + "\n")
