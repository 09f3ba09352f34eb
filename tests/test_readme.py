"""The README's commands, its snippet and its map of files, so that they cannot rot."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python (-m related\.\w+|\w+(?:/\w+)?\.py)((?: [^\n`#]*)?)", README)


def test_the_two_commands_are_there():
    assert README.count("pip install -r requirements.txt && python train.py && python sample.py examples/*.png") == 1
    assert README.count("pip install -r requirements.txt -r tests/requirements.txt && python -m pytest") == 1


@pytest.mark.parametrize("program", sorted({program for program, _ in COMMANDS}))
def test_every_flag_of_the_readme_exists(program):
    flags = {flag for name, rest in COMMANDS if name == program for flag in re.findall(r"--[a-z0-9-]+", rest)}
    told = subprocess.run([sys.executable, *program.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert flags <= set(re.findall(r"--[a-z0-9-]+", told.stdout)), program


def test_the_snippet_runs():
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    told = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.match(r"the emotion is [a-z ]+ because \w+", told) and "tensor([" in told


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


def test_imports_run_downward():
    """support, toy -> vad -> sevlm -> data -> metrics, sample -> train -> related."""
    floor = dict(support=0, toy=1, vad=2, sevlm=3, data=4, metrics=5, sample=5, train=6, related=7)
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if room in floor and name in floor and name != room:
                assert floor[name] < floor[room], f"{path} imports {name}"


def test_it_is_not_too_long():
    assert README.count("\n") < 400
