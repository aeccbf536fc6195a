import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.data.packing.balance import pack_costs
from sft_core.data.packing.plan import PLAN, PackPlan
from sft_core.pins.pinned import pin
from sft_core.recipe.parse import parse_recipe
from sft_core.recipe.sections import Runtime
from sft_core.store.stage import Build
from sft_core.store.store import Store
from sft_core.train.launch import build_trained, killed_ranks, run, torchrun, variables
from sft_core.train.models.model import load_model
from sft_core.train.schedule import order_coefficients, step_packs
from steps.pack import PACKED
from steps.tokenize import TOKENS
from steps.train import TRAINED
from tests.train.tiny import processes_naming, tiny_recipe


@pytest.mark.long
def test_train_second_rank_fails_raises_its_error_and_ends_the_first(store: Store, tmp_path: Path) -> None:
    pinned = pin(parse_recipe(tiny_recipe(runtime={"num_processes": 2})))
    packs, out = tmp_path / "packs", tmp_path / "out"
    shutil.copytree(store.path(store.ensure(PACKED, pinned)), packs)
    out.mkdir()
    (out / "error-rank0.txt").write_text("of the run before")
    plan = PackPlan.read(packs)
    training = pinned.recipe.last_phase.training
    arguments = TRAINED.section(pinned, {"round": 0}) | TRAINED.loaders(pinned, {"round": 0})
    spec = arguments["job"]
    model, _ = load_model(spec.model, spec.tokenizer, seed=training.seed)
    linear, quadratic = order_coefficients(model)
    costs = pack_costs(plan.num_tokens, plan.offsets, linear=linear, quadratic=quadratic)
    schedule = step_packs(costs, global_batch_size=4, num_epochs=3, max_steps=None, seed=training.seed)
    table = pq.read_table(packs / "packs.parquet")
    rows = table["row"].to_numpy().copy()
    rows[plan.offsets[schedule[0][1]]] = 987654  # the second slot of the first step is the second rank's
    columns = [rows if name == "row" else table[name] for name in PLAN.names]
    pq.write_table(pa.table(columns, schema=PLAN), packs / "packs.parquet")
    inputs = {source: store.path(store.ensure(TOKENS, pinned, source=source)) for source in pinned.recipe.sources}
    with pytest.raises(RuntimeError, match=r"training failed \(exit code 1\)") as caught:
        build_trained(Build(out, {**inputs, "packs": packs}, pinned.recipe.runtime), **arguments)
    assert "IndexError: 987654" in str(caught.value)
    assert "in of_packs" in str(caught.value), "the rank's own traceback"
    assert (out / "logs" / "job.json").is_file()
    assert not processes_naming(str((out / "logs" / "job.json").resolve()))
    assert not (out / "model").exists()


DYING = """
import os, signal, sys, time
from pathlib import Path
out, ends = sys.argv[1:]
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank of ours heeds it where another one failed
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), getattr(signal, ends))
Path(out, "error-rank0.txt").write_text("RuntimeError: gloo: connection closed by peer")
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ends", "more"), [("SIGKILL", "ran out of memory"), ("SIGSEGV", "")])
def test_rank_that_a_signal_ends_is_named_in_place_of_the_others_lost_connection(
    ends: str, more: str, tmp_path: Path
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    command = [*torchrun(Runtime(num_processes=2), tmp_path), str(tmp_path / "dying.py"), str(tmp_path), ends]
    with pytest.raises(RuntimeError, match=rf"training failed \(exit code 1\):\nrank 1 was ended by {ends}") as caught:
        run(command, variables(tmp_path, num_threads=1), tmp_path, log=tmp_path / "log.txt")
    assert more in str(caught.value) and "gloo" not in str(caught.value)


@pytest.mark.slow
def test_torchrun_leaves_nothing_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while ranks run, so that no kill can leave it."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "rank.py").write_text("import os, tempfile; print(os.listdir(tempfile.gettempdir()))")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    command = [*torchrun(Runtime(), tmp_path), str(tmp_path / "rank.py")]
    run(command, variables(tmp_path, num_threads=1), tmp_path, log=tmp_path / "log.txt")
    assert "[]" in (tmp_path / "log.txt").read_text().splitlines()
    assert (tmp_path / "torchrun").is_dir()


@pytest.mark.slow
def test_lines_of_a_rank_are_text_in_a_terminal_and_whole_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank.py").write_text("print('a \\x1b[2Jline')")
    command = [*torchrun(Runtime(), tmp_path), str(tmp_path / "rank.py")]
    run(command, variables(tmp_path, num_threads=1), tmp_path, log=tmp_path / "log.txt")
    printed = capsys.readouterr().out
    assert "a ␛[2Jline\n" in printed and "\x1b" not in printed
    assert "a \x1b[2Jline\n" in (tmp_path / "log.txt").read_text()


def test_no_rank_is_called_killed_that_torchrun_ended() -> None:
    text = "  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 9)  (SIGTERM)\n"
    assert killed_ranks(text) == "" and killed_ranks(text.replace("-15", "1")) == ""
    assert killed_ranks(text.replace("-15", "-6")) == "rank 0 was ended by SIGABRT"
    blocked = text.replace("-15", "-9")  # torchrun waits 30 seconds for it
    first = "Root Cause (first observed failure):\n" + text.replace(": 0 (", ": 1 (").replace("-15", "-11")
    assert killed_ranks(f"{blocked}{first}") == "rank 1 was ended by SIGSEGV"
