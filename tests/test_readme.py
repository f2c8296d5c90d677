"""README and docstrings stay true: commands parse, names exist, and the explained metrics are logged."""
import ast
import graphlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import cca
import evaluate
import finetune
import models
import prepare_data
import pretrain
import robot
from conftest import metrics
from prepare_data import EpisodeDataset

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))
PARSERS = {"prepare_data.py": lambda argv: prepare_data.build_parser("--smoke" in argv).parse_args(argv),
           "pretrain.py": pretrain.arguments, "finetune.py": finetune.arguments,
           "evaluate.py": evaluate.arguments, "cca.py": cca.arguments,
           "robot.py": lambda argv: robot.build_parser().parse_args(argv)}


def commands(text):
    """Every `python script.py ...` and `torchrun ... script.py ...` in a text, as lists of words."""
    for line in text.replace("\\\n", " ").replace("$P", "baku").splitlines():
        for part in re.split(r"&&|\|\|", line.split("#")[0]):
            words = shlex.split(part.replace("`", " ")) if re.search("python |torchrun ", part) else []
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts:
                yield words[scripts[0]:]


RESULTS = (ROOT / "figures" / "results.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README + RESULTS, re.S))
DOCSTRINGS = "\n".join(re.findall(r"^    (?:python|torchrun) .*", "\n".join(
    ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS), re.M))


@pytest.mark.parametrize("words", [*commands(f"{SHELL}\n{DOCSTRINGS}")], ids=" ".join)
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
        module, siblings = ast.parse(path.read_text()), set()
        for node in ast.walk(module):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
            local = set(names) & set(IMPORTS)
            assert not local or node in module.body, (
                f"{path.name} imports {local} inside a function or a branch, line {node.lineno}")
            siblings |= local
        with capsys.disabled():
            print(f"\n{path.stem:12s} <- {', '.join(sorted(siblings)) or 'nothing local'}", end="")
        assert siblings == IMPORTS[path.stem], f"{path.name} imports {siblings}: is that meant?"
    graphlib.TopologicalSorter(IMPORTS).prepare()                                # CycleError for a circle


def test_every_name_in_the_table_of_symbols_exists():
    code = "\n".join(p.read_text() for p in SCRIPTS)
    table = models.__doc__.split("cca.py):")[1].split("Letters:")[0]
    names = ["cca_fit", *re.findall(r" ([A-Za-z_]+\.[a-z_]+|EpisodeDataset)\b", table)]
    assert len(names) == 11
    for part in ".".join(names).split("."):
        assert re.search(rf"\b(def|class) {part}\b", code), f"the code has no {part}"
    for number in range(1, 8):
        assert f"(Eq. {number})" in code.replace(models.__doc__, ""), f"no line is marked as (Eq. {number})"


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Run folders that together log every metric. finetune is the README's default run."""
    root = tmp_path_factory.mktemp("smoke") / "runs"
    for stage, name, flags in (
            (pretrain, "pretrain", ["--data", data.video, "--probe-data", data.robot]),
            (finetune, "finetune", ["--data", data.robot, "--init", str(root / "pretrain" / "last.pt")]),
            (pretrain, "inverse", ["--data", data.robot, "--probe-data", "none", "--policy", "act",
                                   "--predict", "both", "--latent-source", "inverse"]),
            (finetune, "act", ["--data", data.robot, "--init", "scratch", "--policy", "act"])):
        stage.main(["--smoke", "--device", "cpu", "--out", str(root / name), *flags])
    return root


def test_every_logged_metric_is_explained_in_a_docstring_and_every_explained_one_is_logged(runs):
    logged = {name for run in runs.iterdir() for line in metrics(run) for name in line} - {"step"}
    described = {f"val_l1/{i}" for i in range(7)}
    for module in (pretrain, finetune):
        table = module.__doc__.split("Logged metrics:\n\n")[1].split("\n\n")[0]
        for entry in re.findall(r"^    (\S.*?)(?:  |$)", table, re.M):
            names = entry.split(", ")
            described |= {names[0].split("/")[0] + name if name.startswith("/") else name for name in names}
    assert logged == described - {"val_l1/0..6"}, (f"only logged: {logged - described}; "
                                                   f"only explained: {described - logged}")


def test_load_observe_act_runs_as_the_readme_has_it(data, runs, monkeypatch):
    """A finetuned policy drives somebody's own robot with the README's lines alone."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S)
                if "read_cameras()" in block)
    monkeypatch.chdir(runs.parent)
    sent, image = [], np.zeros((32, 32, 3), np.uint8)
    exec(code, {"read_cameras": lambda: {"front": image, "side": image}, "read_state": lambda: np.zeros(7),
                "send": sent.append})
    low, high = (np.array(EpisodeDataset(data.robot, 1).limits("actions")[key]) for key in ("min", "max"))
    assert len(sent) == 200 and all(((low - 1e-5 <= a) & (a <= high + 1e-5)).all() for a in sent)


def test_the_readme_is_finished_its_pictures_are_here_and_smoke_data_are_enough_for_every_stage():
    assert "@@" not in README + RESULTS
    for text, folder in ((README, ROOT), (RESULTS, ROOT / "figures")):
        pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
        assert pictures and all(5_000 < (folder / picture).stat().st_size < 300_000 for picture in pictures)
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
