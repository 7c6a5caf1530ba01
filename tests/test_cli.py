import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import gossamer
from gossamer.cli import app
from gossamer.errors import DataError
from gossamer.recipe import load_recipe, shipped
from gossamer.run_folder import claimed

QUICK = ("epochs=2", "model.width=0.3", "data.batch_size=64")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "gossamer", *arguments]
    return subprocess.Popen(  # type: ignore[call-overload]
        command,
        text=True,
        env=environment,
        # A shell's background jobs ignore interrupts, and their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def test_a_shipped_recipe_trains_from_a_shell_and_leaves_a_run_folder():
    process = start("train", "digits", *QUICK, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    lines = output.splitlines()
    number = r"\d+\.\d+"
    epoch = rf"loss {number}  accuracy {number} %  sparsity 90.0 %  validation {number} %  {number} s"
    assert lines[:3] == [
        "data     digits, images: 1,293 to train, 144 to validate, 360 to test",
        "network  mnist_mlp, 8,890 parameters",
        "method   dsr, starts with 876 of 8,760 weights active",
    ]
    assert re.fullmatch(rf"epoch 1/2  {epoch}", lines[3])
    assert re.fullmatch(rf"epoch 2/2  {epoch}", lines[4])
    assert any("layer1.weight" in line and "90×64" in line for line in lines)
    summary = json.loads(Path("runs/digits-1/summary.json").read_text())
    assert re.search(rf"test accuracy +{100 * summary['test_accuracy']:.2f} %", output)
    assert lines[-1] == "run folder: runs/digits-1"


def test_runs_of_one_recipe_are_numbered():
    for _ in range(2):
        assert run("train", "digits", *QUICK, "epochs=1").exit_code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits-1", "digits-2"]


def test_a_recipe_of_ones_own_and_a_folder_of_ones_own():
    Path("mine.yaml").write_text(shipped()["digits"])
    result = run("train", "mine.yaml", *QUICK, "methods.0.sparsity=0.5", "--out", "a/b")
    assert result.exit_code == 0
    assert json.loads(Path("a/b/summary.json").read_text())["summary"]["totals"]["targets_sparsity"] == 0.5
    assert "sparsity 50.0 %" in result.output


@pytest.mark.parametrize(("given", "seeds"), [("2", [0, 1]), ("5,3", [5, 3])])
def test_seeds_are_named_or_counted(given, seeds):
    result = run("train", "digits", *QUICK, "--seeds", given)
    assert result.exit_code == 0
    assert json.loads(Path("runs/digits-1/summary.json").read_text())["seeds"] == seeds
    assert all(Path(f"runs/digits-1/seed-{seed}/summary.json").is_file() for seed in seeds)
    assert re.search(r"test accuracy +\d+\.\d+ ± \d+\.\d+ %", result.output)
    assert "(mean ± standard error)" in result.output
    assert all(f"seed {seed}  epoch 1/2" in result.output for seed in seeds)


RECIPE = """\
data: {name: digits}
model: {name: mnist_mlp}
optimizer: {name: SGD, lr: 0.1}
methods:
  - type: dsr
    sparsity: 0.9
"""


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("epochs: 1\nepoch: 3", "bad.yaml:8: epoch: unknown key; did you mean 'epochs'?"),
        ("epochs: soon", "bad.yaml:7: epochs: must be a valid integer, got 'soon'"),
        ("    sparsitty: 0.9\nepochs: 1", "bad.yaml:7: methods.0.sparsitty: unknown key; did you mean 'sparsity'?"),
        ("    targets: layer9*\nepochs: 1", "bad.yaml:7: methods.0.targets: DSR: targets: 'layer9*' matches no weight"),
        ("    until: 75 steps\nepochs: 1", "bad.yaml:7: methods.0.until: got '75 steps'"),
        ("epochs: [", "bad.yaml:8: not valid YAML"),
    ],
)
def test_a_bad_recipe_is_one_line_on_standard_error_status_2_and_nothing_written(added, said):
    Path("bad.yaml").write_text(f"{RECIPE}{added}\n")
    result = run("train", "bad.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert files() == ["bad.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "no recipe given; `gossamer recipes` lists"),
        (["train", ""], "no recipe given"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "digits", "epochs"], "command line 'epochs': expected key=value"),
        (["train", "digits", "methods.0.sparsity=1.0"], "command line 'methods.0.sparsity=1.0': methods.0.sparsity"),
        (["train", "digits", "model.name=resnet"], "command line 'model.name=resnet': model.name"),
        (["train", "digits", "data.name=coco"], "command line 'data.name=coco': data.name"),
        (["train", "digits", "--seeds", "a"], "--seeds: got 'a'"),
        (["train", "digits", "--seeds", "9" * 5000], "--seeds: got '9999"),
        (["train", "digits", "--seeds", "99999999999"], "--seeds: got '99999999999'"),
        (["train", "digits", "--seeds", "1,9223372036854775808"], "seeds: expected different integers"),
        (["train", "digits", "--seeds", "0"], "--seeds: got '0'"),
        (["train", "digits", "--seeds", "1,1"], "seeds: expected different integers"),
        (["train", "digits", "--out", "/dev/null"], "/dev/null: there is something here already"),
        (["train", "--resume", "nowhere"], "nowhere: has no recipe.yaml"),
        (["train", "digits", "--resume", "nowhere"], "--resume: goes alone"),
        (["train", "--resume", "nowhere", "--seeds", "2"], "--resume: goes alone"),
    ],
)
def test_arguments_that_cannot_work_are_one_line_status_2_and_nothing_written(arguments, said):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert files() == []


def test_a_process_that_is_refused_ends_with_status_2_and_no_traceback():
    process = start("train", "digits", "epochs=soon", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors == "error: command line 'epochs=soon': epochs: must be a valid integer, got 'soon'\n"


def no_data(name: str, *arguments: object, **options: object) -> object:
    if name == "fashion_mnist":
        raise DataError("data set 'fashion_mnist': missing; fetch it")
    return gossamer.data.dataset.load(name, *arguments, **options)


def test_data_that_cannot_be_had_are_an_error_that_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr("gossamer.data.load", no_data)
    result = run("train", "fashion_mnist")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: data set 'fashion_mnist': missing; fetch it\n"
    assert files() == []


def test_data_that_cannot_be_had_lead_to_the_fallback_with_a_clear_word(monkeypatch):
    monkeypatch.setattr("gossamer.data.load", no_data)
    result = run("train", "fashion_mnist", "--fallback", "digits")
    assert result.exit_code == 0
    assert result.stderr == "data set 'fashion_mnist': missing; fetch it\nTraining 'digits' instead.\n"
    assert Path("runs/digits-1/summary.json").is_file()
    result = run("train", "fashion_mnist", "epochs=1", "--fallback", "digits")
    assert "Training 'digits' instead, without the changes given." in result.stderr


def test_a_fallback_does_not_hide_other_errors():
    result = run("train", "digits", "epochs=0", "--fallback", "digits")
    assert result.exit_code == 2
    assert files() == []


def test_a_run_that_diverges_ends_with_status_1_and_one_line():
    result = run("train", "digits", "methods=[]", "optimizer={name: SGD, lr: 1.0e+30}")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: epoch 1: the training loss is ")
    assert result.stderr.count("\n") == 1


def test_a_full_disk_ends_with_status_1_and_one_line(monkeypatch):
    def full(tensors, file, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gossamer.checkpoint.save_file", full)
    result = run("train", "digits", *QUICK)
    assert result.exit_code == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


def test_ctrl_c_leaves_a_run_that_continues_to_the_same_end():
    arguments = ["epochs=100", "model.width=0.3"]
    process = start("train", "digits", *arguments, "--out", "parts", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert [process.stdout.readline().split()[0] for _ in range(3)] == ["data", "network", "method"]
    assert process.stdout.readline().startswith("epoch 1/100")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 3
    assert errors == "interrupted; to continue: gossamer train --resume parts\n"
    assert not Path("parts/summary.json").exists()

    result = run("train", "--resume", "parts")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "run folder: parts"
    assert run("train", "digits", *arguments, "--out", "whole").exit_code == 0
    parts, whole = (json.loads(Path(name, "summary.json").read_text()) for name in ("parts", "whole"))
    assert {**parts, "seconds": 0} == {**whole, "seconds": 0}


def test_ctrl_c_before_training_writes_nothing(monkeypatch):
    def load(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.data.load", load)
    result = run("train", "digits")
    assert result.exit_code == 3
    assert result.stderr == "interrupted before training began; nothing was written\n"
    assert files() == []


def test_ctrl_c_before_the_recipe_is_written_does_not_advise_to_resume(monkeypatch):
    def write_text(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.run_folder.write_text", write_text)
    result = run("train", "digits", *QUICK)
    assert result.exit_code == 3
    assert "--resume" not in result.stderr
    assert files() == []


def test_runs_that_begin_at_once_have_a_folder_each(monkeypatch):
    recipe = load_recipe("digits")
    with claimed(recipe) as first, claimed(recipe) as second:
        assert (str(first), str(second)) == ("runs/digits-1", "runs/digits-2")
        (second / "file").touch()
    assert files() == ["runs", "runs/digits-2", "runs/digits-2/file"]


@pytest.mark.parametrize("out", ["file/x", "n" * 300, None])
def test_a_run_folder_that_cannot_be_made_is_one_line_that_names_the_option(out):
    Path("file").touch()
    if out is None:
        Path("runs").touch()
    before = files()
    result = run("train", "digits", *QUICK, *(() if out is None else ("--out", out)))
    assert result.exit_code == 2
    assert "--out" in result.stderr
    assert result.stderr.count("\n") == 1
    assert files() == before


def test_a_terminal_without_unicode_gets_the_results(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start("train", "digits", *QUICK, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "90?64" in output


def test_a_complete_run_is_shown_again_on_resume():
    first = run("train", "digits", *QUICK)
    again = run("train", "--resume", "runs/digits-1")
    assert again.exit_code == 0
    assert again.output in first.output


def test_a_terminal_gets_a_bar_with_loss_accuracy_and_sparsity():
    master, slave = pty.openpty()
    process = start("train", "digits", "epochs=400", stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    shown, end = "", time.monotonic() + 120
    wanted = re.compile(r"epoch \d+/400 .* \d:\d\d:\d\d loss \d+\.\d+  accuracy \d+\.\d %  .*sparsity 90\.0 %")
    while not wanted.search(plain := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)) and time.monotonic() < end:
        if select.select([master], [], [], 1)[0]:
            shown += os.read(master, 65536).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    process.wait()
    os.close(master)
    assert wanted.search(plain)
    assert process.returncode == 3


def test_recipes_are_listed_with_their_descriptions():
    result = run("recipes")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("digits", "fashion_mnist", "cifar10_short", "cifar10_wrn28_2"))
    assert "no download" in result.output


def test_help_fits_a_screen_and_names_every_option():
    result = run("train", "--help")
    assert result.exit_code == 0
    assert all(option in result.output for option in ("KEY=VALUE", "--seeds", "--out", "--resume", "--fallback"))
    assert len(result.output.splitlines()) <= 30


def test_two_processes_train_one_network_and_report_once():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gossamer"]
    done = subprocess.run(
        [*command, "train", "digits", *QUICK], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    assert done.stdout.count("epoch 1/2") == 1
    summary = json.loads(Path("runs/digits-1/summary.json").read_text())
    assert summary["steps"] == 2 * (1293 // 64)  # ranks share whole batches only
    assert summary["summary"]["totals"]["targets_sparsity"] == pytest.approx(0.9, abs=1e-4)


def test_a_run_of_one_process_goes_on_in_two():
    process = start("train", "digits", "epochs=30", "--out", "parts", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch 2/30"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 3
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gossamer"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", "--resume", "parts"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in Path("parts/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 31))
    assert json.loads(Path("parts/summary.json").read_text())["summary"]["totals"]["targets_active"] == 5020
