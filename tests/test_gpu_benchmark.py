"""benchmarks/gpu.py on a CPU: parts run to their rows, a failing one is told, a proof that proves nothing fails."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import PARTS, SECONDS, Clock
from benchmarks.gpu_parts.gpu_tests import FILES
from benchmarks.gpu_parts.process import Ahead, alone_of_its_group
from benchmarks.gpu_parts.rows import GOALS, Case, Context, Row, cases, goal_rows, headline

ROOT = Path(__file__).resolve().parents[1]


def run(out: Path, *options: str) -> tuple[int, list[str], dict[str, Any]]:
    """Its exit status, the lines that it prints, and what it writes."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, done.stdout.splitlines(), json.loads(out.read_text())


@pytest.mark.long
def test_dry_run_proves_isolation(tmp_path: Path) -> None:
    code, printed, report = run(tmp_path / "gpu.json", "--seconds", "20", "--parts", "a,b")
    log = (tmp_path / "gpu.log").read_text()
    rows = [Row(**row) for row in report["rows"]]
    assert code == 0, "\n".join(printed) + log[-3000:]
    assert printed[1:-1] == [row.line() for row in rows], "what is written is what was printed"
    assert json.loads(printed[-1]) == report["headline"] == headline(rows)
    assert {row.part for row in rows} == {"a", "b"} and report["headline"]["failed"] == []

    proofs = [row for row in rows if "packed == separate" in row.what and row.passed is not None]
    assert {row.what.split(":")[0] for row in proofs} == {"varlen", "sdpa"}
    assert {row.what.rpartition(": ")[2] for row in proofs} == {"forward", "gradients"}


def at_work(group: int) -> list[int]:
    """Ids of a process group's processes (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended
        if int(of_group) == group and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_part_whose_time_is_over_is_ended_with_all_its_own(tmp_path: Path) -> None:
    part = Ahead(["--part", "f", "--device", "cpu"], log=tmp_path / "log", own_group=True)
    part.wait_until_ready(200)
    started: list[int] = []

    def look() -> None:
        while len(started) < 2 and time.monotonic() < end:
            started[:] = at_work(part.pid)
            time.sleep(0.05)

    end = time.monotonic() + 60
    watching = threading.Thread(target=look)
    watching.start()
    with pytest.raises(TimeoutError):
        list(part.go({"seconds": 100, "folder": str(tmp_path), "facts": {}}, 3))
    watching.join()
    assert len(started) >= 2, "the part started no process of its own, so this proves nothing"
    assert at_work(part.pid) == []


def rows_of(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_kill_loses_no_row_that_was_printed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(out), "--parts", "a,b"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    printed = [driver.stdout.readline() for _ in range(5)][1:]  # the first line is the header
    parts = [int(name) for name in Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()]
    driver.kill()
    printed += driver.stdout.readlines()
    assert driver.wait() == -signal.SIGKILL
    driver.stdout.close()
    lines = [line.rstrip("\n") for line in printed]
    rows = rows_of(out)
    assert len(lines) >= 4 and [row.line() for row in rows][: len(lines)] == lines
    assert len(rows) <= len(lines) + 1, "a row is written, then printed"
    assert {row.part for row in rows} <= {"a", "b"} and parts, "the kill came after its end"
    end = time.monotonic() + 20
    while any(at_work(part) for part in parts) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(at_work(part) for part in parts)


def context_of(tmp_path: Path, seconds: float = 60) -> Context:
    return Context("x", "cpu", time.monotonic() + seconds, tmp_path, {})


@pytest.mark.slow
def test_failing_case_is_told_and_the_next_goes_on(tmp_path: Path) -> None:
    context = context_of(tmp_path)

    def failing() -> Iterator[Row]:
        yield context.row("before", 1)
        raise ValueError("no such kernel")

    rows = list(cases(context, [Case("bad", 1, failing), Case("good", 1, lambda: [context.row("good", 2)])]))
    assert [(row.what, row.passed) for row in rows] == [("before", None), ("bad", False), ("good", None)]
    assert "ValueError: no such kernel" in rows[1].note and "test_gpu_benchmark.py" in rows[1].note
    assert headline(rows)["failed"] == ["x: bad"]
    late = list(cases(context_of(tmp_path, seconds=0), [Case("late", 1, failing)]))
    assert [row.passed for row in late] == [None] and "left out" in late[0].note


@pytest.fixture
def alone_here() -> Iterator[None]:
    """What a part's process sets up for itself."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in alone_of_its_group().items():
            patch.setenv(name, value)
        yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("alone_here")
@pytest.mark.parametrize(
    ("name", "chosen", "keys", "num_checks"),
    [
        (
            "d",
            ("135m.4k ours_8", "135m.4k trl_8", "135m.4k beside"),
            {"135m.4k.ours.tokens_per_s", "135m.4k.ours.loader_wait", "135m.4k.beside_trl"},
            0,
        ),
        ("f", ("a save of 3 B",), {"3b.save_stops_s"}, 0),
        ("g", ("LoRA, an added token on tied weights",), set(), 2),
        ("i", ("135m, loaded as evaluation loads it",), {"generate.135m.auto.tokens_per_s"}, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_case_of_each_part_runs(
    name: str, chosen: tuple[str, ...], keys: set[str], num_checks: int, tmp_path: Path
) -> None:
    module = importlib.import_module(f"benchmarks.gpu_parts.{PARTS[name].module}")
    context = context_of(tmp_path)
    of_part = [case for case in module.listed(context) if case.name in chosen]
    assert {case.name for case in of_part} == {*chosen}
    rows = list(cases(context, of_part))
    shown = "\n".join(row.line() for row in rows)
    numbers = {row.key: row.number for row in rows}
    assert keys <= numbers.keys() and all(numbers[key] is not None for key in keys), shown
    assert [row.passed for row in rows if row.passed is not None] == [True] * num_checks, shown
    assert "left out" not in shown


@pytest.mark.long
@pytest.mark.usefixtures("alone_here")
def test_each_side_trains_the_same_packs(tmp_path: Path) -> None:
    from benchmarks.gpu_parts import large_steps

    large_steps.check_shape()
    context, names = context_of(tmp_path), [f"3b.8k {name}" for name in ("ours", "trl_varlen", "beside", "bare")]
    of_part = {case.name: case for case in reversed(large_steps.listed(context))}
    rows = list(cases(context, [of_part[name] for name in names]))
    assert headline(rows)["failed"] == [] and not any("left out" in row.note for row in rows)
    numbers = {row.key: row.number for row in rows if row.key is not None}
    for side in ("ours", "trl_varlen", "bare"):
        assert numbers[f"3b.8k.{side}.tokens_per_s"] and numbers[f"3b.8k.{side}.of_ceiling"]
    (speed,) = (row for row in rows if row.key == "3b.8k.ours.tokens_per_s")
    assert "documents together by bounds" in speed.note, "the probe of the real path was not run"
    assert 0 <= numbers["3b.8k.ours.loader_wait"] < 100
    assert numbers["3b.8k.beside_trl"] == pytest.approx(
        numbers["3b.8k.ours.tokens_per_s"]
        / max(number for key, number in numbers.items() if key.startswith("3b.8k.trl") and "tokens_per_s" in key)
    )


@pytest.mark.long
def test_a_strategy_runs_and_is_told_beside_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_parts import strategies

    monkeypatch.setattr(strategies, "names_of", lambda context: ["ddp"])  # each imports for ten seconds
    processes: dict[str, Ahead] = {}
    context = context_of(tmp_path, seconds=120)
    try:
        rows = list(cases(context, strategies.listed(context, processes)))
    finally:
        for process in processes.values():
            process.end()
    numbers = {row.key: row.number for row in rows}
    assert numbers["ddp.tokens_per_s"] and numbers["ddp.peak_gib"], "\n".join(row.line() for row in rows)
    losses = {"losses": [10.0, 9.0], "step_s": 1.0}
    for changed, passed in ([10.0, 9.01], True), ([10.0, 9.3], False):
        row = strategies.beside_row(context, "zero2", {"losses": changed, "step_s": 0.5}, losses)
        assert row.passed is passed and "2.00 x ddp's speed" in row.note


@pytest.mark.slow
def test_tests_for_a_gpu_are_collected_and_skipped_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.gpu_parts import gpu_tests

    if torch.cuda.is_available():
        pytest.skip("they would run")
    monkeypatch.setattr(gpu_tests, "FILES", FILES[-1:])  # it takes seconds to import each
    (row,) = gpu_tests.run(context_of(tmp_path))
    assert row.passed is True and row.number == 0
    assert re.match(r"0 passed, 0 failed, 0 error, [1-9]\d* skipped", row.note), row.note


@pytest.mark.parametrize("key", [goal[0] for goal in GOALS])
def test_goal_is_met_missed_or_not_measured(key: str) -> None:
    (bound,) = (goal[2] for goal in GOALS if goal[0] == key)
    (direction,) = (goal[1] for goal in GOALS if goal[0] == key)
    better = -1 if direction.startswith("<") else 1

    def told(*rows: Row) -> str:
        return next(row.note for row in goal_rows(rows) if row.what == key).split(";")[0]

    assert told() == "not measured"
    assert told(Row("c", "x", bound + better * 0.01, key=key)) == "met"
    assert told(Row("c", "x", bound - better * 0.01, key=key)) == "MISSED"


def test_table_of_goals_in_the_documents_is_that_of_the_benchmark() -> None:
    lines = (ROOT / "docs" / "results.md").read_text().partition("## Hardware")[2].partition("\n## ")[0].splitlines()
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    wanted = [f"{direction} {bound:,g} {unit}".strip() for _, direction, bound, unit in GOALS]
    assert [(key.strip("`"), goal) for key, _, goal, _ in told] == list(zip([g[0] for g in GOALS], wanted, strict=True))
    assert {measured for *_, measured in told} == {"not measured"}


def test_time_of_all_parts_runs_from_when_the_first_one_is_ready() -> None:
    clock = Clock(10)
    time.sleep(0.05)
    assert clock.left() == 10, "imports from a cold disk take a part's share"
    for _ in range(2):
        clock.begin()
        time.sleep(0.05)
    assert 5 < clock.left() <= 9.9


START_S = 2.0  # of a part's time, before its first case


@pytest.mark.parametrize("name", PARTS)
def test_share_of_the_default_time_has_room_for_what_a_part_is_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, with every package installed: what is not of the core is left out first, for it comes last."""
    module = importlib.import_module(f"benchmarks.gpu_parts.{PARTS[name].module}")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda package: True)
        listed = module.listed(Context(name, "cuda", time.monotonic(), tmp_path, {}))
    core = [case for case in listed if case.is_core]
    share = PARTS[name].share * SECONDS / sum(part.share for part in PARTS.values())
    assert core and sum(case.seconds for case in core) + START_S <= share
    assert listed[: len(core)] == core
    assert all(case.seconds > 0 or "beside" in case.name or name == "a" for case in listed)


def test_steps_that_goals_are_set_for_are_of_the_core(tmp_path: Path) -> None:
    from benchmarks.gpu_parts import large_steps, resuming, small_steps

    context = Context("x", "cuda", time.monotonic(), tmp_path, {})
    core = [case.name for part in (large_steps, small_steps, resuming) for case in part.listed(context) if case.is_core]
    goals = {key.split(".")[0] + "." + key.split(".")[1] for key, *_ in GOALS if "save" not in key}
    for name in goals:
        assert any(case.startswith(f"{name} ours") for case in core), name
    for name in {key.rpartition(".")[0] for key, *_ in GOALS if key.endswith("beside_trl")}:
        assert f"{name} beside" in core and any(case.startswith(f"{name} trl") for case in core), name
    assert "a save of 3 B" in core and "3b.64k_of_5k bare" in core


def test_bare_loop_over_a_long_pack_has_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.gpu_parts import sides
    from benchmarks.gpu_parts.jobs import Work
    from benchmarks.gpu_parts.shapes import config_of

    work = Work(config_of("3b", "cpu"), [60, 40], steps=1)
    model, _ = sides.load(work, "cpu", "varlen")
    batch = sides._inputs(work.documents()[0], "cpu")
    found = {}
    for tile in (1000, 32):
        monkeypatch.setattr(sides, "TILE", tile)
        model.zero_grad()
        loss = sides.bare_loss(model, batch)
        loss.backward()
        found[tile] = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    torch.testing.assert_close(found[32], found[1000])


@pytest.mark.slow
def test_side_without_memory_is_told_and_fails_nothing_but_ours(tmp_path: Path) -> None:
    import torch

    from benchmarks.gpu_parts import large_steps
    from benchmarks.gpu_parts.jobs import Work
    from benchmarks.gpu_parts.shapes import config_of

    def too_large(*arguments: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def rows_of(run: Any) -> list[Row]:
        work = Work(config_of("3b", "cpu"), [60], steps=3)
        return list(large_steps.measured_rows(context_of(tmp_path), "3b.8k", "side", run, work, {}, {}))

    (row,) = rows_of(too_large)
    assert row.passed is None and "out of memory" in row.note
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(large_steps, "ours", too_large)
        rows_of(too_large)


def test_quickstart_that_builds_an_output_again_fails_its_row(tmp_path: Path) -> None:
    from benchmarks.gpu_parts import quickstart

    store, context = tmp_path / "store", context_of(tmp_path)
    for name in ("packed/1", "trained/2", ".partial/trained-3"):
        (store / name).mkdir(parents=True)
        (store / name / "manifest.json").write_text("{}")

    def again(*built: str) -> float:
        os.utime(store / "packed" / "1")  # as a hit notes its use
        for name in built:
            (store / name).mkdir(exist_ok=True)
            (store / name / "manifest.json").write_text("{}")
        return 3.0

    (row,) = quickstart.again_rows(context, again)
    assert row.passed is True and row.note == "2 outputs, none built again" and row.key == "quickstart_again_s"
    for built in ("trained/2", "trained/4"):
        (row,) = quickstart.again_rows(context, lambda built=built: again(built))
        assert row.passed is False and "built again: trained" in row.note
    (row,) = quickstart.again_rows(context, lambda: None)
    assert row.passed is None and "time was over" in row.note


def test_every_file_with_tests_for_a_gpu_is_run_on_one() -> None:
    mark = re.compile(r"\bmark\.gpu\b")
    files = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if mark.search(path.read_text())
    }
    assert files == set(FILES) and len(files) == len(FILES) > 1


def proofs(tmp_path: Path) -> list[Row]:
    from benchmarks.gpu_parts import packed

    return list(packed.proof_rows(context_of(tmp_path), "sdpa", "sdpa", [40, 1, 30]))


def test_leak_fails_the_proof_and_so_does_a_planted_one_that_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from benchmarks.gpu_parts import packed

    assert [row.passed for row in proofs(tmp_path)] == [True, True]
    batch_of = packed._batch

    def leaking(rows: list[Any], device: str) -> Any:
        batch = batch_of(rows, device)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].numel())[None]}

    with monkeypatch.context() as patch:
        patch.setattr(packed, "_batch", leaking)
        assert [row.passed for row in proofs(tmp_path)] == [False, False]
    monkeypatch.setattr(packed, "SHOWS", 10.0)
    rows = proofs(tmp_path)
    assert [row.passed for row in rows] == [False, False] and "does not show" in rows[0].note


def test_outcomes_of_the_gpu_tests_are_read_also_where_their_time_was_over(tmp_path: Path) -> None:
    from benchmarks.gpu_parts.gpu_tests import outcome_rows

    text = (
        "tests/train/test_gpu.py::test_a[(90, 50)-sdpa] PASSED  [ 10%]\n"
        "tests/train/test_gpu.py::test_b FAILED  [ 20%]\n"
        "FAILED tests/train/test_gpu.py::test_b - AssertionError: 0.3 > 0.1\n"
    )
    context = context_of(tmp_path)
    summary, failed = outcome_rows(context, text, 1, 3.0)
    assert (summary.number, summary.passed, failed.passed) == (1, False, False)
    assert failed.what == "test_b" and failed.note == "AssertionError: 0.3 > 0.1"
    (cut,) = outcome_rows(context, text.splitlines()[0], None, 3.0)
    assert cut.passed is True and "the time was over" in cut.note
    assert [row.passed for row in outcome_rows(context, text, None, 3.0)] == [False, False]
    skipped = "tests/train/test_gpu.py::test_a SKIPPED (no CUDA device) [100%]"
    on_gpu = dataclasses.replace(context, device="cuda")
    for where, passed in ((context, True), (on_gpu, False)):
        (row,) = outcome_rows(where, skipped, 0, 3.0)
        assert (row.number, row.passed) == (0, passed), "nothing is proved on a GPU where all tests were skipped"
    (row,) = outcome_rows(on_gpu, text.splitlines()[0], 0, 3.0)
    assert row.passed is True
    (broken,) = outcome_rows(context, "ImportError: no such module", 4, 3.0)
    assert broken.passed is False and "ImportError" in broken.note


def test_every_part_is_in_the_help_and_has_its_module() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for name, part in PARTS.items():
        assert f"\n    {name}  " in done.stdout
        assert (ROOT / "benchmarks" / "gpu_parts" / f"{part.module}.py").is_file()


def test_bench_does_not_run_it() -> None:
    done = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert "benchmarks/training.py" in done.stdout and "benchmarks/gpu.py" not in done.stdout
