"""What the tests of the data path share: recipes of local files, stages built for real, two tokenizers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_core.data.rendering.build import chat_template, make_renderer
from sft_core.data.rendering.policy import RowPolicy
from sft_core.data.rendering.spans import Renderer
from sft_core.data.tokenizer.tokenizer import load_tokenizer
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.stage import Stage
from sft_core.store.store import Store

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart" / "tokenizer"
THINKING = (ROOT / "configs" / "templates" / "thinking.jinja").read_text()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines under tmp_path."""

    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pinned() -> Callable[..., PinnedRecipe]:
    """The pinned recipe of some sources; other sections as given."""

    def make(*datasets: dict[str, Any], **sections: Any) -> PinnedRecipe:
        mixture = {"selection_share": 0.0, "report_share": 0.0} | sections.pop("mixture", {})
        data = {
            "name": "test",
            "model": {"config": {"model_type": "llama"}, "tokenizer_name_or_path": str(QUICKSTART)},
            "chat_template": {"template": "thinking", "kwargs": {"header": False}},
            "dataset_mixture": {**mixture, "datasets": list(datasets)},
        }
        return pin(parse_recipe(data | sections))

    return make


@pytest.fixture
def ensure(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Builds a stage in a store under tmp_path: the output's folder and its manifest."""

    def build(stage: Stage, recipe: PinnedRecipe, **part: Any) -> tuple[Path, dict[str, Any]]:
        store = Store(tmp_path / "store")
        ref = store.ensure(stage, recipe, **part)
        return store.path(ref), store.manifest(ref)

    return build


def _load(folder: Path | str, **options: Any) -> PreTrainedTokenizerFast:
    default = {"revision": None, "add_special_tokens": [], "eos_token": None, "trust_remote_code": False}
    return load_tokenizer(path=str(folder), **(default | options))


@pytest.fixture(scope="session")
def load() -> Callable[..., PreTrainedTokenizerFast]:
    return _load


@pytest.fixture(scope="session")
def quickstart() -> PreTrainedTokenizerFast:
    return _load(QUICKSTART)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross what templates write: newlines, spaces before words, `\\n\\n`.

    As in Qwen's and SmolLM3's, <think> is an added token that is not special. Runs of spaces are added tokens too,
    and stand after the control tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentences = ["assistant\n\nHello there\n\n", "user\n\n\nThe answer is\n", "</think>\n\nThe answer", "    indented"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences * 20, trainer)
    assert any("Ċ" in token and len(token) > 2 for token in tokenizer.get_vocab()), "no merge crosses a newline"
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "  ", "        ")])
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return _load(folder)


@pytest.fixture(scope="session")
def renderer() -> Callable[..., Renderer]:
    """A renderer for a tokenizer: by the thinking template without its header unless told otherwise."""

    def make(
        tokenizer: PreTrainedTokenizerFast, template: str = THINKING, stop_tokens: Sequence[str] = (), **policy: str
    ) -> Renderer:
        kwargs = {"header": False} if template is THINKING else {}
        made = chat_template(tokenizer, source=template, kwargs=kwargs, date="2026-01-01")
        return make_renderer(tokenizer, made, RowPolicy(**policy), list(stop_tokens))

    return make
