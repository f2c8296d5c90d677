"""Claims of cca.py: it finds what latent actions contain and nothing else, with honest intervals."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import cca
import pretrain
from conftest import write_dataset
from models import InputError, load_policy, make_policy, save_checkpoint

RNG = np.random.default_rng


def measured(X, Y, X_test, Y_test, ridge=1e-3):
    """Correlations of test rows along directions fitted on X, Y."""
    A, B = cca.cca_fit(X, Y, ridge)
    return cca.correlation(np.ones((1, len(X_test))), X_test @ A, Y_test @ B)[0]


# ---- statistics ------------------------------------------------------------------------------------------


def test_known_correlations_are_recovered_on_held_out_rows_whatever_the_units():
    rho, n = np.array([0.9, 0.6, 0.3, 0.0]), 40_000
    hidden = RNG(0).normal(size=(n, 4))
    partner = rho * hidden + np.sqrt(1 - rho ** 2) * RNG(1).normal(size=(n, 4))
    X = hidden @ RNG(2).normal(size=(4, 4)) * [1e-3, 1, 1, 1e3] + 7
    Y = np.c_[partner, RNG(3).normal(size=(n, 2))] @ RNG(4).normal(size=(6, 6))
    half = n // 2
    assert np.allclose(measured(X[:half], Y[:half], X[half:], Y[half:]), rho, atol=0.02)
    A, _ = cca.cca_fit(X[:half], Y[:half])
    assert A.shape == (4, 4) and np.allclose(np.corrcoef(X[half:] @ A, rowvar=False), np.eye(4), atol=0.03)
    X, Y = RNG(5).normal(size=(2, 600, 70))                                 # independent of each other
    assert measured(X[:300], Y[:300], X[:300], Y[:300])[:10].min() > 0.6, "in sample they look correlated"
    held_out = measured(X[:300], Y[:300], X[300:], Y[300:])
    assert abs(held_out.mean()) < 0.03 and np.abs(held_out).max() < 0.25


def test_without_a_ridge_scikit_learn_finds_the_same_correlations():
    CCA = pytest.importorskip("sklearn.cross_decomposition", reason="scikit-learn is a test-only package").CCA
    X = RNG(0).normal(size=(300, 5))
    Y = X[:, :3] @ RNG(1).normal(size=(3, 4)) + RNG(2).normal(size=(300, 4))
    u, v = CCA(4, max_iter=100_000, tol=1e-14).fit(X, Y).transform(X, Y)
    theirs = [np.corrcoef(a, b)[0, 1] for a, b in zip(u.T, v.T)]
    assert np.allclose(measured(X, Y, X, Y, ridge=0), theirs, atol=1e-6)


def test_the_ridge_is_chosen_on_whole_episodes_from_fits_without_them():
    """Each episode repeats its own numbers in X and Y. Folds that split an episode would reward a weak ridge,
    which learns these numbers by heart. Folds of whole episodes show that most of it does not generalise."""
    episode = np.repeat(np.arange(60), 10)
    X, Y = RNG(0).normal(size=(60, 40))[episode], RNG(1).normal(size=(60, 3))[episode]
    Y[:, 0] += X[:, 0]
    X = X + 0.05 * RNG(2).normal(size=X.shape)
    by_row, thin = np.arange(600), RNG(3).normal(size=(600, 3)) * [1, 1, 1e-2]
    mixed = thin @ np.linalg.qr(RNG(4).normal(size=(3, 3)))[0]           # only a weak ridge finds the third
    chosen = []
    for x, y, group in ((X, Y, episode), (X, Y, by_row), (mixed, thin[:, 2:], episode)):
        fold = group % cca.FOLDS
        score = {ridge: sum(measured(x[fold != k], y[fold != k], x[fold == k], y[fold == k], ridge).sum()
                            for k in range(cca.FOLDS)) for ridge in cca.RIDGES}
        chosen.append(cca.choose_ridge(x, y, group))
        assert chosen[-1] == max(score, key=score.get)
    assert chosen[0] == max(cca.RIDGES) > chosen[1] and chosen[2] == min(cca.RIDGES)
    with np.errstate(all="raise"):                      # of deficient rank, one column constant in four folds
        assert cca.choose_ridge(np.c_[X, X, episode % cca.FOLDS == 2], Y, episode) in cca.RIDGES


def test_bootstrap_resamples_whole_episodes():
    u = RNG(0).normal(size=(60, 2))
    v, episode = u + RNG(1).normal(size=(60, 2)), np.repeat(np.arange(20), 3)
    drawn = RNG(5).multinomial(20, np.full(20, 1 / 20), cca.RESAMPLES)[7]
    rows = np.arange(60).repeat(drawn.repeat(3))                            # the eighth sample, row by row
    for statistic, by_hand in ((cca.correlation, [np.corrcoef(u[rows, d], v[rows, d])[0, 1] for d in (0, 1)]),
                               (cca.r2, 1 - ((u - v)[rows] ** 2).sum(0)
                                / ((v[rows] - v[rows].mean(0)) ** 2).sum(0))):
        samples = cca.bootstrap(statistic, [u, v], episode, 5)
        assert np.allclose(samples[8], by_hand) and samples.shape == (1 + cca.RESAMPLES, 2)
        # Rows repeated inside their episode are no new evidence: the interval stays as wide.
        many = cca.bootstrap(statistic, [u.repeat(50, 0), v.repeat(50, 0)], episode.repeat(50), 5)
        assert np.allclose(samples, many) and np.ptp(cca.estimate(samples[:, 0])[1:]) > 0.05


def test_rows_of_two_episodes_vary_with_both_and_few_episodes_have_no_interval():
    first, second = np.divmod(np.arange(400), 20)                           # 20 x 20 pairs of episodes
    value = RNG(0).normal(size=20)[first][:, None]                          # the first episode decides it all

    def width(episode):
        return np.ptp(cca.estimate(cca.bootstrap(cca.mean, [value], episode, 0)[:, 0])[1:])

    assert width(np.stack([first, second + 20], 1)) > 3 * width(second)
    few = cca.estimate(cca.bootstrap(cca.mean, [value], np.arange(400) % 4, 0)[:, 0])
    assert few == [pytest.approx(value.mean()), None, None]
    assert cca.text_rows([{"mean": few, "n": 4}])[1] == [f"{few[0]:.2f} [n < 5]", "4"]


def test_constant_columns_have_no_correlation_and_a_constant_baseline_is_no_error():
    X, row = RNG(0).normal(size=(300, 3)), np.arange(300)
    Y = np.c_[X @ RNG(1).normal(size=(3, 3)), np.full(300, 4.0)]            # one action never varies
    samples, *_ = cca.analyse(X * [1, 0, 1], Y, row // 15, row >= 150, 0)
    assert samples.shape[1] == 3 and samples[0, 1] > 0.9 and samples[0, 2] == 0       # two columns are left
    assert not cca.analyse(0 * X, Y, row // 15, row >= 150, 0)[0].any()         # the time, if every t is 0


# ---- analyses, on made-up latents ------------------------------------------------------------------------


def windows(episodes, first, seed):
    """Latents `good` hold the actions and noise, `blind` are noise; 40 windows of 3 steps per episode."""
    N, rng = 40 * episodes, RNG(seed)
    actions = rng.normal(size=(N, 3, 2)).astype(np.float32) * 0.01
    noise = {name: rng.normal(size=(N, 3, 2)) for name in ("blind", "random 1", "random 2")}
    return {"latents": {"good": 100 * actions + 0.3 * rng.normal(size=actions.shape), **noise},
            "actions": actions, "is_pad": np.arange(3) >= 40 - np.arange(N)[:, None] % 40,
            "episode": first + np.arange(N) // 40, "t": np.arange(N) % 40,
            "instruction_id": np.arange(N) // 40 % 2, "frame": rng.uniform(size=(N, 8))}


@pytest.fixture
def study():
    return SimpleNamespace(
        args=SimpleNamespace(seed=0, data="made up"), names=["good", "blind"], notes=[], device="cpu",
        train=windows(20, 0, 0), held_out=windows(8, 100, 1), moves={"x": 0, "y": 1},
        instructions=["put it", "take it"], action={"units": ["m"] * 3, "delta": [True] * 3})


def test_latents_that_hold_the_actions_gain_over_random_weights_and_noise_does_not(study):
    _, rows, figure = cca.correlations(study)
    assert isinstance(figure, Figure) and not study.notes
    row = {(r["tasks"], r["steps"], r["latents"]): r for r in rows}
    for steps in ("single", "chunk"):
        good, blind = (row["all", steps, f"{name} minus random weights"]["mean"] for name in study.names)
        assert good[1] > 0.7 and blind[1] < 0 < blind[2]
        assert row["all", steps, "true actions"]["mean"][0] > 0.999
        assert abs(row["all", steps, "shuffled"]["mean"][0]) < 0.1
        assert row["Put", steps, "good"]["n"] == 4 and row["Put", steps, "good"]["mean"][1] is None
    detail = row["all", "chunk", "good"]["detail"]
    assert detail["windows"] == [20 * 38, 8 * 38], "padded windows are left out"
    assert len(detail["components"]) == 6
    X, *_ = cca.representations(study, "chunk")
    assert {x.shape[1] for x in X.values()} == {6}, "no baseline wins or loses by its number of columns"
    mixed = cca.pooled([(np.full((501, 1), rho), np.array([rho]), 0.1) for rho in (0.2, 0.6)])[0][:, 0]
    assert cca.estimate(mixed) == [pytest.approx(x) for x in (0.4, 0.2, 0.6)]


def test_constant_latents_have_correlation_zero_and_a_group_with_too_few_episodes_is_left_out(study):
    study.held_out["instruction_id"][:] = 1
    for split in (study.train, study.held_out):
        split["latents"]["blind"][:] = 0.3
    rows = cca.correlations(study)[1]
    assert [row["1st"][0] for row in rows if row["latents"] == "blind"] == [0] * 4
    assert {row["tasks"] for row in rows} == {"all", "Take"}
    assert len(study.notes) == 2 and "correlations of Put" in study.notes[0]
    assert abs(cca.probes(study)[1][1]["mean"][0]) < 0.1


def test_probes_learn_from_the_episodes_of_their_budget_alone(study, monkeypatch):
    seen, probe = [], cca.ridge_probe
    monkeypatch.setattr(cca, "ridge_probe", lambda X, Y, X_test, e: seen.append(e) or probe(X, Y, X_test, e))
    _, (good, blind, *_), figure = cca.probes(study)
    assert good["mean"][1] > 0.8 and good["from 5"][0] > 0.7 and blind["mean"][0] < 0.1
    assert {len(np.unique(e)) for e in seen} == {1, 5, 10, 20} and isinstance(figure, Figure)
    assert all(len(e) == 38 * len(np.unique(e)) for e in seen)


def test_collapse_tells_constant_one_directional_and_task_naming_latents_from_good_ones():
    task, free = np.arange(400) % 2, RNG(0).uniform(-0.9, 0.9, (400, 4, 3))
    latents = {"good": free, "named": np.where(task, 0.99, -0.99)[:, None, None] * np.ones((400, 4, 3)),
               "dead": 0 * free}
    study = SimpleNamespace(held_out={"latents": latents, "instruction_id": task}, notes=[])
    good, named, dead = cca.collapse(study)[1]
    assert len(study.notes) == 1 and "latent actions of dead are constant" in study.notes[0]
    assert good["rank of z_t"] > 2.8 and good["rank of chunks"] > 11 and good["instruction"] < 0.02
    assert good["saturated"] == 0 and good["std"] == pytest.approx(0.52, abs=0.03) and dead["std"] == 0
    assert named["instruction"] == pytest.approx(1) and named["saturated"] == 1
    assert named["rank of z_t"] == pytest.approx(1)


def painter(obeys):
    """Replaces the world model: draws the first frame, shifted as the latents say if it obeys them."""
    def imagine(first, z):
        shift = (12 * z[..., 0]).cumsum(1).round().int() * obeys                      # pixels, (B, n)
        return torch.stack([torch.stack([frame.roll(int(x), -1) for x in row])
                            for frame, row in zip(first, shift)]).float() / 255

    world = SimpleNamespace(embed=lambda x: x, context=lambda x: x, imagine=imagine,
                            decode=lambda future, still: future, picture=lambda future, first: future,
                            load_state_dict=lambda weights: None)
    world.to = world.eval = lambda *device: world
    return world


def clips(count=80, steps=4, size=32):
    """A bright square goes left or right, 8 clips per episode; the latents hold its motion in units of 12."""
    rng = RNG(0)
    start, motion = rng.uniform(10, size - 10, (count, 2)), rng.choice([-1.5, 1.5], count)
    frames = torch.full((count, steps + 1, 3, size, size), 60, dtype=torch.uint8)
    for b, k in np.ndindex(count, steps + 1):
        x, y = round(start[b, 0] + k * motion[b]), round(start[b, 1])
        frames[b, k, :, y - 3:y + 3, max(x - 3, 0):x + 3] = 220
    z = np.zeros((count, steps, 2))
    z[..., 0] = motion[:, None] / 12
    moved, place = (x.numpy() for x in cca.image_motion(frames.float() / 255))
    return {"frames": frames.numpy(), "motion": moved, "place": place, "latents": {"good": z},
            "is_pad": np.zeros((count, steps), bool), "episode": np.arange(count) // 8,
            "true": np.stack([motion, 0 * motion], 1) * steps, "start": start}


def test_image_motion_has_the_direction_and_the_place_of_what_moves():
    video = clips()
    assert (np.sign(video["motion"][:, 0]) == np.sign(video["true"][:, 0])).all(), "x grows to the right"
    assert np.abs(video["motion"][:, 0]).mean() > 3 and np.abs(video["motion"][:, 1]).mean() < 1
    assert np.abs(video["place"] - video["start"] - video["true"] / 2).max() < 2, "the middle of the way"


def test_swap_tells_a_world_model_that_obeys_latents_from_one_that_does_not(study, monkeypatch):
    monkeypatch.setattr(cca, "WorldModel", lambda config: painter(config["obeys"]))
    study.video = clips()
    world = {"target": "pixels", "context_frame": True, "obeys": True}
    study.checkpoint = {"args": {"latents": "learned"}, "world_config": world, "world_model": {}}
    _, (own, of_a, of_b), figure = cca.swap(study)
    assert own["pairs"] > 10 and own["n"] == 10 and isinstance(figure, Figure)
    assert own["mean cosine"][0] > 0.8 and of_a["mean cosine"][1] > 0.8 > -0.5 > of_b["mean cosine"][2]
    world["obeys"] = False
    assert abs(cca.swap(study)[1][1]["mean cosine"][0]) < 0.2
    # The latents of every second episode are reversed. Resampling the episodes of B alone would hide that.
    world["obeys"] = True
    study.video["latents"]["good"] *= np.where(study.video["episode"] % 2, 1, -1)[:, None, None]
    assert np.ptp(cca.swap(study)[1][1]["mean cosine"][1:]) > 0.9
    study.video["episode"][:] = 7
    assert cca.swap(study)[1][0]["pairs"] == 0, "A and B are of different episodes"
    for change in ({"target": "flow"}, {"context_frame": False}, {"latents": "true"}):
        study.checkpoint = {"args": {"latents": "learned"} | change, "world_config": world | change}
        with pytest.raises(InputError, match="does not imagine pixels"):
            cca.swap(study)


def test_nearest_pairs_agree_only_if_the_latents_know_the_motion(study):
    way, n = RNG(0).normal(size=(200, 3)), 200
    study.held_out = study.video = {
        "actions": way[:, None] * 0.05, "motion": 10 * way[:, :2], "place": 0 * way[:, :2], "frame": way,
        "picture": np.zeros((n, 3, 32, 32), np.uint8),
        "episode": np.arange(n) // 10, "instruction_id": np.arange(n) % 2, "path": "hands",
        "latents": {"good": way + 0.05 * RNG(1).normal(size=(n, 3)),
                    "random 1": 10.0 * (np.arange(n) // 10)[:, None] + RNG(2).normal(size=(n, 3))}}
    _, rows, figure = cca.pairs(study)
    assert len(rows) == 9 and isinstance(figure, Figure)
    for row in rows:
        if row["by"] == "good":
            assert row["motions agree"][1] > row["any such pair"][0] + 0.3, row
    blind = rows[1]                                     # the nearest are clips of the same episode: excluded
    assert blind["motions agree"][1] < blind["any such pair"][0] + 0.05 and blind["any such pair"][0] < 0.4
    for action, metres in ((("m m m", [True] * 3), 1), (("0.05m 0.05m 0.05m", [True] * 3), 0.05)):
        assert (cca.metres_per_unit({"units": action[0].split(), "delta": action[1]}) == metres).all()
    for units, delta in (("m m m", [False] * 3), ("rad rad rad", [True] * 3), ("rad", [True])):
        study.action = {"units": units.split(), "delta": delta}
        with pytest.raises(InputError, match="not changes of a position"):
            cca.pairs(study)


# ---- the script ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Pretrained checkpoints: of two cameras, and with an inverse-dynamics model that sees the future."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in (("plain", ["--views", "all"]), ("inverse", ["--latent-source", "inverse"])):
        pretrain.main(["--smoke", "--steps", "2", "--data", data.robot, "--probe-data", "none", "--out",
                       str(root / name), "--device", "cpu", "--threads", "1", "--chunk", "4", *flags])
    return root


def analysis(out, *flags):
    cca.main(["--smoke", "--max-windows", "150", "--random-policies", "2", "--clips", "16", "--device", "cpu",
              "--out", str(out), *map(str, flags)])
    return json.loads((out / "cca.json").read_text())


def test_the_report_shows_everything_in_one_file(data, runs, tmp_path, monkeypatch):
    flags = ["--checkpoint", runs / "plain" / "last.pt", runs / "inverse" / "last.pt", "--data", data.robot]
    monkeypatch.setattr(cca, "metres_per_unit", lambda action: np.ones(3))
    result = analysis(tmp_path, *flags)
    plain, inverse = map(str, flags[1:3])
    assert [r["latents"] for r in result["correlations"]["rows"][:8]] == [
        plain, inverse, f"{inverse}, inverse dynamics (sees the future)", "frame", "time", "shuffled",
        "true actions", "random weights"]
    assert {r["by"] for r in result["pairs"]["rows"]} == {plain, "random 1", "frame"}, "two cameras, too"
    assert "robot and video" not in str(result["pairs"]), "this video is the robot's own"
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4 and not re.search('src="(?!data:)|href=', report)
    for picture in "correlations probes swap pairs".split():
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000

    again = analysis(tmp_path, *flags, "--overwrite", "--video", "none")
    for name in ("correlations", "probes", "collapse", "pairs"):
        assert again[name] == result[name], "the same seed, the same numbers"
    assert "swap" not in again and "no video clips" in str(again["facts"])


def test_every_dataset_is_read_at_the_stride_that_spans_the_time_of_pretraining(data, runs):
    checkpoint = load_policy(runs / "plain" / "last.pt")[1]
    checkpoint["data"]["mixture"][0] |= {"fps": 10, "stride": 1}
    checkpoint["config"]["cameras"], checkpoint["world_config"]["views"] = ["a"], 1
    windows = cca.open_data(SimpleNamespace(data=data.robot, video=data.video), [checkpoint])
    assert [d.stride for d in windows] == [2, 2, 2], "10 frames per second, these have 20"


def test_statistics_of_random_policies_are_measured(data, runs):
    checkpoint = load_policy(runs / "inverse" / "last.pt")[1]
    windows, *_ = cca.open_data(SimpleNamespace(data=data.robot, video="none"), [checkpoint])
    args = SimpleNamespace(random_policies=1, seed=0, max_windows=200)
    measured = cca.random_policies(args, checkpoint["config"], windows, "cpu")
    policies = {"initial": make_policy(checkpoint["config"]).eval(), **measured}
    initial, after = (z.std(0).mean() for z in cca.collect(policies, windows, 200, "cpu")["latents"].values())
    assert initial < 0.2 and after > 0.4                  # as initialised, all latents are nearly the same
    assert not any(m.training for m in measured["random 1"].modules())


def test_what_cannot_be_analysed_is_refused_in_one_line(data, runs, tmp_path):
    good = torch.load(runs / "inverse" / "last.pt", weights_only=True)

    def refused(message, *flags, path=runs / "inverse" / "last.pt", **changes):
        if changes:
            path = tmp_path / "changed.pt"
            save_checkpoint(path, good | changes)
        with pytest.raises(InputError, match=message):
            analysis(tmp_path / "out", "--checkpoint", path, "--data", data.robot, *flags)

    refused("NaN or infinity", policy={k: v * torch.nan for k, v in good["policy"].items()})
    refused("written by finetune.py: give a checkpoint of pretrain.py", stage="finetune")
    refused("no actions to compare with", "--data", data.video)
    refused("1 held-out", "--data", write_dataset(tmp_path / "few", episodes=10))
    refused(f"{data.robot}: 8 training windows, .*: raise --max-windows", "--max-windows", 8)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cca.json").write_text("{}")
    refused("--overwrite")


def test_task_groups_go_by_the_first_known_verb():
    names = {"Put the pot on the stove": "Put", "please pick up the cup and place it": "Take",
             "push the drawer": "Move", "remove the lid": "Remove", "look around": "other"}
    assert {text: cca.group_of(text) for text in names} == names
