"""Writes the quickstart's data and tokenizer: string tasks that a 0.7 M parameter model learns in minutes on a CPU.

    python configs/quickstart/make_quickstart.py

rewrites, beside this script, one JSONL file for each source, the folder tokenizer/, and lm_eval/longer.jsonl with
strings a letter longer than any of the sources'. Invariant: the same bytes on
every machine; nothing is read, and every row comes from a generator seeded with its task's name. Every prompt is unique
over all tasks. The one task that needs working out, checksum, is there twice: checksum_think and checksum_no_think hold
the same prompts and answers, with and without the working.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FOLDER = Path(__file__).resolve().parent
NUM_ROWS = 1540  # a source: a split of 15 % leaves over 200 prompts to report on, and the folder stays under 2 MB
LETTERS = "abcdeghilmnorstu"  # 16 common ones: each letter is then seen often enough to be learned in a few epochs
STRING_LENGTHS = (3, 4)
LONGER, NUM_LONGER = 5, 100
VOWELS = "aeiou"

END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NEWLINE = "Ċ"  # the byte 0x0A in the byte-level alphabet

# What each task answers to a string; its prompt is "{name}: {string}".
STRING_TASKS: dict[str, Callable[[str], str]] = {
    "first": lambda text: text[0],
    "copy": lambda text: text,
    "upper": str.upper,
    "reverse": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "count vowels": lambda text: str(sum(letter in VOWELS for letter in text)),
}


def row(prompt: str, answer: str, reasoning: str | None) -> dict:
    """One conversation in the pipeline's input format; thinking is on where there is a reasoning to show."""
    reply = {"role": "assistant", "content": answer}
    if reasoning is not None:
        reply["reasoning_content"] = reasoning
    return {
        "messages": [{"role": "user", "content": prompt}, reply],
        "chat_template_kwargs": {"enable_thinking": reasoning is not None},
        "answer": answer,
    }


def distinct_strings(alphabet: str, rng: random.Random) -> list[str]:
    """NUM_ROWS different strings over `alphabet`, in the order they were drawn."""
    drawn: dict[str, None] = {}
    while len(drawn) < NUM_ROWS:
        drawn["".join(rng.choices(alphabet, k=rng.choice(STRING_LENGTHS)))] = None
    return list(drawn)


def checksum(digits: str) -> tuple[str, str]:
    """(last digit of the digits' sum, its working: each digit with the total up to it, as in "7:7 5:2 9:1")."""
    total, working = 0, []
    for digit in digits:
        total = (total + int(digit)) % 10
        working.append(f"{digit}:{total}")
    return str(total), " ".join(working)


def sources() -> Iterator[tuple[str, list[dict]]]:
    """(source name, rows) for each file."""
    for name, solve in STRING_TASKS.items():
        texts = distinct_strings(LETTERS, random.Random(name))
        yield f"{name.split()[0]}_no_think", [row(f"{name}: {text}", solve(text), None) for text in texts]
    texts = distinct_strings("0123456789", random.Random("checksum"))
    solved = [(f"checksum: {digits}", *checksum(digits)) for digits in texts]
    yield "checksum_no_think", [row(prompt, answer, None) for prompt, answer, _ in solved]
    yield "checksum_think", [row(prompt, answer, working) for prompt, answer, working in solved]


def longer() -> list[dict]:
    """Documents of the tasks in lm_eval/: a string, and four orders of its letters with the sorted one among them."""
    rng = random.Random("longer")
    found = []
    while len(found) < NUM_LONGER:
        letters = rng.sample(LETTERS, LONGER)
        answer = "".join(sorted(letters))
        orders = {"".join(rng.sample(letters, LONGER)) for _ in range(3)} - {answer}
        if len(orders) == 3:
            choices = rng.sample([answer, *sorted(orders)], 4)
            found.append({"text": "".join(letters), "choices": choices, "label": choices.index(answer)})
    return found


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows), encoding="utf-8")


def template_merges() -> list[tuple[str, str]]:
    """BPE merges that make one token of each constant piece of the chat template; other text stays one token a byte.

    Each chain starts at a newline or at "<" and grows away from it: one that started at "us" would merge letters of the
    content too.
    """
    merges: dict[tuple[str, str], None] = {}  # ordered: a merge's rank is its place

    def merge(left: str, right: str) -> str:
        merges[(left, right)] = None
        return left + right

    def grow_right(text: str) -> str:
        token = text[0]
        for symbol in text[1:]:
            token = merge(token, symbol)
        return token

    def grow_left(text: str) -> str:
        token = text[-1]
        for symbol in reversed(text[:-1]):
            token = merge(symbol, token)
        return token

    opening, closing = grow_right("<think>"), grow_right("</think>")
    opening = merge(opening, NEWLINE)
    closing = merge(NEWLINE, merge(merge(closing, NEWLINE), NEWLINE))
    no_thinking = merge(opening, closing)
    grow_left("user" + NEWLINE)
    merge(grow_left("assistant" + NEWLINE), no_thinking)
    return list(merges)


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes, the template's merges, three special tokens."""
    merges = template_merges()
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # use_regex=False: the regex would cut "user\n" before its newline, and no template piece could ever merge.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """A folder that AutoTokenizer reads. It holds no chat template: the recipe names one."""
    folder.mkdir(exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Rewrites the folder."""
    for source, rows in sources():
        write_lines(FOLDER / f"{source}.jsonl", rows)
    (FOLDER / "lm_eval").mkdir(exist_ok=True)
    write_lines(FOLDER / "lm_eval" / "longer.jsonl", longer())
    write_tokenizer(FOLDER / "tokenizer")


if __name__ == "__main__":
    main()
