"""Train gates with TRL's own trainer.

    python scripts/train_with_trl.py BASE TEXT.jsonl OUT

This shows that a gate is a PEFT method like any other. With only the next-token loss, the sink
stays where it is: `retrofit train` adds the losses that remove it.
"""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from retrofit import GateConfig


def main(base: str, text: str, out: str, max_steps: int = 10) -> None:
    """Train sink logits on the texts of a JSON lines file, and save them as a PEFT adapter."""
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(out, max_steps=max_steps, learning_rate=1e-2, bf16=False, report_to="none"),
        train_dataset=load_dataset("json", data_files=text, split="train"),
        peft_config=GateConfig(sinks="constant", key_bias=True, granularity="none"),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    base, text, out = sys.argv[1:]
    main(base, text, out)
