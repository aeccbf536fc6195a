"""Conversations to masked token shards on disk: ours beside TRL's own preparation and beside bare tokenizing.

    python benchmarks/tokenization.py

Both sides get the same conversations, tokenizer and template, end with ids and a mask on disk, and must agree in each
id and each mask. Ours are the render and tokenize stages as the flow runs them, the mask proof included; TRL's is
SFTTrainer's `_prepare_dataset` with assistant_only_loss, at the faster of its settings. Every run is a process of its
own, its imports are not counted, and the sides take turns. The best run of each counts.

The template is plain ChatML with generation markers: it does the least, so neither side wins by how it runs a long one.
`--template thinking` takes ours instead, which does far more for each turn. The tokenizer is a byte-level BPE of 32 k
tokens with a pre-tokenizer of the Llama 3 kind, trained here in seconds: a downloaded one would be there or not.
Prints tables, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Their sources are the text.
PACKAGES = ("datasets", "deepspeed", "networkx", "numba", "numpy", "pandas", "scipy", "sympy", "torch", "transformers")
NUM_CONVERSATIONS, NUM_FOR_VOCABULARY, VOCABULARY = 10_000, 1_500, 32_000
MAX_CHARACTERS = 10_000  # of a function's source
ROUNDS = 2
DEFINITION = re.compile(r"^(?= *(?:def|class) \w)", re.MULTILINE)
CHATML = """{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
KWARGS = {"header": False, "enable_thinking": False}  # read by thinking.jinja alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", choices=("chatml", "thinking"), default="chatml")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--run", nargs=3, metavar=("SIDE", "PROCESSES", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        side, processes, folder = options.run
        print(json.dumps(SIDES[side](Path(folder), int(processes))))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.template, options.rounds)


def compare(folder: Path, template: str, rounds: int) -> None:
    from tqdm import tqdm

    from sft_core.report.tables import text_table

    prepare(folder, template)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    kinds = [("trl", 1), ("ours", 1), ("trl", 2), ("ours", 2), ("bpe", 1)]
    for kind in tqdm(kinds * rounds, disable=None, desc="runs"):
        runs.setdefault(kind, []).append(run(*kind, folder))
    check_equal(folder)
    best = {kind: min(found, key=lambda one: one["seconds"]) for kind, found in runs.items() if kind[0] != "bpe"}
    num_tokens = best["ours", 1]["tokens"]
    rows = []
    for processes in (1, 2):
        ours, trl = best["ours", processes], best["trl", processes]
        for name, one in ((f"TRL ({trl['setting']})", trl), ("ours", ours)):
            speed, ratio = num_tokens / one["seconds"], trl["seconds"] / one["seconds"]
            rows.append((name, processes, one["seconds"], round(speed), ratio, one["bytes"] / num_tokens))
    print(f"{NUM_CONVERSATIONS} conversations, {num_tokens} tokens, template {template}; ids and masks are equal\n")
    print(text_table(("to shards on disk", "processes", "seconds", "tokens/s", "x TRL", "bytes a token"), rows))
    bare_s = min(one["bare"] for one in runs["bpe", 1])
    stage = min(runs["bpe", 1], key=lambda one: one["stage"])
    parts = {
        "render stage": stage["render"],
        "tokenize stage": stage["stage"],
        **{f"  {name}": seconds for name, seconds in stage["parts"].items()},
        "bare encode_batch_fast": bare_s,
    }
    rows = [(name, seconds, seconds / bare_s) for name, seconds in parts.items()]
    print("\n" + text_table(("where the time of one process goes", "seconds", "x bare encoding"), rows))
    print(
        json.dumps(
            {
                "ratio_vs_trl_1": round(best["trl", 1]["seconds"] / best["ours", 1]["seconds"], 2),
                "ratio_vs_trl_2": round(best["trl", 2]["seconds"] / best["ours", 2]["seconds"], 2),
                "fraction_of_bpe": round(bare_s / stage["stage"], 3),
                "bytes_per_token": round(best["ours", 1]["bytes"] / num_tokens, 2),
                "bare_vs_trl_1": round(best["trl", 1]["seconds"] / bare_s, 2),
                "tokens_per_s_1": round(num_tokens / best["ours", 1]["seconds"]),
                "tokens_per_s_2": round(num_tokens / best["ours", 2]["seconds"]),
            }
        )
    )


def run(side: str, processes: int, folder: Path) -> dict[str, Any]:
    """One run in a process of its own. One process means one thread, too."""
    command = [sys.executable, __file__, "--run", side, str(processes), str(folder)]
    settings = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# What both sides get


def prepare(folder: Path, template: str) -> None:
    """Writes rows.jsonl, which ours downloads, the same rows as the Arrow data set trl/, a tokenizer, the template."""
    import datasets

    talks = list(itertools.islice(conversations(seed=0), NUM_CONVERSATIONS + NUM_FOR_VOCABULARY))
    rows, others = talks[:NUM_CONVERSATIONS], talks[NUM_CONVERSATIONS:]
    assert len(others) == NUM_FOR_VOCABULARY, f"{', '.join(PACKAGES)} hold too little text"
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if template == "chatml":
        source = CHATML
    else:
        source = (ROOT / "configs" / "templates" / "thinking.jinja").read_text()
        rows = [row | {"chat_template_kwargs": KWARGS} for row in rows]
    (folder / "template.jinja").write_text(source)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(folder / "trl")
    write_tokenizer(folder / "tokenizer", others, VOCABULARY)


def conversations(seed: int) -> Iterator[dict[str, Any]]:
    """Distinct conversations of 1 to 4 exchanges: what functions do, by their docstrings, and how they are written."""
    rng = random.Random(seed)
    turns = itertools.chain.from_iterable(about(*function) for function in documented_functions(rng))
    while talk := list(itertools.islice(turns, rng.randint(1, 4))):
        yield {"messages": list(itertools.chain.from_iterable(talk))}


def about(name: str, docstring: str, source: str) -> Iterator[list[dict[str, str]]]:
    for question, answer in (
        (f"What does `{name}` do?", docstring),
        (f"Show me how {name} is written.", f"This is the whole of it:\n\n```python\n{source}\n```"),
    ):
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def documented_functions(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Name, docstring and source of functions and classes, each docstring once, in an order that the seed decides."""
    files: list[Path] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, package
        files += sorted(Path(spec.origin).parent.rglob("*.py"))
    rng.shuffle(files)
    seen: set[str] = set()
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if "<|" in text:
            continue  # a control token that somebody typed is text for us, and is not for TRL
        for definition in DEFINITION.split(text)[1:]:
            signature, *rest = definition.split('"""', 2)
            docstring = inspect.cleandoc(rest[0]) if len(rest) == 2 else ""
            # Each content begins with a letter: only then does TRL, which tokenizes whole texts, get our ids.
            if len(docstring) > 500 and docstring[0].isalpha() and docstring not in seen:
                seen.add(docstring)
                source = textwrap.dedent(signature.rstrip() + rest[1])
                yield (
                    definition.split(maxsplit=2)[1].partition("(")[0].rstrip(":"),
                    docstring,
                    source[:MAX_CHARACTERS].strip(),
                )


def write_tokenizer(folder: Path, rows: list[dict[str, Any]], num_tokens: int) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sft_core.data.tokenizer.word_cache import LLAMA_3

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    assert tokenizer.get_vocab_size() == num_tokens
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    whole.save_pretrained(folder)


# The sides, each in its own process


def run_ours(folder: Path, processes: int) -> dict[str, Any]:
    from sft_core.data.tokenizer.tokenizer import load_tokenizer
    from sft_core.store.store import Store
    from steps.render import RENDERED
    from steps.tokenize import TOKENS

    pinned = pin_recipe(folder, processes)
    load_tokenizer(**pinned.tokenizer_loader)  # the imports that it needs; a stage loads it again
    with tempfile.TemporaryDirectory(dir=folder) as root:
        store = Store(root)
        rendered = store.ensure(RENDERED, pinned, source="rows")
        ref = store.ensure(TOKENS, pinned, source="rows")
        counts = store.manifest(ref)["counts"]
        assert counts["rows"] == NUM_CONVERSATIONS
        save_ours(store.path(ref), folder / f"ours-{processes}.npz")
        return {
            "seconds": sum(store.manifest(one)["seconds"] for one in (rendered, ref)),
            "tokens": counts["tokens"],
            "bytes": store.num_bytes(ref),
        }


def run_trl(folder: Path, processes: int) -> dict[str, Any]:
    """The faster of its settings: one process can be this one or a worker's; the rows can be on disk or in memory."""
    import datasets
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    torch.set_num_threads(1)
    rows = datasets.load_from_disk(folder / "trl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = (folder / "template.jinja").read_text()
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, **shape)
    settings = SFTConfig(
        output_dir=str(folder / "trained"),
        assistant_only_loss=True,
        max_length=None,  # else two more passes over the rows
        dataset_num_proc=None if processes == 1 else processes,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    few = rows.select(range(8))
    trainer = SFTTrainer(LlamaForCausalLM(config), settings, train_dataset=few, processing_class=tokenizer)
    started = time.perf_counter()
    prepared = trainer._prepare_dataset(rows, tokenizer, settings, False, None, "train")
    seconds = time.perf_counter() - started
    save_trl(prepared, folder / f"trl-{processes}.npz")
    num_bytes = sum(Path(file["filename"]).stat().st_size for file in prepared.cache_files)
    return {"seconds": seconds, "bytes": num_bytes, "setting": f"dataset_num_proc={settings.dataset_num_proc}"}


def run_bpe(folder: Path, processes: int) -> dict[str, Any]:
    """Our tokenize stage, then bare encoding of the same rows' texts; and what the parts of ours take."""
    import pyarrow.parquet as pq

    from sft_core.data.shards.parallel import shard_folders
    from sft_core.data.tokenizer.tokenizer import load_tokenizer
    from sft_core.data.tokens import build as tokens
    from sft_core.store.store import Store
    from steps.render import RENDERED
    from steps.tokenize import TOKENS

    pinned = pin_recipe(folder, processes)
    tokenizer = load_tokenizer(**pinned.tokenizer_loader).backend_tokenizer
    spent: dict[str, float] = {}
    tokens.encode_rows = clocked(tokens.encode_rows, "encode", spent)
    tokens.MaskProof.check = clocked(tokens.MaskProof.check, "proof", spent)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        store = Store(root)
        rendered = store.ensure(RENDERED, pinned, source="rows")
        shards = shard_folders(store.path(rendered))
        texts = [text for shard in shards for text in pq.read_table(shard / "rendered.parquet")["text"].to_pylist()]
        ref = store.ensure(TOKENS, pinned, source="rows")
        stage_s = store.manifest(ref)["seconds"]
        started = time.perf_counter()
        for start in range(0, len(texts), 256):
            tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)
        return {
            "bare": time.perf_counter() - started,
            "stage": stage_s,
            "parts": {**spent, "reading, writing, loading": stage_s - sum(spent.values())},
            "render": store.manifest(rendered)["seconds"],
        }


def clocked(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    return call


SIDES = {"ours": run_ours, "trl": run_trl, "bpe": run_bpe}


def pin_recipe(folder: Path, num_workers: int) -> Any:
    from sft_core.pins.pinned import pin
    from sft_core.recipe.parse import parse_recipe

    template = {"template": str(folder / "template.jinja"), "kwargs": KWARGS}
    recipe = parse_recipe(
        {
            "name": "tokenization",
            "model": {"config": {"model_type": "llama"}, "tokenizer_name_or_path": str(folder / "tokenizer")},
            "chat_template": template,
            "dataset_mixture": {"datasets": [{"name": "rows", "path": str(folder / "rows.jsonl")}]},
            "runtime": {"num_workers": num_workers},
        }
    )
    return pin(recipe)


# What they must agree in


def save_ours(folder: Path, path: Path) -> None:
    from sft_core.data.shards.token_shards import TokenShards

    shards = TokenShards(folder)
    rows = [shards[number] for number in range(len(shards))]
    save(path, [row.input_ids for row in rows], [row.trained for row in rows])


def save_trl(prepared: Any, path: Path) -> None:
    import numpy as np

    rows = prepared.with_format("numpy")
    ids, labels = ([np.asarray(row[name]) for row in rows] for name in ("input_ids", "labels"))
    save(path, ids, [one != -100 for one in labels])


def save(path: Path, ids: list[Any], trained: list[Any]) -> None:
    import numpy as np

    lengths = np.array([len(one) for one in ids])
    whole = (np.concatenate(part) for part in (ids, trained))
    np.savez(path, *(lengths, *(part.astype(np.int32) for part in whole)))


def check_equal(folder: Path) -> None:
    import numpy as np

    first, *others = (np.load(path) for path in sorted(folder.glob("*.npz")))
    assert len(others) == 3
    for other in others:
        for part in first.files:
            assert np.array_equal(first[part], other[part]), f"ours and TRL's differ in {part}"


if __name__ == "__main__":
    main()
