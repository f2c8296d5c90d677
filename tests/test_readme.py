"""The README stays true: its commands parse, its names exist, and its metrics are those that are logged."""
import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import cca
import evaluate
import finetune
import prepare_data
import pretrain
import robot
from conftest import metrics
from prepare_data import EpisodeDataset

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


IMPORTS = {"models": set(), "robot": {"models"}, "prepare_data": {"models", "robot"},
           "pretrain": {"models", "prepare_data"}, "finetune": {"models", "prepare_data"},
           "cca": {"models", "prepare_data"}, "evaluate": {"models", "prepare_data", "robot"}}


def test_scripts_import_each_other_at_the_top_and_without_a_circle(capsys):
    """Every import counts, also one inside a function. The graph is printed, also without -s."""
    for path in SCRIPTS:
        module = ast.parse(path.read_text())
        siblings, lazy = set(), set()
        for node in ast.walk(module):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in set(names) & set(IMPORTS):
                siblings.add(name)
                if node not in module.body:
                    lazy.add(f"{name} in line {node.lineno}")
        with capsys.disabled():
            print(f"\n{path.stem:12s} <- {', '.join(sorted(siblings)) or 'nothing local'}", end="")
        assert not lazy, f"{path.name} imports {lazy} inside a function or a branch"
        assert siblings == IMPORTS[path.stem], f"{path.name} imports {siblings}: is that meant?"
    order = []                                                  # a topological order exists: no circle
    while len(order) < len(IMPORTS):
        free = [name for name, needs in IMPORTS.items() if name not in order and needs <= set(order)]
        assert free, f"import circle among {set(IMPORTS) - set(order)}"
        order += free


def test_every_name_in_the_symbol_table_exists():
    code = "\n".join(p.read_text() for p in SCRIPTS)
    rows = re.findall(r"^\|.*\|$", README.split("## Symbols")[1].split("\n## ")[0], re.M)[2:]
    for row in rows:
        name = re.fullmatch(r"\|.*\| `([A-Za-z_.]+)` \|", row)
        assert name, f"the last cell of a row of the symbol table is a name of the code, not as in {row}"
        for part in name[1].split("."):
            assert re.search(rf"\b(def|class) {part}\b", code), f"the code has no {name[1]}"
    for number in range(1, 8):
        assert f"(Eq. {number})" in code, f"no line of the code is marked as (Eq. {number})"


def test_every_logged_metric_has_its_line_in_the_readme_and_every_line_is_logged(data, tmp_path):
    common = ["--smoke", "--device", "cpu"]
    pretrain.main([*common, "--data", data.video, "--probe-data", data.robot, "--out", str(tmp_path / "a")])
    finetune.main([*common, "--data", data.robot, "--init", str(tmp_path / "a" / "last.pt"),
                   "--out", str(tmp_path / "b")])
    pretrain.main([*common, "--data", data.robot, "--probe-data", "none", "--out", str(tmp_path / "c"),
                   "--policy", "act", "--latent-source", "inverse"])
    finetune.main([*common, "--data", data.robot, "--init", "scratch", "--policy", "act",
                   "--out", str(tmp_path / "d")])
    logged = {name for run in "abcd" for line in metrics(tmp_path / run) for name in line} - {"step"}
    table = README.split("## Logged metrics")[1].split("\n## ")[0]
    described = set()
    for cell in re.findall(r"^\| (`.*?) \|", table, re.M):
        names = re.findall(r"`([^`]+)`", cell)
        described |= {name if not name.startswith("/") else names[0].rsplit("/", 1)[0] + name
                      for name in names}
    described |= {f"val_l1/{i}" for i in range(7)}
    assert logged == described, (f"only logged: {logged - described}; "
                                 f"only in the README: {described - logged}")


def test_load_observe_act_runs_as_the_readme_has_it(data, tmp_path, monkeypatch):
    """A finetuned policy drives somebody's own robot with the README's lines alone."""
    finetune.main(["--smoke", "--data", data.robot, "--init", "scratch",
                   "--out", str(tmp_path / "runs/finetune")])
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S)
                if "read_cameras()" in block)
    monkeypatch.chdir(tmp_path)
    sent, image = [], np.zeros((32, 32, 3), np.uint8)
    exec(code, {"read_cameras": lambda: {"front": image, "side": image}, "read_state": lambda: np.zeros(7),
                "send": sent.append})
    low, high = (np.array(EpisodeDataset(data.robot, 1).limits("actions")[key]) for key in ("min", "max"))
    assert len(sent) == 200 and all(((low - 1e-5 <= a) & (a <= high + 1e-5)).all() for a in sent)


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
