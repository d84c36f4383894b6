"""Prompts to token ids, by the tokenizer files of a Stable Diffusion folder (vocab.json, merges.txt).

The tokenizing itself is transformers' CLIPTokenizer; a new one is trained on captions by the tokenizers library.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from models.errors import UserError

_START, _END = "<|startoftext|>", "<|endoftext|>"


class PromptTokenizer:
    """Pads every prompt to the same length, and cuts what is longer."""

    def __init__(self, clip: CLIPTokenizer) -> None:
        self._clip = clip
        self.length: int = clip.model_max_length
        self.start_id: int = clip.bos_token_id
        self.end_id: int = clip.eos_token_id
        self.pad_id: int = clip.pad_token_id

    def __len__(self) -> int:
        return len(self._clip)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, M) with M = `length`."""
        tokens = self._clip(list(prompts), padding="max_length", max_length=self.length, truncation=True)
        return torch.tensor(tokens["input_ids"])

    def save(self, folder: Path) -> None:
        self._clip.save_pretrained(str(folder))

    @classmethod
    def load(cls, folder: Path) -> "PromptTokenizer":
        """Raises UserError if the folder lacks a file or holds a broken one."""
        if not (folder / "tokenizer.json").is_file():
            for name in ("vocab.json", "merges.txt"):
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name}: missing; the download of the tokenizer is not complete")
        try:
            clip = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: not a CLIP tokenizer ({reason}); download it again") from None
        if clip.model_max_length > 10_000:  # transformers' sign for `not given`
            raise UserError(f"{folder / 'tokenizer_config.json'}: model_max_length is missing; SD v1 has 77")
        return cls(clip)


def train_tokenizer(captions: Iterable[str], vocab_size: int, length: int) -> PromptTokenizer:
    """A CLIP tokenizer with byte-pair merges learned from captions (Sennrich et al. 2016, arXiv 1508.07909).

    vocab_size: an upper bound; the 512 bytes with and without an end of word, and two special tokens, are always in.
    length: tokens to a prompt, start and end included. Raises UserError if vocab_size leaves no room for merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [letter + "</w>" for letter in alphabet]
    merge_count = vocab_size - len(base) - 2
    if merge_count < 1:
        raise UserError(f"a vocabulary of {vocab_size} tokens: at least {len(base) + 3} are needed")
    # An untrained CLIP tokenizer splits the captions into words exactly as the trained one will.
    blank = CLIPTokenizer({token: i for i, token in enumerate([*base, _START, _END])}, []).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:merge_count]
    vocab = [*base, *dict.fromkeys(a + b for a, b in merges), _START, _END]
    # Through the files, as every other tokenizer: the object made from them is the one that a reader will have.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return PromptTokenizer.load(folder)
