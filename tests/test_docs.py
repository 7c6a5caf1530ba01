"""Every code block of the README and the docs runs as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import gossamer
from gossamer import attach, zoo
from gossamer.recipe import load_recipe
from gossamer.source import Source

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        names: dict[str, object] = {"__name__": "__main__"}
        for number, block in enumerate(blocks(page, "python"), 1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def option_tables() -> list[tuple[str, str]]:
    """Each set of keys that the page of old options gives, with its recipe."""
    recipe, found = None, []
    for line in (ROOT / "docs" / "from-the-seeds.md").read_text().splitlines():
        if heading := re.match(r"\| (?:option|setting) of .* \| keys of `(\w+)` \|", line):
            recipe = heading[1]
        elif not line.startswith("|"):
            recipe = None
        elif recipe is not None:
            found += [(recipe, keys) for keys in re.findall(r"`([^`]*=[^`]*)`", line.split("|")[2])]
    return found


@pytest.mark.parametrize(("recipe", "keys"), option_tables())
def test_keys_that_replace_an_old_option_are_keys_of_the_recipe(recipe, keys):
    overrides = shlex.split(keys)
    changed = load_recipe(recipe, overrides)
    model = zoo.build(changed.model.name, **changed.model.arguments)
    attach(model, changed.build_methods(100_000, 500, 0))
    values = yaml.safe_load(changed.to_yaml())
    for override in overrides:
        dotted, _, text = override.partition("=")
        value = values
        for key in dotted.split("."):
            value = value[int(key) if key.isdecimal() else key]
        assert value == Source("", f"value: {text}").data["value"]


def test_options_of_the_old_wide_network_give_its_budget():
    overrides = [key for _, keys in option_tables()[2:6] for key in shlex.split(keys)]  # -d, -w and -s
    recipe = load_recipe("cifar10_wrn28_2", overrides)
    sparsity = attach(zoo.build(recipe.model.name, **recipe.model.arguments), recipe.build_methods(100_000, 500, 0))
    totals = sparsity.summary().totals
    # 1,467,610 parameters, a tenth of which are left; 16,090 of them stay dense.
    assert (totals["targets_active"], totals["all_nonzero"]) == (130_671, 146_761)


def test_the_hebbian_notebooks_layer_in_gossamers_own_words_runs():
    (line,) = re.findall(
        r"`(gs\.attach\(model, gs\.Hebbian\(.*?, optimizer\))`", (ROOT / "docs/from-the-seeds.md").read_text()
    )
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    sparsity = eval(line, {"gs": gossamer, "model": model, "optimizer": optimizer})
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    (update,) = sparsity.update()
    assert sparsity.masks()["0.weight"].sum((2, 3)).eq(3).all()  # k2, of which k1 stay
    assert update.rows[0]["pruned"] <= 18


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_of_a_page_are_make_targets_or_commands_that_run(page, tmp_path):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "\n".join(blocks(page, "sh")).splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "make":
            assert arguments[0] in targets
        elif program == "source":
            makefile = (ROOT / "Makefile").read_text()
            assert arguments == [f"{re.search('VENV := (.*)', makefile)[1]}/bin/activate"]
        elif program:
            assert program == "gossamer", f"{page.name}: {line}"
            done = subprocess.run(
                [sys.executable, "-m", "gossamer", *arguments],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page):
    assert all(language for language, _ in BLOCK.findall(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name}: {link}"
