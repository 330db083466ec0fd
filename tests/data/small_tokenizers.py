"""Tokenizers small enough to be made in memory: byte-level BPE whose merges cross borders, and sentencepiece style."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def byte_level(chat_template: str | None = None, *, eos: str | None = "<|im_end|>", around: str | None = None, **special: str) -> Any:
    """Byte-level BPE trained on a few words; pad is EOS. `around` is what the tokenizer puts around a text ("<s> $A </s>")."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False)
    core.train_from_iterator(["the\n\n\n answer user assistant system\n\n\n", "hello there\n\n the user"] * 20, trainer)
    if around:
        ids = [(token, core.token_to_id(token)) for token in around.split() if token != "$A"]
        core.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=eos, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def metaspace() -> Any:
    """The way of Llama: a space is put before every text when encoding, and the first one is dropped when decoding."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(c): c for c in range(32, 127)}, "▁": 127, "\n": 128, "ab": 129, "▁a": 130}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("▁", "a")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
