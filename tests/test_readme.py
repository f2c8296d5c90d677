"""The README cannot rot: its commands parse, its names exist, its metrics are the ones that are logged."""
import ast
import re
import shlex
from pathlib import Path

import pytest

import cca
import evaluate
import finetune
import prepare_data
import pretrain
import robot
from conftest import metrics

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(p for p in ROOT.glob("*.py"))
PARSERS = {"prepare_data.py": lambda argv: prepare_data.build_parser("--smoke" in argv).parse_args(argv),
           "pretrain.py": pretrain.arguments, "finetune.py": finetune.arguments,
           "evaluate.py": evaluate.arguments, "cca.py": cca.arguments,
           "robot.py": lambda argv: robot.build_parser().parse_args(argv)}


def commands(text):
    """Every `python script.py ...` in a text, as lists of words."""
    for line in text.replace("\\\n", " ").replace("$P", "baku").splitlines():
        for part in re.split(r"&&|\|\|", line.split("#")[0]):
            words = shlex.split(part.replace("`", " ")) if "python " in part else []
            if ("python" in words and words[-1] != "python"
                    and words[words.index("python") + 1].endswith(".py")):
                yield words[words.index("python") + 1:]


def shell_blocks():
    return "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))


def test_every_picture_of_the_readme_is_here():
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert pictures and all((ROOT / picture).stat().st_size > 5000 for picture in pictures)


def docstring_commands():
    for path in SCRIPTS:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        yield from commands("\n".join(line for line in doc.splitlines() if line.startswith("    python ")))


@pytest.mark.parametrize("words", [*commands(shell_blocks()), *docstring_commands()], ids=" ".join)
def test_every_command_in_the_readme_and_the_docstrings_parses(words):
    script, *argv = words
    assert (ROOT / script).exists()
    if script in PARSERS:
        PARSERS[script](argv)


def test_every_name_in_the_symbol_table_exists():
    code = "\n".join(p.read_text() for p in SCRIPTS)
    table = README.split("## Symbols")[1].split("##")[0]
    for name in re.findall(r"`([A-Za-z_.]+)` \|$", table, re.M):
        for part in name.split("."):
            assert re.search(rf"\b(def|class) {part}\b", code), (
                f"{name} is in the README's symbol table, not in the code")
    for number in range(1, 8):
        assert f"(Eq. {number})" in code, f"no line of the code is marked as (Eq. {number})"


def test_every_logged_metric_has_its_line_in_the_readme_and_every_line_is_logged(data, tmp_path):
    common = ["--smoke", "--device", "cpu"]
    pretrain.main([*common, "--data", data.video, "--probe-data", data.robot, "--out", str(tmp_path / "a")])
    finetune.main([*common, "--data", data.robot, "--init", str(tmp_path / "a" / "last.pt"),
                   "--out", str(tmp_path / "b")])
    pretrain.main([*common, "--data", data.robot, "--probe-data", "none", "--out", str(tmp_path / "c"),
                   "--proprio", "--policy", "act", "--latent-source", "inverse", "--labels-frac", "0.5"])
    finetune.main([*common, "--data", data.robot, "--init", "scratch", "--policy", "act",
                   "--out", str(tmp_path / "d")])
    pretrain.main([*common, "--data", data.robot, "--world-model", "none", "--labels-frac", "1",
                   "--policy", "act", "--out", str(tmp_path / "e")])
    logged = {name for run in "abcde" for line in metrics(tmp_path / run) for name in line} - {"step"}
    table = README.split("## Logged metrics")[1].split("\n## ")[0]
    described = set()
    for cell in re.findall(r"^\| (`.*?) \|", table, re.M):
        names = re.findall(r"`([^`]+)`", cell)
        described |= {name if not name.startswith("/") else names[0].rsplit("/", 1)[0] + name
                      for name in names}
    described |= {f"val_l1/{i}" for i in range(7)}
    assert logged == described, (f"only logged: {logged - described}; "
                                 f"only in the README: {described - logged}")


def test_the_readme_is_finished_and_smoke_data_are_enough_for_every_stage():
    assert "@@" not in README
    assert prepare_data.SMOKE["demos_per_task"] >= 20, "cca.py needs two held-out episodes: one in ten"


def test_later_stages_have_no_architecture_flags():
    for script in ("evaluate.py", "cca.py"):
        assert not re.search(r'"--(policy|policy-size|chunk|latent-dim|world-model|image-size)"',
                             (ROOT / script).read_text())


def test_no_script_swallows_errors_and_lines_fit_a_screen():
    for path in SCRIPTS:
        assert not re.search(r"except\s*(Exception|BaseException)?\s*:", path.read_text()), (
            f"{path.name} catches everything")
    for path in [*SCRIPTS, *ROOT.glob("tests/*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 110, (
            f"{path.name} has a line that no screen shows")
