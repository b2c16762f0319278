"""CLIP's tokenizer as the files that transformers reads: the vocabulary is the one that ships with open_clip."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from ldm.modules.encoders.clip_tokenizer import END, START, read_merges, vocabulary

SD_V1_PAD, SD_V2_PAD = END, "!"  # what fills a caption up; open_clip pads with the number 0, which is "!"


def write_tokenizer(folder: Path, max_length: int, pad: str) -> None:
    """Write vocab.json, merges.txt and both settings files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **words,
    }
    files = {
        **_vocabulary_files(),
        "special_tokens_map.json": json.dumps(words, indent=2),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@lru_cache(maxsize=1)
def _vocabulary_files() -> dict[str, str]:
    merges = read_merges()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    return {"merges.txt": "\n".join(lines) + "\n", "vocab.json": json.dumps(vocabulary(merges), ensure_ascii=False)}
