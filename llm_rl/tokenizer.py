"""Text to tokens and back: the tokenizer of a from-scratch policy, and the dialogue format of any policy."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from models.errors import UserError
from models.language.config import LanguageConfig

PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
MARKS = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% else %}<|user|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Each digit and each punctuation mark stands alone, so that numbers are spelled the same way everywhere.
PIECES = Regex(r"\d| ?[^\s\w]| ?[^\W\d]+|\s")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the dialogue marks as single tokens. Needs at least 256 + 6 entries."""
    if vocab_size < 262:
        raise UserError(f"--policy.vocab-size {vocab_size}: a byte-level vocabulary needs at least 262 entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special: list[str | AddedToken] = [PAD, EOS, USER, ASSISTANT, *MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # the thinking marks are part of what a completion says, so decoding must keep them
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


class Dialogue:
    """One policy's tokenizer with its chat format. stops: the tokens that end a turn, the tokenizer's own and those of
    the policy's config (Llama 3 has three)."""

    def __init__(self, folder: Path, policy: LanguageConfig, system_prompt: str = "") -> None:
        transformers_logging.set_verbosity_error()  # it warns of our model_type, which the tokenizer does not need
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"{folder}: no usable tokenizer ({first}); put tokenizer.json beside config.json"
            ) from error
        _require_usable(self.tokenizer, folder, policy.vocab_size, system_prompt)
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{folder}: the tokenizer names no eos token; set eos_token in tokenizer_config.json")
        self.system_prompt = system_prompt
        self.eos: int = self.tokenizer.eos_token_id
        self.stops = tuple(sorted({self.eos, *policy.eos_token_id}))

    def prompt(self, question: str) -> list[int]:
        """Token ids up to where the policy begins to answer."""
        return self.tokenizer.encode(self._rendered(question), add_special_tokens=not self.tokenizer.chat_template)

    def opening(self, question: str) -> str:
        """`<think>` if the prompt leaves thinking open, as the templates of DeepSeek-R1's distillates and of
        Qwen3-Thinking do: the completion begins in the middle of it. Otherwise empty."""
        opened, closed = map(self._rendered(question).rfind, MARKS)
        return MARKS[0] if opened > closed else ""

    def _rendered(self, question: str) -> str:
        if not self.tokenizer.chat_template:
            return f"{self.system_prompt}\n{question}\n" if self.system_prompt else f"{question}\n"
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        messages.append({"role": "user", "content": question})
        return cast(str, self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def answer(self, question: str, solution: str) -> list[int]:
        """Token ids of a worked solution as it goes on from the prompt, with the end token. Where the prompt leaves
        thinking open, it is not opened again, and a solution that does not think closes it: else it would teach
        completions that have no answer."""
        if opening := self.opening(question):
            solution = solution.removeprefix(opening) if MARKS[1] in solution else MARKS[1] + solution
        return [*self.tokenizer.encode(solution, add_special_tokens=False), self.eos]

    def text(self, tokens: Sequence[int]) -> str:
        """What a completion says, without the stop token that ended it."""
        kept = tokens[:-1] if tokens and tokens[-1] in self.stops else tokens
        text = self.tokenizer.decode(list(kept), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)


def _require_usable(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int, system_prompt: str) -> None:
    """Raise UserError for a tokenizer of another model, and for a chat template that refuses such a dialogue."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has a token {token!r} of number {largest}, and the model's vocab_size is "
            f"{vocab_size}: put the tokenizer beside it that the model was trained with"
        )
    if not tokenizer.chat_template:
        return
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        tokenizer.apply_chat_template([*system, {"role": "user", "content": "?"}], tokenize=False)
    except TemplateError as error:
        mend = "leave --system-prompt out, or mend" if system_prompt else "mend"
        raise UserError(f"{folder}: the chat template refuses a prompt ({error}): {mend} the template") from error
