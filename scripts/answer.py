"""Ask a checkpoint a question with stock transformers, to prove that it needs no code of ours.

python scripts/answer.py FOLDER PROMPT
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def answer(folder: str, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return f"{type(model).__name__} in {folder}: {text.strip()}"


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(answer(*sys.argv[1:3]))
    assert "retrofit" not in sys.modules
