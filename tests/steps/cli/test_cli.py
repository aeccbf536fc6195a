"""The `sft` command: its help, what users get wrong, the store's commands, and its start-up."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sft_core.recipe.parse import load_recipe, override
from sft_core.store.store import Store
from steps.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


def leaves(command: click.Command, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(command, click.Group):
        for child, below in command.commands.items():
            yield from leaves(below, (*name, child))
    else:
        yield name


COMMANDS = list(leaves(main))


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process with next to no environment: no USER, no HOME that holds settings."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_commands_are_those_of_the_readme():
    assert {" ".join(name) for name in COMMANDS} >= {
        *("plan", "explain", "show", "verify", "scores", "resume", "init", "import", "store list", "store gc"),
        *("answers", "chat", "compare", "lineage"),
    }


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_help_holds_an_example_of_the_command(sft, name: tuple[str, ...]):
    output = sft(*name, "--help").stdout
    assert "Example" in output
    assert f"sft {' '.join(name)}" in output.split("Example")[1]


def test_start_up_imports_nothing_heavy(tmp_path: Path):
    code = (
        "import sys\nfrom steps.cli.main import main\nmain(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'metaflow', 'pyarrow', 'numpy', 'pydantic'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Commands:" in done.stdout and done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.slow
def test_plan_start_up_imports_neither_torch_nor_metaflow(small_recipe, save_recipe, tmp_path: Path):
    code = (
        "import sys\nfrom steps.cli.main import main\nmain(['plan', sys.argv[1]], standalone_mode=False)\n"
        "print('imported:', sorted({'torch', 'transformers', 'datasets', 'metaflow'} & set(sys.modules)))"
    )
    done = python("-c", code, save_recipe(small_recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "conversations" in done.stdout and done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize("command", ["scores", "resume"])
def test_scores_and_resume_without_a_run_say_so(command: str, tmp_path: Path):
    done = python("-m", "steps.cli.main", command, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Error: no run is recorded here; start one with `python flows/sft_flow.py run`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("plan", "none.yaml"), "none.yaml: no such recipe"),
        (("plan", "{recipe}", "--set", "training.learning_rat=1"), "did you mean 'learning_rate'?"),
        (("plan", "{recipe}", "--set", "training.seed=["), "the value is not valid YAML"),
        (("plan", "{recipe}", "--set", "name.x=1"), "is below a value that holds no keys"),
        (("plan", "{recipe}", "--limit", "0"), "limit: found 0"),
        (("plan", "{recipe}", "--set", "dataset_mixture.datasets.0.path=none.jsonl"), "none.jsonl: no such file"),
        (("plan", "{recipe}", "--set", "chat_template.template=none"), "found 'none'; it is no file"),
        (("plan", "{binary}"), "binary.yaml"),
        (("explain", "tokens/zz", "tokens/yy", "--store", "{store}"), "no output of the store"),
        (("verify", "tokens/zz", "--store", "{store}"), "no output of the store"),
        (("store", "gc", "tokens/zz", "--store", "{store}"), "no output of the store"),
        (("show", "{recipe}", "--source", "x"), "--source: found 'x'"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_1(
    sft, save_recipe, small_recipe, tmp_path: Path, arguments: tuple[str, ...], expected: str
):
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    (tmp_path / "store").mkdir()
    places = {"recipe": save_recipe(small_recipe), "store": tmp_path / "store", "binary": tmp_path / "binary.yaml"}
    result = sft(*(argument.format(**places) for argument in arguments), code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and expected in result.stderr


# explain


def test_explain_recipes_names_the_keys_that_differ(sft, save_recipe, small_recipe):
    first = save_recipe(small_recipe, "a.yaml")
    changes = ("training.learning_rate=1e-3", "packing.max_length=384")
    second = save_recipe(override(small_recipe, changes), "b.yaml")
    lines = sft("explain", first, second).stdout.splitlines()
    assert lines[: lines.index("evaluated base,copy_no_think")] == [
        "packed -",
        "  section.max_length: 2048 -> 384",
        "trained 0",
        "  section.job.training.learning_rate: 2e-05 -> 0.001",
    ]
    assert sft("explain", first, first).stdout == "no difference\n"


def test_explain_outputs_names_the_keys_that_differ(sft, built_recipe):
    root = built_recipe["runtime"]["store"]
    tokens = [ref for ref in Store(root).refs() if ref.stage == "tokens"]
    assert len(tokens) == 2
    lines = sft("explain", *tokens, "--store", root).stdout.splitlines()
    assert lines[0] == f"{tokens[0]} and {tokens[1]}"
    keys = [line.split(":")[0].strip() for line in lines[1:]]
    assert keys == ["inputs.conversations", "inputs.rendered", "part.source"]
    assert sft("explain", tokens[0], tokens[0], "--store", root).stdout == "no difference\n"


# verify and store


def test_verify_whole_store_passes_and_damage_exits_with_1(sft, built_recipe):
    store = Store(built_recipe["runtime"]["store"])
    assert sft("verify", "--store", store.root).stdout == "8 outputs verified, 0 damaged\n"
    tokens, mixture = (next(ref for ref in store.refs() if ref.stage == stage) for stage in ("tokens", "mixture"))
    path = store.path(tokens) / "shard-00000" / "index.parquet"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    (store.path(mixture) / "manifest.json").write_text("{")
    lines = sft("verify", "--store", store.root, code=1).stdout.splitlines()
    assert lines[-1] == "8 outputs verified, 2 damaged"
    packed = next(ref for ref in store.refs() if ref.stage == "packed")
    assert lines[2:-1] == [f"{packed}: was made from damaged {tokens}, {mixture}"] or lines[2:-1] == [
        f"{packed}: was made from damaged {mixture}, {tokens}"
    ]
    assert {line.split(":")[0] for line in lines[:2]} == {str(tokens), str(mixture)}
    assert sft("verify", tokens, "--store", store.root, code=1).stdout.endswith("1 outputs verified, 1 damaged\n")
    (store.path(packed) / "notes.txt").write_text("mine")
    assert f"{packed}: notes.txt is not of the output" in sft("verify", packed, "--store", store.root).stdout
    (store.path(packed) / "notes.txt").unlink()
    assert sft("verify", f"packed/{packed.key[:5]}", "--store", store.root).stdout.startswith("1 outputs verified, 0")


def test_gc_damaged_removes_what_was_made_from_it_too(sft, built_recipe):
    store = Store(built_recipe["runtime"]["store"])
    rendered = next(ref for ref in store.refs() if ref.stage == "rendered")
    readers = {ref for ref in store.refs() if str(rendered) in sft("lineage", ref, "--store", store.root).stdout}
    assert {ref.stage for ref in readers} == {"rendered", "tokens", "mixture", "packed"}
    path = next(store.path(rendered).rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-1])
    told = sft("store", "gc", "--damaged", "--store", store.root).stdout
    assert {line.split()[2] for line in told.splitlines()[:-1]} == set(map(str, readers))
    assert "name none" in sft("store", "gc", "--damaged", rendered, "--store", store.root, code=1).stderr
    others = {*store.refs()} - readers
    sft("store", "gc", "--damaged", "--delete", "--store", store.root)
    assert {*store.refs()} == others
    assert sft("verify", "--store", store.root).stdout == f"{len(others)} outputs verified, 0 damaged\n"


def test_store_list_names_every_output(sft, built_recipe):
    store = Store(built_recipe["runtime"]["store"])
    os.utime(store.path(store.refs()[0]), (time.time() - 40 * 86400 - 60,) * 2)
    lines = sft("store", "list", "--store", store.root).stdout.splitlines()
    assert lines[2].endswith("  40 days ago") and all(line.endswith(("ago", "now")) for line in lines[2:10])
    assert {line.split()[0] for line in lines[2:10]} == {str(ref) for ref in store.refs()}
    assert lines[-1].startswith("8 outputs, ")
    assert sum("copy_no_think" in line for line in lines) == 3


def test_store_list_empty_store_says_so(sft, tmp_path: Path):
    assert "no outputs" in sft("store", "list", "--store", tmp_path).stdout


@pytest.mark.parametrize("command", [("store", "list"), ("store", "gc"), ("verify",)])
def test_store_that_is_not_there_is_an_error(sft, tmp_path: Path, command: tuple[str, ...]):
    assert "no such folder" in sft(*command, "--store", tmp_path / "none", code=1).output


def test_store_gc_shows_first_and_removes_with_delete(sft, built_recipe):
    store = Store(built_recipe["runtime"]["store"])
    refs = store.refs()
    old = refs[:3]
    for ref in old:
        os.utime(store.path(ref), (time.time() - 20 * 86400,) * 2)
    scratch = store.root / ".partial" / "trained-0123"
    scratch.mkdir(parents=True)
    (scratch / "half.bin").write_bytes(b"x" * 2048)
    os.utime(scratch, (time.time() - 20 * 86400,) * 2)
    arguments = ("store", "gc", "--store", store.root, "--unused-for", 14)

    shown = sft(*arguments).stdout.splitlines()
    named = {*(f"would remove {ref}" for ref in old), "would remove trained-0123 (unfinished)"}
    assert {line.split("  ")[0] for line in shown[:-1]} == named
    assert "  2.0 KiB" in next(line for line in shown if "unfinished" in line)
    assert shown[-1].startswith("4 outputs, ") and shown[-1].endswith("add --delete to remove")
    assert set(store.refs()) == set(refs) and scratch.exists()

    assert sft("store", "gc", "--store", store.root).stdout.startswith("0 outputs, ")  # used in the last 30 days
    assert sft(*arguments, "--delete").stdout.count("removed ") == 4
    assert set(store.refs()) == set(refs) - set(old) and not scratch.exists()


def test_store_gc_of_a_named_output_leaves_the_others(sft, built_recipe):
    store = Store(built_recipe["runtime"]["store"])
    refs = store.refs()
    (store.path(refs[0]) / "manifest.json").write_text("{")  # a damaged one can be removed as its message says
    sft("store", "gc", refs[0], "--store", store.root, "--delete")
    assert set(store.refs()) == set(refs[1:])


# init


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("chats.jsonl", {"path": "chats.jsonl"}),
        ("data/*.jsonl", {"path": "data/*.jsonl"}),
        ("/data/déjà {x} 🙂.jsonl", {"path": "/data/déjà {x} 🙂.jsonl"}),
        ("org/chat", {"id": "org/chat"}),
    ],
)
def test_init_writes_a_recipe_that_loads(sft, tmp_path: Path, data: str, expected: dict[str, str]):
    output = tmp_path / "my recipe.yaml"
    told = sft("init", "--model", "org/model", "--data", data, "--output", output).stdout
    assert f"sft plan {output}" in told
    recipe = load_recipe(output)
    assert recipe.name == "my-recipe" and recipe.model.model_name_or_path == "org/model"
    (dataset,) = recipe.last_phase.dataset_mixture.datasets
    assert {key: getattr(dataset, key) for key in ("path", "id") if getattr(dataset, key, None)} == expected
    assert dataset.weight == 1.0
    assert recipe.hub is None
    output.write_text(output.read_text().replace("# hub:", "hub:"))
    pushed = load_recipe(output).hub
    assert pushed is not None and (pushed.model_id, pushed.private) == ("owner/name", True)


def test_init_existing_file_is_not_replaced(sft, tmp_path: Path):
    output = tmp_path / "recipe.yaml"
    output.write_text("mine")
    arguments = ("init", "--model", "org/model", "--data", "a.jsonl", "--output")
    assert f"{output} exists; name another with --output" in sft(*arguments, output, code=1).stderr
    assert output.read_text() == "mine"


def test_init_faulty_recipe_is_not_written(sft, tmp_path: Path):
    output = tmp_path / "recipe.yaml"
    data = ("--data", "/a/x.jsonl", "--data", "/b/x.jsonl")
    message = sft("init", "--model", "org/model", *data, "--output", output, code=1).stderr
    assert "two datasets are called 'x'" in message
    assert not output.exists()


@pytest.mark.slow
def test_init_then_plan_of_local_data_shows_what_is_to_build(sft, tmp_path: Path):
    output = tmp_path / "recipe.yaml"
    data = ROOT / "configs" / "quickstart" / "copy_no_think.jsonl"
    model = tmp_path / "model"
    model.mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", ""), ("tokenizer.json", "{}")):
        (model / name).write_text(text)
    sft("init", "--model", model, "--data", data, "--output", output)
    told = sft("plan", output, "--set", f"runtime.store={tmp_path / 'store'}").stdout
    assert "conversations  copy_no_think" in told and "1 to build" in told


@pytest.mark.slow
def test_init_holds_out_enough_prompts_of_small_data_for_its_own_plan(sft, tmp_path: Path, small_recipe):
    rows = (ROOT / "configs" / "quickstart" / "copy_no_think.jsonl").read_text().splitlines(keepends=True)
    for number in (40, 500):
        data, output = tmp_path / f"{number}.jsonl", tmp_path / f"{number}.yaml"
        data.write_text("".join(rows[:number]))
        model = small_recipe["model"]["tokenizer_name_or_path"]
        sft("init", "--model", model, "--data", data, "--output", output)
        settings = ("model.model_name_or_path=null", "model.config={model_type: llama}", f"runtime.store={tmp_path}")
        overrides = [part for one in settings for part in ("--set", one)]
        assert "0 are there" in sft("plan", output, "--set", f"model.tokenizer_name_or_path={model}", *overrides).stdout


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_reader_that_has_read_enough_is_no_error(reader: str, tmp_path: Path) -> None:
    store = f"--set runtime.store={tmp_path / 'store'}"
    command = f"{sys.executable} -m steps.cli.main plan configs/quickstart.yaml {store} | {reader}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
