"""One training rank: `python -m torch.distributed.run ... -m sft_core.train.main JOB.json`.

Reads shards and a plan, writes a checkpoint folder; knows neither the store nor the flow.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_core.lifetime import die_with_parent
from sft_core.rank_strategies import STRATEGIES

if TYPE_CHECKING:
    import numpy as np

    from sft_core.data.packing import PackPlan
    from sft_core.train.collate import PackCollator
    from sft_core.train.flops import Flops
    from sft_core.train.online import OnlineSchedule, Sampler
    from sft_core.train.probe import Isolation
    from sft_core.train.selection import AnswerScorer, Selection, Watch
    from sft_core.train.trainer import PackTrainer

log = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """Training ended before its last step because somebody asked for it."""


def main(job_path: Path, train: Callable[[dict[str, Any], Path], None]) -> None:
    """What a rank does around its training: logs, one trainer a folder, an error that the launcher finds."""
    die_with_parent()
    job = json.loads(job_path.read_text())
    out, rank = Path(job["out"]), int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    try:
        with _alone(out) if rank == 0 else contextlib.nullcontext():
            train(job, out)
    except BaseException:
        # The launcher shows this instead of its own and the other ranks' noise.
        (out / f"error-rank{rank}.txt").write_text(traceback.format_exc())
        raise


@contextlib.contextmanager
def _alone(out: Path) -> Any:
    """Raises RuntimeError when another trainer is at work in this folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(out / "trainer.lock")
    try:
        lock.acquire(timeout=60)
    except Timeout:
        raise RuntimeError(f"another trainer is at work in {out}; end it first") from None
    try:
        yield
    finally:
        lock.release()


def train(job: dict[str, Any], out: Path) -> None:
    """Trains to the end of the schedule, from the last whole checkpoint when there is one, and writes model/."""
    trainer = trained(job, out)
    trainer.load_best()
    trainer.save_weights(out / "model")
    trainer.accelerator.end_training()


def trained(
    job: dict[str, Any],
    out: Path,
    *,
    watch: Callable[[int], Watch] | None = None,
    sampler: Callable[[PackPlan, int], Sampler | None] | None = None,
    answers: Callable[..., AnswerScorer | None] | None = None,
) -> PackTrainer:
    """The trainer after its last step.

    watch: of a number of steps an epoch, who looks at the selection losses. sampler: of all packs and the number of
    steps, who draws what is trained; None: a schedule that stands from the start. answers: of the selection rows, the
    tokenizer and the FLOPs of a token, who scores what the model answers. Raises Stopped when it was asked to stop.
    """
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    from sft_core.data.balance import pack_costs
    from sft_core.train.arguments import training_arguments
    from sft_core.train.checkpoints import check_room, stop_request
    from sft_core.train.collate import PackCollator, slot_alone
    from sft_core.train.continuation import Continuation, resumable
    from sft_core.train.first_rank import on_first_rank
    from sft_core.train.flops import training_flops
    from sft_core.train.forwards import in_forwards, packs_a_forward
    from sft_core.train.log_file import LogFile
    from sft_core.train.model import load_model, skeleton
    from sft_core.train.router import router_loss
    from sft_core.train.schedule import order_coefficients, step_packs
    from sft_core.train.strategy import prepare_deepspeed
    from sft_core.train.trainer import LogEvents, PackTrainer, discard_staged

    prepare_deepspeed()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_data_ranks = STRATEGIES[job["runtime"]["distributed"]].num_data_ranks(world_size)
    torch.set_num_threads(job["runtime"]["num_threads"])
    training = job["training"]
    shape = skeleton(**{name: job["model"][name] for name in ("path", "revision", "config", "trust_remote_code")})
    collator = PackCollator.open(Path(job["packs"]), [list(map(Path, folders)) for folders in job["tokens"]])
    context = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and collator.longest_document > context:
        raise ValueError(
            f"packing.max_length: a row has {collator.longest_document} tokens, and the model was made for {context} "
            "(max_position_embeddings); lower packing.max_length"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        check_room(out, bytes_on_disk(shape.num_parameters(), job))
    linear, quadratic = order_coefficients(shape)
    flops = training_flops(shape)
    costs = pack_costs(collator.plan.num_tokens, collator.plan.offsets, linear=linear, quadratic=quadratic)
    schedule = step_packs(
        costs,
        global_batch_size=training["global_batch_size"],
        num_epochs=training["num_train_epochs"],
        max_steps=training["max_steps"],
        seed=training["seed"] + job["round"],  # a roll-out goes through its rows in an order of its own
    )
    drawn = sampler(collator.plan, len(schedule)) if sampler is not None else None
    online = _online(job, drawn, collator, schedule, flops) if drawn is not None else None
    staging = out / "staging"
    if int(os.environ.get("RANK", "0")) == 0:
        discard_staged(staging)
    router = router_loss(shape.config, training.get("router_aux_loss_coef"))  # None is left out
    in_4bit = training["lora"] is not None and training["lora"]["load_in_4bit"]
    half = training["bf16"] or job["model"]["dtype"] == "bfloat16"
    load = functools.partial(
        load_model, **job["model"], tokenizer=job["tokenizer"], seed=training["seed"], load_in_4bit=in_4bit, half=half
    )
    # Before the arguments, too: they may switch on zero3, under which a small model would be shared by the ranks.
    of_class = of_class_here(shape.config, job["model"], half=half)
    # Random weights come first: zero3 would draw other numbers for a rank's share of them. Those of a file come after
    # the arguments, which tell transformers that each rank loads its share alone.
    loaded = load() if job["model"]["config"] is not None else None
    arguments = training_arguments(
        training, num_steps=len(schedule), num_data_ranks=num_data_ranks, staging=str(staging), runtime=job["runtime"]
    )
    # The arguments have joined the ranks. One reads for all: a checkpoint has many gigabytes.
    checkpoint = on_first_rank(lambda: resumable(out / "checkpoints", job["runtime"]["distributed"], world_size))
    model, tokenizer = loaded or load()
    model.config.use_cache = False
    num_packs = packs_a_forward(
        job["runtime"]["tokens_per_forward"],
        written=None if checkpoint is None else Continuation.read(checkpoint).packs_a_forward,
        plan=collator.plan,
        packs_a_rank=training["global_batch_size"] // num_data_ranks,
        attention=model.config._attn_implementation,
        together=of_class is None or of_class.told_by is not None,
        busiest=_busiest(job, shape, model.config._attn_implementation),
    )
    arguments.per_device_train_batch_size = num_packs
    arguments.gradient_accumulation_steps = training["global_batch_size"] // (num_data_ranks * num_packs)
    slots = schedule if online is None else np.arange(schedule.size).reshape(schedule.shape)
    if int(os.environ.get("RANK", "0")) == 0 and online is None:
        strategy = job["runtime"]["distributed"]
        tell_balance(out / "logs" / "balance.jsonl", costs, schedule, num_data_ranks, strategy, num_packs)
    score_answers = None
    if answers is not None:  # a forward pass is a third of what training takes
        score_answers = functools.partial(answers, tokenizer=tokenizer, flops_a_token=flops.of(1.0, 0.0, 1.0) / 3)
    trainer = PackTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"pack": in_forwards(slots, num_data_ranks, num_packs).ravel()}),
        data_collator=collator if online is None else slot_alone,
        processing_class=tokenizer,
        peft_config=lora_config(training["lora"], model, job["tokenizer"]["add_special_tokens"], tokenizer),
        callbacks=[LogEvents(out / "logs" / "log.jsonl")],
        sources=job["sources"],
        strategy=job["runtime"]["distributed"],
        folder=out / "checkpoints",
        keep=job["runtime"]["keep_checkpoints"],
        flops=flops,
        selection=_selection(job, len(schedule), len(collator.plan), watch, score_answers),
        online=online,
        of_class=of_class,
        router=router,
        tell=LogFile(out / "logs" / "forward.jsonl").add,
        write_model=functools.partial(_write_model, tokenizer, job["chat_template"], training["lora"] is not None),
    )
    trainer.remove_callback(PrinterCallback)  # LogEvents prints
    trainer.train_from(checkpoint)
    step = trainer.state.global_step
    if stop_request(out).exists() and step < len(schedule):
        raise Stopped(f"stopped at step {step} of {len(schedule)}, as asked; its checkpoint is whole: a retry goes on")
    return trainer


def _busiest(job: dict[str, Any], shape: Any, attention: str) -> Callable[[int], int]:
    """Of a pack's tokens, how many packs keep this rank's GPU busy; 1 without one."""
    import torch

    from sft_core.sections import Runtime, Training
    from sft_core.train.forwards import busiest_packs
    from sft_core.train.speed import peak_flops_per_s

    if not torch.cuda.is_available():
        return lambda longest: 1
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return functools.partial(
        busiest_packs,
        training=Training.model_validate_json(json.dumps(job["training"])),
        runtime=Runtime.model_validate_json(json.dumps({**job["runtime"], "num_threads": None})),
        shape=shape,
        dtype=job["model"]["dtype"],
        attention=attention,
        memory=torch.cuda.get_device_properties(device).total_memory,
        peak=peak_flops_per_s(device),
    )


def of_class_here(config: Any, model: dict[str, Any], *, half: bool) -> Isolation | None:
    """What the model's class does with packed documents, with the attention and on the device that this rank takes."""
    import torch

    from sft_core.train.attention import choose_attention
    from sft_core.train.probe import class_isolation

    trust = model["trust_remote_code"]
    on_gpu = torch.cuda.is_available()
    return class_isolation(
        config,
        attention=choose_attention(model["attn_implementation"], config, half=half, trust_remote_code=trust),
        trust_remote_code=trust,
        half=half and on_gpu,
        device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu",
    )


def _online(
    job: dict[str, Any], sampler: Sampler, collator: PackCollator, schedule: np.ndarray, flops: Flops
) -> OnlineSchedule:
    from sft_core.train.online import OnlineSchedule

    num_steps, global_batch_size = schedule.shape
    return OnlineSchedule(
        sampler,
        collator,
        Path(job["out"]) / "logs" / "online.jsonl",
        num_steps=num_steps,
        global_batch_size=global_batch_size,
        costs=flops.of_documents(collator.plan.num_tokens, collator.num_trained),
    )


def tell_balance(
    path: Path, costs: np.ndarray, schedule: np.ndarray, num_ranks: int, strategy: str, packs_a_forward: int = 1
) -> None:
    """Writes how evenly the schedule's FLOPs lie on these ranks, for the card. costs: of each pack."""
    import numpy as np

    from sft_core.data.balance import slowest_over_mean
    from sft_core.train.schedule import EMPTY

    slots = np.where(schedule == EMPTY, 0.0, costs[schedule])
    slots = slots.reshape(len(slots), -1, packs_a_forward, num_ranks).sum(axis=2).reshape(len(slots), -1)
    ratio = slowest_over_mean(slots, num_ranks, each_micro_step=STRATEGIES[strategy].shards_weights)
    told = {"ranks": num_ranks, "packs_a_step": schedule.shape[1], "slowest_over_mean": round(ratio, 6)}
    path.write_text(json.dumps(told) + "\n")  # as a log, of which a card never reads half a line


def _write_model(
    tokenizer: Any, chat_template: str | None, is_adapter: bool, model: Any, weights: Any, folder: Path
) -> None:
    from sft_core.train.model import save_adapter, save_checkpoint

    if is_adapter:
        save_adapter(model, weights, tokenizer, folder / "adapter")
    else:
        save_checkpoint(model, tokenizer, chat_template, folder, weights)


def _selection(
    job: dict[str, Any],
    num_steps: int,
    num_packs: int,
    watch: Callable[[int], Watch] | None,
    answers: Callable[[PackPlan], AnswerScorer | None] | None,
) -> Selection | None:
    """What is evaluated while training goes on; None where nothing is."""
    if "selection" not in job:
        return None
    from sft_core.train.collate import PackCollator
    from sft_core.train.selection import Selection, SelectionLosses, evaluation_steps

    tokens = [list(map(Path, folders)) for folders in job["tokens"]]
    collator = PackCollator.open(Path(job["selection"]["packs"]), tokens)
    steps_per_epoch = math.ceil(num_packs / job["training"]["global_batch_size"])
    return Selection(
        SelectionLosses(collator),
        job["sources"],
        evaluation_steps(num_steps, steps_per_epoch, job["selection"]["every_epochs"]),
        Path(job["out"]) / "logs" / "selection.jsonl",
        keep_best=job["selection"]["keep_best"],
        watch=watch(steps_per_epoch) if watch is not None else None,
        answers=answers(collator.plan) if answers is not None else None,
    )


def bytes_on_disk(num_parameters: int, job: dict[str, Any]) -> int:
    """At most what checkpoints and the model take.

    One more checkpoint than are kept is there while it is staged, and the best one. A roll-out keeps the weights of its
    tasks' peaks, of its last and of the best evaluation. LoRA's are left out: they are small.
    """
    training, runtime, rollout = job["training"], job["runtime"], job.get("rollout")
    bytes_a_parameter = STRATEGIES[runtime["distributed"]].checkpoint_bytes
    checkpoint = 0 if training["lora"] is not None else bytes_a_parameter * num_parameters
    num_kept = runtime["keep_checkpoints"] + 1 + bool("selection" in job and job["selection"]["keep_best"])
    num_models = 1
    if rollout is not None:
        num_models = rollout["search"]["max_kept"] or len(rollout["active"]) + 2
    return checkpoint * num_kept + 4 * num_parameters * num_models


def lora_config(lora: dict[str, Any] | None, model: Any, added: list[str], tokenizer: Any) -> Any:
    """PEFT's LoRA settings; the rows of added tokens are trained whole, for LoRA would leave them random."""
    if lora is None:
        return None
    from peft import LoraConfig

    extra: dict[str, Any] = {}
    if added:
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        embedding, head = (names[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings()))
        if tied:
            extra["trainable_token_indices"] = {embedding: tokenizer.convert_tokens_to_ids(added)}
        else:
            extra["modules_to_save"] = [embedding, head]
    target = lora["target_modules"]
    settings = {name: value for name, value in lora.items() if name != "load_in_4bit"}
    return LoraConfig(
        task_type="CAUSAL_LM",
        **{**settings, "target_modules": target if isinstance(target, str) else list(target)},
        **extra,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), train)
