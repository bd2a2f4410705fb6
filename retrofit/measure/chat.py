"""Chat: what a model answers to short instructions, so that its answers can be laid beside the
base's. A retrofit is meant to answer as its base does, and perplexity does not show whether it
does: one token that comes out otherwise turns the rest of an answer.
"""

import hashlib
from dataclasses import dataclass

from transformers import BatchEncoding, PreTrainedTokenizerBase

from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.generation import generate_greedily
from retrofit.measure.instructions import INSTRUCTIONS
from retrofit.report.sections.chat import Answer, ChatFigures


@dataclass(frozen=True)
class Chat:
    """Settings of this evaluation.

    Attributes:
        instructions: how many of `retrofit.measure.instructions`, from the first on.
        new_tokens: tokens of an answer, at most.
    """

    instructions: Count = 50
    new_tokens: Count = 48
    name = "chat"

    def measure(self, measured: MeasuredModel, track: Track) -> ChatFigures:
        """Decode an answer to each instruction, always taking the likeliest token.

        An instruction is put into the tokenizer's chat template. A tokenizer without one gets the
        instruction as it is, followed by a line break.
        """
        tokenizer, model = measured.tokenizer, measured.inner
        answers = []
        for instruction in track(INSTRUCTIONS[: self.instructions], "chat"):
            prompt = _prompt(tokenizer, instruction)["input_ids"]
            (token_ids,) = generate_greedily(model, tokenizer, prompt, self.new_tokens).tolist()
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
            sha256 = hashlib.sha256(prompt.numpy().tobytes()).hexdigest()
            answers.append(
                Answer(
                    instruction=instruction, prompt_sha256=sha256, token_ids=token_ids, text=text
                )
            )
        return ChatFigures(answers=answers)


def _prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> BatchEncoding:
    if tokenizer.chat_template is None:
        return tokenizer(f"{instruction}\n", return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
