"""Writes stand-ins for the 27 splits of configs/smollm3.yaml, and a tokenizer: what configs/rehearsal.yaml runs on.

    python configs/rehearsal/make_rehearsal.py [FOLDER]

rewrites FOLDER (data/rehearsal): one JSONL file for each split, in smoltalk2's columns, and the folder tokenizer/.
Invariant: the same bytes on every machine; nothing is read, and a split's rows come from a generator seeded with its
name. Two splits with the same prompts, with and without thinking, share the seed, as table_gpt's do.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import rehearsal_chats as chats
import rehearsal_tools as tools
from rehearsal_chats import Chat
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).resolve().parents[2] / "data" / "rehearsal"
FEWEST_ROWS, MOST_ROWS = 100, 250
FEWEST_PUBLISHED, MOST_PUBLISHED = 835, 1_133_524  # of s1k and OpenThoughts3
VOCABULARY = 1536
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# SmolLM3's tokenizer has these as tokens of their own too; they are not special: an answer shows them.
MARKS = tuple(f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response", "code") for slash in ("", "/"))
# Of Llama 3, GPT-4 and SmolLM3.
WORDS = "|".join(
    [
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


@dataclasses.dataclass(frozen=True)
class Split:
    draw: Callable[[Random], Chat]
    published_rows: int  # as smoltalk2's card gives them
    prompts: str  # the seed: splits that share it have the same prompts

    @property
    def num_rows(self) -> int:
        """By the logarithm of the published number: the largest split is 1,357 times the smallest."""
        share = math.log(self.published_rows / FEWEST_PUBLISHED) / math.log(MOST_PUBLISHED / FEWEST_PUBLISHED)
        return round(FEWEST_ROWS + share * (MOST_ROWS - FEWEST_ROWS))


SPLITS = {
    "smoltalk_smollm3_everyday_conversations_no_think": Split(chats.small_talk, 2_260, "everyday"),
    "smoltalk_smollm3_systemchats_30k_no_think": Split(chats.styled_by_instructions, 33_997, "system 30k"),
    "tulu_3_sft_personas_instruction_following_no_think": Split(chats.persona_instructions, 29_970, "personas"),
    "hermes_function_calling_v1_no_think": Split(tools.function_calling, 8_961, "hermes"),
    "smoltalk_smollm3_smol_magpie_ultra_no_think": Split(chats.advice, 406_843, "magpie"),
    "smoltalk_multilingual_8languages_lang_5_no_think": Split(chats.sums_in_a_language, 254_047, "languages"),
    "table_gpt_no_think": Split(chats.table_question, 13_203, "tables"),
    "OpenHermes_2.5_no_think": Split(chats.instruction, 384_900, "openhermes"),
    "OpenThoughts3_1.2M_no_think_no_think": Split(chats.open_problem, 435_193, "openthoughts"),
    "Mixture_of_Thoughts_science_no_think": Split(chats.science_choice, 86_110, "science"),
    "smoltalk_smollm3_explore_instruct_rewriting_no_think": Split(chats.explore_rewriting, 30_391, "explore"),
    "smoltalk_smollm3_smol_rewrite_no_think": Split(chats.friendly_rewriting, 53_262, "rewrite"),
    "smoltalk_smollm3_smol_summarize_no_think": Split(chats.summary, 96_061, "summarize"),
    "LongAlign_64k_context_lang_annotated_lang_6_no_think": Split(chats.long_context, 6_249, "longalign"),
    "multi_turn_reasoning_if_think": Split(chats.constrained_turns, 28_217, "multi turn"),
    "smoltalk_everyday_convs_reasoning_Qwen3_32B_think": Split(chats.small_talk, 2_057, "everyday"),
    "smoltalk_systemchats_Qwen3_32B_think": Split(chats.styled_by_system, 27_436, "system qwen"),
    "xlam_traces_no_think": Split(tools.parallel_calls, 59_962, "xlam"),
    "smolagents_toolcalling_traces_think": Split(tools.code_agent, 9_079, "smolagents"),
    "s1k_1.1_think": Split(chats.competition, 835, chats.COMPETITION_SEED),
    "LongAlign_64k_Qwen3_32B_yarn_131k_think": Split(chats.long_context, 7_526, "longalign"),
    "aya_dataset_Qwen3_32B_think": Split(chats.colours_in_a_language, 15_222, "aya"),
    "smoltalk_multilingual8_Qwen3_32B_think": Split(chats.sums_in_a_language, 244_736, "languages"),
    "OpenThoughts3_1.2M_think": Split(chats.open_problem, 1_133_524, "openthoughts"),
    "table_gpt_Qwen3_32B_think": Split(chats.table_question, 13_201, "tables"),
}
# Mid-training's have thinking in the content, and no kwargs. OpenThoughts3 is the SFT's, whose prompts they share.
MID_SPLITS = {
    "Llama_Nemotron_Post_Training_Dataset_reasoning_r1": Split(chats.competition, 3_644_790, "nemotron"),
    "OpenThoughts3_1.2M": Split(chats.open_problem, 1_135_104, "openthoughts"),
}
# Of these a twentieth repeats an earlier row: word for word, or with a word more. Real sources do so too.
REPEATED_EXACTLY, REPEATED_NEARLY = "OpenHermes_2.5_no_think", "smoltalk_smollm3_smol_summarize_no_think"
REPEATED_SHARE = 0.05


def row(chat: Chat, source: str, *, think: bool, with_kwargs: bool = True) -> dict[str, Any]:
    """A conversation in smoltalk2's columns: thinking stands in the content, tools are text."""
    messages = []
    for said in chat.messages:
        thinking = f"<think>\n{said.reasoning}\n</think>\n\n" if think and said.role == "assistant" else ""
        messages.append({"role": said.role, "content": thinking + said.text})
    if not with_kwargs:
        return {"messages": messages, "source": source}
    kwargs = {
        "custom_instructions": chat.custom_instructions,
        "enable_thinking": think,
        "python_tools": list(chat.python_tools),
        "xml_tools": list(chat.xml_tools),
    }
    return {"messages": messages, "chat_template_kwargs": kwargs, "source": source}


def rows_of(source: str) -> list[dict[str, Any]]:
    is_mid = source in MID_SPLITS
    split = MID_SPLITS[source] if is_mid else SPLITS[source]
    rng, think = Random(split.prompts), not source.endswith("_no_think")
    rows = [row(split.draw(rng), source, think=think, with_kwargs=not is_mid) for _ in range(split.num_rows)]
    if source in (REPEATED_EXACTLY, REPEATED_NEARLY):
        repeats = Random(f"repeats of {source}")
        for place in repeats.sample(range(len(rows) // 2, len(rows)), round(REPEATED_SHARE * len(rows))):
            again = json.loads(json.dumps(rows[repeats.randrange(len(rows) // 2)]))
            if source == REPEATED_NEARLY:
                user = next(message for message in again["messages"] if message["role"] == "user")
                user["content"] += " Thanks!"
            rows[place] = again
    return rows


def texts(rows: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """What the vocabulary is learnt from: messages, instructions and tools."""
    for one in (one for of_source in rows.values() for one in of_source):
        kwargs = one["chat_template_kwargs"]
        yield from (f"{message['role']}\n{message['content']}" for message in one["messages"])
        yield from (kwargs["custom_instructions"], *kwargs["python_tools"], *kwargs["xml_tools"])


def build_tokenizer(rows: dict[str, list[dict[str, Any]]]) -> Tokenizer:
    """Byte-level BPE that cuts words as SmolLM3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(rows), trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    assert tokenizer.get_vocab_size() == VOCABULARY, "the recipe's model.config.vocab_size is this"
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """A folder that AutoTokenizer reads. It holds no chat template: the recipe names one."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Rewrites the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {source: rows_of(source) for source in (*SPLITS, *MID_SPLITS)}
    for source, of_source in rows.items():
        lines = "".join(json.dumps(one, ensure_ascii=False, separators=(",", ":")) + "\n" for one in of_source)
        (folder / f"{source}.jsonl").write_text(lines, encoding="utf-8")
    write_tokenizer(build_tokenizer({source: rows[source] for source in SPLITS}), folder / "tokenizer")
    print(f"{sum(map(len, rows.values()))} rows of {len(rows)} sources are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
