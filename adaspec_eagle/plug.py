"""The plug for transformers: `model.generate(**inputs, custom_generate=speculative(head))`.

transformers prepares everything (config, processors, criteria, expanded rows) and calls the plug in
place of its own loop. It withholds the streamer and the tokenizer from such a callable: the plug
takes the streamer itself, and stop strings are given as a `StopStringCriteria`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from adaspec_eagle.draft import Shape, parse_shape
from adaspec_eagle.errors import UserError
from adaspec_eagle.generate import Answers, check_prompts, decode, padded_answers
from adaspec_eagle.head import DraftHead, check_head
from adaspec_eagle.packed import weights_state
from adaspec_eagle.sampling import MAX_SEED, Row, Sampler
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target

REFUSED = {  # what a generation config may ask for and drafting does not do -> neutral values
    "num_beams": (1, None),
    "penalty_alpha": (0, 0.0, None),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": (False, None),
    "assistant_early_exit": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "output_scores": (False, None),
    "output_logits": (False, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
}


# Tensors that transformers hands over with every call; others would be further inputs of the model.
KNOWN = ("attention_mask", "position_ids", "cache_position")


def _ending_the_streamer(call: Callable[..., Any]) -> Callable[..., Any]:
    """End the plug's streamer behind a call, and behind an error: its reader waits for it."""

    @wraps(call)
    def ending(self: "Speculative", *arguments: Any, **more: Any) -> Any:
        try:
            return call(self, *arguments, **more)
        finally:
            if self.streamer is not None:
                self.streamer.end()

    return ending


class Speculative:
    """A `custom_generate` callable; `stats` has the counts of its last call."""

    def __init__(
        self,
        head: DraftHead,
        tree: str | Shape,
        streamer: BaseStreamer | None,
        allow_other_target: bool,
    ) -> None:
        self.head = check_head(head)
        self.shape = parse_shape(tree)
        self.streamer = streamer
        self.allow_other_target = allow_other_target
        self.stats = AcceptanceStats()
        self.target: Target | None = None  # the model of the last call
        self.state: list[tuple] = []  # of its weights

    @_ending_the_streamer
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What transformers' own loop would return, from drafting; raises UserError."""
        _check_config(generation_config)
        _check_inputs(input_ids, model_kwargs)
        past = model_kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise UserError("past_key_values that hold tokens are not supported with drafting")
        state = weights_state(model.parameters())
        if self.target is None or self.target.model is not model or self.state != state:
            self.target, self.state = _as_target(model), state
        target = self.target
        sample = bool(generation_config.do_sample)
        if self.shape.sampled and not sample:
            raise UserError("a sampled chain needs do_sample=True; choose another tree")
        longest = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        end, length = min(longest, default=target.context), input_ids.shape[1]
        if end <= length:
            raise UserError(
                f"a text of at most {end} tokens leaves nothing to generate behind a prompt of "
                f"{length}: raise max_length, or shorten the prompt"
            )
        limit = end - length
        rows = check_prompts(target, input_ids, model_kwargs.get("attention_mask"), limit)
        self.head.bind(target, self.allow_other_target)
        seed = (
            int(torch.randint(MAX_SEED // 2 - 1, (1,))) if sample else 0
        )  # torch's seed repeats it
        sampler = Sampler(
            [
                Row(key, ids.tolist(), len(row), _of_row(logits_processor, key))
                for key, (ids, row) in enumerate(zip(input_ids, rows, strict=True))
            ],
            sample,
            seed,
        )
        ends = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        end_ids = frozenset(int(id_) for found in ends for id_ in found.flatten())
        answers = Answers(limit, end_ids, [[] for _ in rows])
        answers.stops = _stops(stopping_criteria, input_ids)
        if self.streamer is not None:
            if len(rows) > 1:
                raise UserError(f"a streamer takes one row, not {len(rows)}")
            self.streamer.put(input_ids.cpu())
            answers.watch = _feed(self.streamer)
        decode(target, self.head, rows, self.shape, sampler, answers)
        self.stats = answers.stats
        pad = generation_config._pad_token_tensor  # as prepared: an end token where none is set
        padding = target.pad_token_id if pad is None else int(pad)
        sequences = padded_answers(input_ids, answers.tokens, padding)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences


def speculative(
    head: DraftHead,
    tree: str | Shape = "auto",
    streamer: BaseStreamer | None = None,
    allow_other_target: bool = False,
) -> Speculative:
    """A plug that lets `model.generate` draft with `head`.

        plug = speculative(load_head("runs/demo/head"))
        model.generate(**inputs, custom_generate=plug, max_new_tokens=64)
        print(plug.stats.tau)

    Greedy output is that of `generate` without the plug; sampled output follows the same law with
    random numbers of its own, repeated by `torch.manual_seed`. streamer: takes the text as it comes
    (transformers does not hand its own to a plug). Stop strings need a criterion (it does not hand
    the tokenizer on either, and asks for one where `stop_strings` are given):

        stop = StoppingCriteriaList([StopStringCriteria(tokenizer, ["Question:"])])
        model.generate(**inputs, custom_generate=plug, stopping_criteria=stop)

    Beams, contrastive search, assisted generation and scores or states as output are refused by
    name.
    """
    return Speculative(head, tree, streamer, allow_other_target)


def _check_config(config: GenerationConfig) -> None:
    for name, neutral in REFUSED.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise UserError(
                f"{name}={value} is not supported with drafting: leave it out, or call generate "
                "without custom_generate"
            )


def _check_inputs(input_ids: Tensor, given: dict[str, Any]) -> None:
    """Raise UserError for inputs of the forward that drafting does not pass on."""
    others = [key for key, v in given.items() if isinstance(v, Tensor) and key not in KNOWN]
    if others:
        raise UserError(
            f"{', '.join(others)} with drafting: only input_ids and attention_mask are supported; "
            "leave custom_generate out, or give the text as input_ids"
        )
    places, mask = given.get("position_ids"), given.get("attention_mask")
    if places is None:
        return
    seen = torch.ones_like(input_ids) if mask is None else mask
    if ((places != seen.cumsum(-1) - 1) & seen.bool()).any():
        raise UserError(
            "position_ids other than 0, 1, 2, ... of each row's tokens are not supported with "
            "drafting: leave them out"
        )


def _as_target(model: Any) -> Target:
    """The model as a Target; its modules' modes and what it trains stay as they are."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        return Target.wrap(model, name=model.config.name_or_path or type(model).__name__)
    finally:
        for module, training in modes:
            module.training = training
        for weight in trained:
            weight.requires_grad_(True)


def _of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """What a processor made for the batch is for one of its rows; the list itself if nothing is."""
    own = LogitsProcessorList()
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)  # padding, where there is some
        if isinstance(ignored, Tensor):
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty, int(ignored[row]))
        own.append(processor)
    changed = any(a is not b for a, b in zip(own, processors, strict=True))
    return own if changed else processors


def _stops(
    criteria: StoppingCriteriaList, input_ids: Tensor
) -> Callable[[int, list[int]], bool] | None:
    """The criteria that look at a row's ids, but for length and end tokens, which decode knows."""
    known = (MaxLengthCriteria, EosTokenCriteria)
    others = [criterion for criterion in criteria if not isinstance(criterion, known)]
    if not others:
        return None

    def stops(row: int, answer: list[int]) -> bool:
        new = torch.tensor([answer], device=input_ids.device)
        ids = torch.cat([input_ids[row : row + 1], new], 1)
        return any(bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in others)

    return stops


def _feed(streamer: BaseStreamer) -> Callable[[int, list[int], int], None]:
    def watch(row: int, tokens: list[int], accepted: int) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))

    return watch
