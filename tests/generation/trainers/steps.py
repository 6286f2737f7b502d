"""Two training steps on an export, run by `test_export_trainers.py` in the environment of the trainers.

    python steps.py dpo runs/demo/dpo /tmp/models

Makes small random models in the last folder. Prints one JSON object: the columns, the steps and the losses.
"""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant> {% endif %}"
SPECIAL = ["<pad>", "<unk>", "</s>", "<s>"]


def make_models(folder: Path) -> tuple[str, str, str]:
    """Write a causal model, a reward model and an encoder, each with a tokenizer; return their folders."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet))
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, model_max_length=256, **special)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3}
    llama = LlamaConfig(**sizes, **ids, num_key_value_heads=2, max_position_embeddings=256)
    reward = LlamaConfig(**sizes, **ids, num_key_value_heads=2, max_position_embeddings=256, num_labels=1)
    encoder = BertConfig(**sizes, pad_token_id=0, max_position_embeddings=256, num_labels=1)
    for name, model in (
        ("causal", LlamaForCausalLM(llama)),
        ("reward", LlamaForSequenceClassification(reward)),
        ("encoder", BertForSequenceClassification(encoder)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "causal"), str(folder / "reward"), str(folder / "encoder")


def make_trainer(form: str, rows: datasets.Dataset, folder: Path) -> Any:
    """Return the trainer of the library that a format is for."""
    causal, reward, encoder = make_models(folder)
    limits = {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
    }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(causal)
    if form in ("sft", "chat"):
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(causal, SFTConfig(**limits), train_dataset=rows, processing_class=tokenizer)
    if form == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(causal, args=DPOConfig(**limits), train_dataset=rows, processing_class=tokenizer)
    if form == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer(causal, args=KTOConfig(**limits), train_dataset=rows, processing_class=tokenizer)
    if form == "reward":
        from trl import RewardConfig, RewardTrainer

        return RewardTrainer(reward, args=RewardConfig(**limits), train_dataset=rows, processing_class=tokenizer)
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses

    model = CrossEncoder(encoder, num_labels=1, device="cpu")
    loss = losses.LambdaLoss(model) if form == "ranking" else losses.BinaryCrossEntropyLoss(model)
    return CrossEncoderTrainer(model, CrossEncoderTrainingArguments(**limits), train_dataset=rows, loss=loss)


if __name__ == "__main__":
    form, uri, folder = sys.argv[1:]
    suffix, loader = ("jsonl", "json") if form == "chat" else ("parquet", "parquet")
    rows = datasets.load_dataset(loader, data_files=f"{uri}/data/train/part-*.{suffix}", split="train", cache_dir=f"{folder}/cache")
    trainer = make_trainer(form, rows, Path(folder))
    trainer.train()
    losses_ = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    print(json.dumps({"columns": rows.column_names, "steps": trainer.state.global_step, "losses": losses_}))
