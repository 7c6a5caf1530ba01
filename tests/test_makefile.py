"""What `make` does before there is an environment, with a Python that only pretends to be one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

PROJECT = Path(__file__).parents[1]

PYTHON = """\
#!/bin/sh
# Makes an "environment" of a script that writes down what it is asked.
case "$*" in
  "-c "*) echo True ;;
  "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp pretended .venv/bin/python ;;
  *) exit 1 ;;
esac
"""

NO_ENVIRONMENT = f"""\
#!/bin/sh
# A Python with pip, called as one of an environment that has lost its pyvenv.cfg.
case "$1" in -c) exec {sys.executable} -c "import sys; sys.prefix = sys.base_prefix; $2" ;; esac
"""

PRETENDED = """\
#!/bin/sh
echo "$*" >> asked
case "$*" in *install*) {install} ;; esac
"""


@pytest.fixture(autouse=True)
def _in_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(PROJECT / name, name)
    script("python", PYTHON)


def script(name: str, text: str) -> None:
    Path(name).write_text(text)
    Path(name).chmod(0o755)


def make(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(["make", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("left", [None, "#!/bin/sh\nexit 1\n", "#!/nowhere/python\n", NO_ENVIRONMENT])
def test_an_environment_that_is_missing_or_was_left_half_made_is_made(left):
    if left is not None:
        Path(".venv/bin").mkdir(parents=True)
        script(".venv/bin/python", left)
    script("pretended", PRETENDED.format(install="exit 0"))
    status, output = make("test", "PYTHON=./python")
    assert status == 0, output
    asked = Path("asked").read_text().splitlines()
    assert asked[0].endswith("-e .[dev,plots,vision]")
    assert asked[1] == "-m pytest -q"


def test_an_environment_with_pip_is_kept():
    script("pretended", PRETENDED.format(install="exit 0"))
    make("test", "PYTHON=./python")
    Path(".venv/mine").touch()
    Path(".venv/.ready").unlink()
    assert make("test", "PYTHON=./python")[0] == 0
    assert Path(".venv/mine").exists()


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/bin/true", "'/bin/true' is no Python"),
        ("/nowhere/python", "no '/nowhere/python' found"),
        ("./old", "'./old' is Python 3.8.1; gossamer needs 3.11"),
    ],
)
def test_what_is_no_fitting_python_is_named_without_a_word_about_the_network(python, said):
    script("old", "#!/bin/sh\ncase $1 in -c) echo False ;; *) echo Python 3.8.1 ;; esac\n")
    status, output = make("demo", f"PYTHON={python}")
    assert status
    assert said in output
    assert "network" not in output
    assert not Path(".venv").exists()


def test_an_installation_that_fails_shows_what_pip_said_and_how_it_gets_a_network():
    script("pretended", PRETENDED.format(install="echo no matching distribution >&2; exit 1"))
    status, output = make("demo", "PYTHON=./python")
    assert status
    assert "no matching distribution" in output
    assert "Without a network" in output
