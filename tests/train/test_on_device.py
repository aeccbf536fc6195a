"""What a GPU may break, in small: the same bodies run on a CPU in every run of the tests, so that they do not rot.

Training in this process takes the GPU that is there, so what is meant for a CPU is skipped beside one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.olmoe import modeling_olmoe

from sft_core.data.packing.plan import PackPlan
from sft_core.data.shards.token_shards import TokenShards
from sft_core.evaluate.generate import generate_answers
from sft_core.evaluate.loading import load_scored
from sft_core.evaluate.tasks import row_losses
from sft_core.pins.pinned import PinnedRecipe, pin
from sft_core.recipe.parse import parse_recipe
from sft_core.store.store import Store
from sft_core.train.accelerator import check_machine
from sft_core.train.checkpoints import numbered, step_of
from sft_core.train.collate import collate, to_device
from sft_core.train.job import ModelLoader, TokenizerLoader, TrainJob
from sft_core.train.log_file import read_events
from sft_core.train.loss import Forward, trained_losses, trained_token_nll
from sft_core.train.models.attention import choose_attention
from sft_core.train.models.model import load_model
from sft_core.train.models.router import router_loss
from sft_core.train.models.small import small_model
from sft_core.train.preflight import try_class
from sft_core.train.probe import class_isolation, model_isolation
from steps.mix import MIXTURE
from steps.search import progress
from steps.train import TRAINED
from tests.train.models.test_attention import WINDOW
from tests.train.models.test_lora import recipe as lora_recipe
from tests.train.models.test_router import COEFFICIENT, moe, packs_of
from tests.train.models.test_router import model_of as moe_model_of
from tests.train.test_gpu import BFLOAT16, LEAK, TF32, WIDE, largest_error, nll_and_gradients, on
from tests.train.test_leaking_model import OPT
from tests.train.test_loss import random_documents
from tests.train.test_objective import costs_of, documents_of, step_packs
from tests.train.test_probe import documents_of as random_documents_for
from tests.train.tiny import LLAMA, SOURCES, Run, phase_recipe, tiny_recipe

HEADS_OF_32 = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
HALF = 0.03  # of a loss: what bf16 rounds


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("training takes the GPU that is there")
    return request.param


@contextlib.contextmanager
def classes_left_as_they_are() -> Iterator[None]:
    """Liger replaces layers in a model's module, for later models too."""
    before = {module: dict(vars(module)) for module in (modeling_llama, modeling_olmoe)}
    try:
        yield
    finally:
        for module, names in before.items():
            vars(module).update(names)


@pytest.fixture(scope="module")
def train(device: str, train_here: Callable[..., Run]) -> Callable[..., Run]:
    def run(data: dict[str, Any], out: Path | None = None) -> Run:
        with classes_left_as_they_are():
            return train_here(data, out)

    return run


def recipe(**changes: dict[str, Any]) -> dict[str, Any]:
    """In bf16, and attention by `auto`, where the changes say nothing else."""
    model = {"config": HEADS_OF_32, "attn_implementation": "auto", **changes.pop("model", {})}
    return tiny_recipe(model=model, training={"bf16": True, **changes.pop("training", {})}, **changes)


def how_it_ran(run: Run) -> dict[str, Any]:
    return read_events(run.folder / "logs" / "forward.jsonl")[-1]


def losses_of(run: Run) -> list[float]:
    return [event["loss"] for event in run.events]


# Attention


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("llama", {}),  # grouped queries
        ("smollm3", {}),  # layers without positions
        ("mistral", {"sliding_window": WINDOW}),
        ("qwen3", {"head_dim": 64}),
    ],
)
def test_varlen_in_half_precision_is_documents_by_themselves_without_a_mask(
    kind: str, own: dict[str, Any], device: str
) -> None:
    def model_of(attention: str) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**WIDE, **own})
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16).to(device)

    documents, bounds = random_documents(90, 50, 1, 140, 20), Forward("bounds")
    expected = nll_and_gradients(model_of("sdpa"), [on(device, [document]) for document in documents])
    model, pack, masks = model_of("varlen"), on(device, documents), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    assert largest_error(nll_and_gradients(model, [pack], forward=bounds), expected) < BFLOAT16
    assert len(masks) == 4 and all(mask is None for mask in masks)
    one = collate([documents[0]])["bounds"].new_tensor([0, 301]).to(device)
    leaking = {**pack, "bounds": one, "lengths": np.array([301])}
    if kind != "mistral":  # whose window reaches over few tokens of another document
        leaking["position_ids"] = torch.arange(301, device=device)[None]
        assert largest_error(nll_and_gradients(model, [leaking], forward=bounds), expected) > LEAK


@pytest.mark.slow
def test_auto_takes_what_the_device_and_the_precision_allow(device: str, train: Callable[..., Run]) -> None:
    """And float32, whatever is there, has attention that computes in it."""
    half, whole = (train(recipe(training={"bf16": bf16})) for bf16 in (True, False))
    assert how_it_ran(half)["attention"] == ("varlen" if device == "cuda" else "sdpa")
    assert how_it_ran(whole)["attention"] == "sdpa"
    for run in (half, whole):
        told = how_it_ran(run)
        assert told["documents"] == "together" and told["fused_head"] == (device == "cuda")
        assert losses_of(run)[-1] < losses_of(run)[0] - 1
    assert losses_of(half) == pytest.approx(losses_of(whole), rel=HALF)


def test_demands_that_a_device_cannot_meet_are_refused_before_any_work(device: str) -> None:
    def try_recipe(**changes: dict[str, Any]) -> list[str]:
        data = recipe(**changes)
        loader = {"path": None, "revision": None, "config": data["model"]["config"], "trust_remote_code": False}
        check_machine(phase_recipe(data))
        return try_class(phase_recipe(data), loader).warnings

    assert try_recipe() == []
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ValueError, match="flash_attention_2"):
            try_recipe(model={"attn_implementation": "flash_attention_2"})
    whole = {"model": {"attn_implementation": "varlen"}, "training": {"bf16": False}}
    if device == "cuda":
        with pytest.raises(ValueError, match="varlen computes only in half precision"):
            try_recipe(**whole)
    else:
        assert try_recipe(**whole) == []


# Documents apart


SIZES_OF = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "gpt_oss": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
    },  # in half precision, grouped kernels want multiples of 8
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "leaks"), [("llama", False), ("olmoe", False), ("opt", True), ("gpt_oss", True), ("lfm2", True)]
)
def test_probe_in_half_precision_tells_models_that_leak_from_those_that_do_not(
    kind: str, leaks: bool, device: str
) -> None:
    config = AutoConfig.for_model(kind, **SIZES_OF.get(kind, {}))
    chosen = choose_attention("auto", config, half=True)
    of_class = class_isolation(config, attention=chosen, trust_remote_code=False, half=device == "cuda", device=device)
    model = small_model(config, attention=chosen, trust_remote_code=False).to(device, torch.bfloat16)
    attention = model.config._attn_implementation
    found = model_isolation(model, of_class, attention=attention, device=device, exact=False)
    assert (found.document_inputs is None) is leaks, (of_class, found)
    documents = random_documents_for(model, 40, 9, 1, 71)
    packed = to_device(collate(documents), device)
    with torch.no_grad():
        alone = trained_token_nll(model, packed, dataclasses.replace(found.forward, alone=True))
        nll = trained_token_nll(model, packed, found.forward)
    assert float((nll - alone).norm() / alone.norm()) < 0.01
    sums, _ = row_losses(model, [row for row, _ in documents])
    assert sums.sum() == pytest.approx(float(alone.sum()), rel=0.01)


def first_loss(run: Run, make_job: Callable[[PinnedRecipe, Path], TrainJob], device: str) -> float:
    """Of the start model over the first step's packs, each document by itself and by its ids alone, in float32."""
    job = make_job(run.pinned, run.folder)
    plan, shards = PackPlan.read(job.packs), [TokenShards(*folders) for folders in job.tokens]
    plain = dataclasses.replace(job.spec.model, attn_implementation="sdpa")
    model, _ = load_model(plain, job.spec.tokenizer, seed=42)
    first = step_packs(costs_of(plan, model), global_batch_size=4, num_epochs=1, max_steps=1, seed=42)[0]
    model, nll = model.to(device), []
    with torch.no_grad():
        for ids, mask in documents_of(plan, shards, first):
            logits = model(ids[None].to(device), use_cache=False).logits[0, :-1].float().cpu()
            nll.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask])
    return torch.cat(nll).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(("config", "documents"), [(HEADS_OF_32, "together"), (OPT, "alone")], ids=["llama", "opt"])
def test_training_has_the_loss_of_documents_by_themselves(
    config: dict[str, Any],
    documents: str,
    device: str,
    train: Callable[..., Run],
    make_job: Callable[[PinnedRecipe, Path], TrainJob],
) -> None:
    run = train(recipe(model={"config": config}, training={"max_steps": 2, "learning_rate": 1e-3}))
    assert how_it_ran(run)["documents"] == documents
    assert losses_of(run)[0] == pytest.approx(first_loss(run, make_job, device), rel=HALF / 3)


@pytest.mark.slow
def test_forward_of_several_packs_has_the_same_objective(device: str, train: Callable[..., Run]) -> None:
    varlen = {"attn_implementation": "varlen"}
    one, two = (train(recipe(model=varlen, runtime={"tokens_per_forward": number * 384})) for number in (1, 2))
    assert [how_it_ran(run)["packs_a_forward"] for run in (one, two)] == [1, 2]
    assert losses_of(two) == pytest.approx(losses_of(one), rel=HALF)
    by_auto = train(recipe(training={"max_steps": 2}))
    assert (how_it_ran(by_auto)["packs_a_forward"] > 1) == (device == "cuda"), "a GPU idles over one small pack"
    assert losses_of(by_auto)[0] == pytest.approx(losses_of(one)[0], rel=HALF)


# Adapters and experts


@pytest.mark.slow
def test_lora_with_an_added_token_on_tied_weights_trains_and_is_merged(
    device: str, train: Callable[..., Run], tmp_path: Path
) -> None:
    """The head's fused kernel would read the frozen weight below PEFT's wrapper."""
    data = lora_recipe(tmp_path, tied=True)
    data["model"] |= {"config": HEADS_OF_32, "attn_implementation": "auto"}
    data["training"] |= {"bf16": True, "max_steps": 6}
    run = train(data)
    assert not how_it_ran(run)["fused_head"] and losses_of(run)[-1] < losses_of(run)[0] - 0.3
    loaders = ModelLoader(**run.pinned.model_loader), TokenizerLoader(**run.pinned.tokenizer_loader)
    plain = dataclasses.replace(loaders[0], attn_implementation="sdpa")
    base, ids = load_model(plain, loaders[1], seed=42)[0].to(device).eval(), torch.arange(280, 292, device=device)[None]
    with torch.no_grad():
        before, untrained = base(ids).logits, base.get_input_embeddings().weight[291].cpu().clone()
        adapted = PeftModel.from_pretrained(base, run.model / "adapter").to(device).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run.model).to(device).eval()(ids).logits
    assert float((merged - adapted).norm() / adapted.norm()) < TF32
    assert float((adapted - before).norm() / before.norm()) > 5 * TF32, "nothing was learned"
    added = load_file(run.model / "model.safetensors")["model.embed_tokens.weight"][291]
    assert float((added - untrained).abs().max()) > 1e-2
    del data["model"]["add_special_tokens"], data["model"]["eos_token"], data["chat_template"]["template"]
    data["chat_template"]["template"], data["training"]["max_steps"] = "thinking", 1
    assert how_it_ran(train(data))["fused_head"] == (device == "cuda")


@pytest.mark.slow
def test_router_loss_is_the_models_own_and_is_trained(device: str, train: Callable[..., Run]) -> None:
    model = moe_model_of("olmoe").to(device)
    (pack,) = packs_of((40,))
    batch, router = to_device(collate(pack), device), router_loss(model.config, COEFFICIENT)
    with torch.no_grad():
        total = trained_losses(model, batch, Forward(router=router)).router
        own = model(input_ids=batch["input_ids"], use_cache=False, output_router_logits=True).aux_loss
    assert total is not None and float(total) / 40 == pytest.approx(float(own), rel=1e-3)
    with_loss, without = (
        train(
            recipe(
                model={"config": moe("olmoe")},
                training={"max_steps": 3, "router_aux_loss_coef": value},
            )
        )
        for value in (COEFFICIENT, 0.0)
    )
    assert how_it_ran(with_loss)["documents"] == "together"
    for step, (more, less) in enumerate(zip(losses_of(with_loss), losses_of(without), strict=True)):
        assert more - less > 0.3 * COEFFICIENT, f"{step=}"


# Around the steps


@pytest.mark.slow
def test_training_goes_on_from_its_checkpoint_as_if_it_had_not_ended(device: str, train: Callable[..., Run]) -> None:
    data = recipe(runtime={"save_steps": 2, "keep_checkpoints": 3})
    run = train(data)
    weights, losses, events = load_file(run.model / "model.safetensors"), losses_of(run), run.events
    assert [step_of(checkpoint) for checkpoint in numbered(run.folder / "checkpoints")] == [2, 4, 6]
    for step in (4, 6):
        shutil.rmtree(run.folder / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(run.model)
    again = train(data, run.folder)
    found = load_file(again.model / "model.safetensors")
    assert again.events[:2] == events[:2] and len(events) == 6, "their times too: these steps are not trained again"
    assert losses_of(again) == pytest.approx(losses, rel=0 if device == "cpu" else HALF)
    for name, value in weights.items():  # flash attention's backward pass adds in any order
        assert torch.equal(found[name], value) or (
            device == "cuda" and float((found[name] - value).norm() / value.norm()) < TF32
        ), name


@pytest.mark.slow
def test_selection_keeps_the_best_weights_and_their_losses_are_right(
    device: str, train: Callable[..., Run], make_job: Callable[[PinnedRecipe, Path], TrainJob]
) -> None:
    during = {"every_epochs": 0.5, "max_rows": 12, "keep_best": True}
    run = train(
        recipe(
            dataset_mixture={"selection_share": 0.2},
            training={"max_steps": 8, "learning_rate": 0.4, "lr_scheduler_type": "constant"},
            evaluation={"during_training": during},
        )
    )
    events = read_events(run.folder / "logs" / "selection.jsonl")
    best = min(events[1:], key=lambda event: event["loss"])
    assert 0 < best["step"] < 8 and len(events) > 3, "without a worse end nothing is kept"
    stored = load_file(run.folder / "checkpoints" / f"checkpoint-{best['step']}" / "model.safetensors")
    ended = load_file(run.model / "model.safetensors")
    assert all(stored[name].equal(ended[name]) for name in ended)
    job = make_job(run.pinned, run.folder)
    assert job.selection_packs is not None
    plan, shards = PackPlan.read(job.selection_packs), [TokenShards(*folders) for folders in job.tokens]
    network = AutoModelForCausalLM.from_pretrained(run.model).to(device).eval()
    for number, source in enumerate(SOURCES):
        rows = [shards[number][int(row)] for row in plan.row[plan.source == number]]
        loss = row_losses(network, rows)[0].sum() / sum(int(row.trained[1:].sum()) for row in rows)
        assert best["losses"][source] == pytest.approx(loss, rel=HALF)


@pytest.mark.slow
def test_checkpoint_is_scored_and_answers_in_half_precision(device: str, train: Callable[..., Run]) -> None:
    run = train(recipe())
    pinned = run.pinned
    loader = ModelLoader(str(run.model), None, None, "auto", "auto", [], False)
    tokenizer = dataclasses.replace(TokenizerLoader(**pinned.tokenizer_loader), path=str(run.model))
    network, vocabulary = load_scored(loader, tokenizer, True, 42)
    attention = "varlen" if device == "cuda" else "sdpa"
    assert (network.device.type, network.dtype) == (device, torch.bfloat16)
    assert network.config._attn_implementation == attention
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 291, length).astype(np.int32) for length in (3, 40, 17, 9, 9)]
    answers = generate_answers(network, prompts, stop_ids=[291], pad_id=vocabulary.pad_token_id or 0, max_new_tokens=8)
    assert network.config._attn_implementation == attention, "generation leaves it as it was"
    exact = AutoModelForCausalLM.from_pretrained(run.model).to(device).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 8
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None].to(device)
        with torch.no_grad():
            logits = exact(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        short = logits.max(dim=-1).values - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert float((short / logits.std(dim=-1)).max()) < 0.2, "each token is the likeliest one, but for rounding"


@pytest.mark.slow
def test_search_rolls_out_and_decides(device: str, tmp_path: Path) -> None:
    """By the ranks that a launcher starts."""
    search = {"strategy": "msft", "preset": "paper", "epochs_per_rollout": 2.0, "evaluations_per_epoch": 2}
    data = recipe(
        dataset_mixture={"selection_share": 0.2},
        training={"learning_rate": 0.02, "lr_scheduler_type": "constant"},
        search={**search, "max_rows": 10, "max_rollouts": 1},
    )
    del data["training"]["num_train_epochs"]
    store, pinned = Store(tmp_path / "store"), pin(parse_recipe(data))
    store.ensure(MIXTURE, pinned)
    (begun,) = progress(store, pinned).searches.values()
    assert not begun.is_over
    folder = store.path(store.ensure(TRAINED, begun.pinned, round=0))
    (searched,) = progress(store, pinned).searches.values()
    assert searched.is_over and searched.rounds.best is not None
    told = json.loads((folder / "logs" / "forward.jsonl").read_text().splitlines()[-1])
    assert told["attention"] == ("varlen" if device == "cuda" else "sdpa")
    losses = [event["loss"] for event in read_events(folder / "logs" / "selection.jsonl")]
    assert len(losses) == 5 and min(losses) < losses[0] - 1
