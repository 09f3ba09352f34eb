"""The README's commands and its map of files, so that they cannot rot."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python (\w+(?:/\w+)?\.py)((?: [^\n`#]*)?)", README)


def test_the_two_commands_are_there():
    assert README.count("pip install -r requirements.txt && python train.py && python sample.py examples/*.png") == 1
    assert README.count("pip install -r requirements.txt -r tests/requirements.txt && python -m pytest") == 1


@pytest.mark.parametrize("program", sorted({program for program, _ in COMMANDS}))
def test_every_flag_of_the_readme_exists(program):
    flags = {flag for name, rest in COMMANDS if name == program for flag in re.findall(r"--[a-z0-9-]+", rest)}
    known = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert flags <= set(re.findall(r"--[a-z0-9-]+", known)), program


def test_files_and_links_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(target)).exists(), target
    for name in re.findall(r"^\| `([\w/.]+)`", README, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_functions_of_the_equation_table_exist():
    for file, name in re.findall(r"`(\w+\.py)`: `([\w.]+)`", README):
        source = (ROOT / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b|self\.{part}\b", source), (file, name)


def test_it_is_not_too_long():
    assert README.count("\n") < 300
