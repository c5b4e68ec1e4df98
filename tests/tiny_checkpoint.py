"""A tokenizer as small as the golden models' vocabulary, and records that it can encode."""

import json
from pathlib import Path

WORDS = [*"abcdefgh", "red", "blue", "green", "one", "two", "sum", "of", "and", "is", "the", "color", "say", "###"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
RECORDS = [
    {"instruction": f"say {one}", "input": two if two != "a" else "", "output": f"{one} and {two} is {one}"}
    for one in WORDS[:8]
    for two in WORDS[:5]
]


def write_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<unk>", *WORDS])}, "<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [begin])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "</s>", "special": True}
    about = {"eos_token": end, "bos_token": "<s>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
