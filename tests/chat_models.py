"""Chat templates in the styles of well-known models, tiny models that have them, and tasks to ask through them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from scripted_llama import byte_tokenizer, save_random, save_tokenizer

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|x|>")
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start|>' + message['role'] + '<|end|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN_3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "mistral": MISTRAL, "gemma": GEMMA, "qwen-3": QWEN_3}
Templates = str | Mapping[str, str] | None


def save_chat(folder: Path, template: Templates, *, adds_bos: bool = True, vocab_size: int = 261) -> Path:
    """A tiny Llama whose tokenizer has a token a byte and this chat template, or templates by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_random(folder, vocab_size, max_position_embeddings=2048)
    save_tokenizer(byte_tokenizer(adds_bos=adds_bos, special=SPECIAL), folder)
    write_template(folder, template)
    return folder


def write_template(folder: Path, template: Templates) -> None:
    """One template as transformers saves it; several in tokenizer_config.json, as it saved them before."""
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template is not None:
        file = folder / "tokenizer_config.json"
        named = [{"name": name, "template": text} for name, text in template.items()]
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}), encoding="utf-8")


def write_chat_tasks(folder: Path, shots: int = 0, **more: Any) -> Path:
    """A generated, a multiple-choice and a scored task in one folder, with examples from a split of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", range(4)), ("test", range(4, 7))):
        lines = [
            json.dumps({"q": f"What is {i} + {i}? ", "a": str(2 * i), "options": [str(2 * i), str(i)], "gold": 0})
            for i in rows
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in ("generate_until", "multiple_choice", "loglikelihood"):
        config: dict[str, Any] = {
            "task": f"sums_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}},
            "test_split": "test",
            "fewshot_split": "train",
            "num_fewshot": shots,
            "output_type": kind,
            "doc_to_text": "{{q}}",
            "doc_to_target": "gold" if kind == "multiple_choice" else "{{a}}",
            "metric_list": [{"metric": "exact_match" if kind == "generate_until" else "acc"}],
            **({"doc_to_choice": "options"} if kind == "multiple_choice" else {}),
            **more,
        }
        if kind == "generate_until":
            config["generation_kwargs"] = {"until": ["\n"], "do_sample": False, "max_gen_toks": 8}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder
