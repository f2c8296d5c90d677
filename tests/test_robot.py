"""What robot.py claims about its twin, one claim per test."""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import robot
from conftest import small_size
from models import POLICIES, InputError, make_policy
from robot import TASKS, THINGS, TOOL_DOWN, Expert, TwinEnv, expert_episode

needs_gl = pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disable",
                              reason="no OpenGL: apt-get install libegl1 libgl1 libosmesa6")
SMALL = dict(cameras=["front"], image_size=32, chunk=2, text_encoder="hash", proprio_dim=None, action_dim=2,
             latent_dim=2, latent_norm=False, head="action", proprio_dropout=0.0)
HOLD = np.array([0, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture(scope="module")
def blind():
    """A twin without images: physics only."""
    return TwinEnv(cameras=())


@pytest.fixture(scope="module", params=["robot", "hand"])
def either(request):
    """The robot and the hand, without images."""
    return TwinEnv(request.param, cameras=())


@pytest.fixture(scope="module")
def filmed():
    return TwinEnv()


def play(env, task, seed, change):
    """The expert's episode with its actions changed on the way -> success, number of steps."""
    env.reset(task, seed)
    expert = Expert(env, seed)
    for step in itertools.count(1):
        _, done, success = env.step(change(expert.act()))
        if done:
            return success, step


def put(env, name, x, y, z, turn=(1, 0, 0, 0), steps=10):
    """Puts a thing somewhere; then the world gets half a second. -> success"""
    env.data.joint(name).qpos[:] = [x, y, z, *turn]
    env.data.joint(name).qvel[:] = 0
    for _ in range(steps):
        _, _, success = env.step(HOLD)
    return success


# ---- the tasks ----

@pytest.mark.parametrize("task", TASKS)
def test_the_expert_succeeds(task, either):
    success, observations, actions = expert_episode(either, task, 5)
    assert success and len(actions) <= 170
    assert len(observations) == len(actions) + 1 and actions[0].dtype == np.float32


@pytest.mark.parametrize("task", TASKS)
def test_no_motion_random_motion_and_an_open_gripper_all_fail(task, blind):
    random = np.random.default_rng(0)
    for change in (lambda a: HOLD, lambda a: np.append(a[:6], 1),
                   lambda a: random.uniform(-1, 1, 7) * [.02, .02, .02, .1, .1, .1, 1]):
        assert play(blind, task, 1, change) == (False, TASKS[task].max_steps)


def test_every_sub_goal_counts(blind):
    blind.reset("cups_on_plate", 0)
    x, y, _ = blind.position("plate")
    assert not put(blind, "blue_cup", x - 0.045, y, 0.008)      # one cup is not both cups
    assert put(blind, "white_cup", x + 0.045, y, 0.008)
    blind.reset("pineapple_and_roll", 0)
    assert not put(blind, "pineapple", *blind.position("pot")[:2], 0.007)
    assert put(blind, "roll", *blind.position("plate")[:2], 0.027)


def test_a_cup_must_be_let_go_and_stand_upright(blind):
    blind.reset("stack_cups", 0)
    assert put(blind, "blue_cup", *blind.position("white_cup")[:2], THINGS["white_cup"].floor + 0.002)
    blind.reset("stack_cups", 0)        # the wrong way round
    assert not put(blind, "white_cup", *blind.position("blue_cup")[:2], THINGS["blue_cup"].floor + 0.002)
    blind.reset("cup_in_bowl", 0)       # on its side
    lying = np.sqrt([0.5, 0.5, 0, 0])
    assert not put(blind, "blue_cup", *(blind.position("bowl") + [0, 0, 0.06]), lying, steps=20)
    assert not blind.upright("blue_cup")
    held = []

    def carry(action):                  # to its place, but never let go
        held.append(blind.position("blue_cup")[2] > 0.05)
        return np.append(action[:6], action[6] * (not any(held)))
    assert not play(blind, "cup_in_bowl", 3, carry)[0] and sum(held) > 20


# ---- starts and seeds ----

def test_spread_scales_the_start_regions():
    def starts(spread):
        env, found = TwinEnv(cameras=(), spread=spread), []
        for seed in range(8):
            env.reset("stack_cups", seed)
            found.append([*env.position("blue_cup")[:2], *env.tool_position])
        return np.array(found)
    none, half, full = starts(0), starts(0.5), starts(1)
    assert np.ptp(none, axis=0).max() < 1e-6
    assert np.allclose((half - none[0]) * 2, full - none[0], atol=2e-3)
    region = np.array(TASKS["stack_cups"].objects["blue_cup"])
    assert (np.abs(full[:, :2] - region[:2]) <= region[2:] + 1e-3).all() and np.ptp(full[:, 1]) > 0.03


@needs_gl
def test_the_same_seed_is_the_same_film_of_the_hand_bit_for_bit():
    def film(env, seed):
        obs, expert = env.reset("stack_cups", seed), Expert(env, seed)
        seen = []
        for _ in range(15):
            obs, _, _ = env.step(expert.act())
            seen += [value.tobytes() for value in (*obs["images"].values(), obs["proprio"])]
        return seen
    env = TwinEnv("hand", image_size=32)
    first = film(env, 4)
    assert film(env, 9) != first
    env.reset("cups_on_plate", 1)
    env.step(np.ones(7))
    assert film(env, 4) == first                                        # after other episodes
    assert film(TwinEnv("hand", image_size=32), 4) == first             # in another environment


# ---- robot and hand ----

def test_mujocos_kinematics_are_those_of_the_dh_table_and_joints_are_found_for_every_pose(either):
    either.reset("stack_cups", 0)
    random, data = np.random.default_rng(0), mujoco.MjData(either.model)
    for _ in range(50):
        if either.embodiment == "robot":
            q = random.uniform(-2, 2, 6)
            position, turn = robot.tool_pose(q)
        else:
            position, turn = random.uniform(-0.4, 0.4, 3), Rotation.from_rotvec(random.uniform(-.5, .5, 3))
            turn = turn.as_matrix() @ TOOL_DOWN
            either.gate.position, either.gate.turn = position, turn
            q = either._joints()
        data.qpos[:6] = q
        mujoco.mj_kinematics(either.model, data)
        assert np.abs(data.site("tool").xpos - position).max() < 1e-9
        assert np.abs(data.site("tool").xmat.reshape(3, 3) - turn).max() < 1e-9


def test_an_action_is_in_metres_and_radians_of_the_base_and_the_gripper_is_absolute(either):
    for axis, change, moved in ((0, 0.01, 0.04), (1, 0.01, 0.04), (2, 0.01, 0.04), (5, 0.07, 0.28)):
        before = either.reset("stack_cups", 0)["proprio"]
        assert before[6] > 0.99 and np.abs(before[3:6]).max() < 1e-3        # open, tool down
        action = np.eye(7)[axis] * change
        for step in range(12):
            obs, _, _ = either.step((action if step < 4 else 0 * action) + [0, 0, 0, 0, 0, 0, 0.4])
        off = (obs["proprio"] - before)[:6] - np.eye(7)[axis, :6] * moved
        assert np.abs(off[:3]).max() < 0.004 and np.abs(off[3:]).max() < 0.02
        assert obs["proprio"][6] < 0.05                                     # 0.4 is below the switch: closed


def test_an_action_passes_the_gate_of_the_arm_and_an_invalid_one_is_an_error(blind):
    before = blind.reset("stack_cups", 0)["proprio"]
    for action in [[0, 0.1, 0, 0, 0, 0, 1]] * 3 + [[0, 1000, 0, 0, 0, 0, 1]] * 6:       # shortened; refused
        obs, _, _ = blind.step(action)
    assert abs(obs["proprio"][1] - before[1] - 3 * robot.MAX_STEP) < 0.003
    for bad in ([np.nan, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, np.inf, 1], [0, 0, 0]):
        with pytest.raises(ValueError):
            blind.step(bad)


# ---- the images ----

@needs_gl
def test_images_are_upright_rgb_and_show_the_cups_large(filmed):
    image = filmed.reset("stack_cups", 0)["images"]["front"].astype(int)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    cup, pads = (blue > red + 60) & (blue > green + 60), (green > red + 40) & (green > blue + 40)
    assert np.nonzero(cup)[0].mean() > np.nonzero(pads)[0].mean() + 10  # the raised gripper is above the cup
    assert np.ptp(np.nonzero(cup)[1]) + 1 >= 8                          # pixels wide
    assert np.nonzero(cup)[1].mean() < 32                               # y < 0 is left, seen from the front
    table = image[-3:].reshape(-1, 3)
    assert np.ptp(table.mean(0)) < 40 and table.std(0).max() < 10       # the last rows are bare table
    hand = TwinEnv("hand").reset("stack_cups", 0)["images"]["front"]
    assert np.abs(image - hand).mean() > 5                              # a hand does not look like the robot


@needs_gl
def test_every_thing_is_seen_by_both_cameras(filmed):
    for task in TASKS:
        filmed.reset(task, 2)
        renderer = filmed._renderers[task, 64, 64]
        renderer.enable_segmentation_rendering()
        for camera in filmed.cameras:
            renderer.update_scene(filmed.data, camera)
            geoms = np.unique(renderer.render()[..., 0])
            seen = {filmed.model.body(filmed.model.geom_bodyid[g]).name for g in geoms if g >= 0}
            assert set(filmed.task.objects) | {"left"} <= seen, (task, camera)
        renderer.disable_segmentation_rendering()


def test_the_robots_cameras_stand_still_and_the_hands_shake(either):
    moves, views = either.embodiment == "hand", []
    either.reset("stack_cups", 0)
    for _ in range(6):
        either.step(HOLD)
        views.append(either.data.camera("front").xpos.copy())
    either.reset("stack_cups", 1)
    assert (np.ptp(views, axis=0).max() > 1e-4) == moves
    assert (np.abs(either.data.camera("front").xpos - views[-1]).max() > 1e-3) == moves     # another episode
    assert np.abs(views - np.array(robot.CAMERAS["front"][0])).max() < 0.08     # but it stays near


# ---- errors and exit ----

def test_a_wrong_spread_and_missing_opengl_are_one_clear_line(monkeypatch):
    with pytest.raises(InputError, match="between 0 and 1; got 50"):
        TwinEnv(spread=50)
    monkeypatch.setenv("MUJOCO_GL", "disable")
    with pytest.raises(InputError, match="libegl1 libgl1 libosmesa6"):
        TwinEnv()
    TwinEnv(cameras=()).reset("stack_cups", 0)


@needs_gl
def test_a_process_that_rendered_exits_quietly():
    code = "import robot; env = robot.TwinEnv(image_size=16); env.reset('stack_cups', 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(robot.__file__).parent, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


@needs_gl
@pytest.mark.parametrize("policy", POLICIES)
def test_the_instruction_chooses_between_two_cups_of_one_scene(policy):
    """Either cup may be asked for. The policy learns where the named cup stands; on new starts it must come
    nearer to that one. A policy that gets no words is right half of the time."""
    env, images, places = TwinEnv(cameras=("front",), image_size=32), [], []
    for start in range(60):
        images.append(env.reset("stack_cups", start)["images"]["front"])
        places.append([env.position(cup)[:2] for cup in ("blue_cup", "white_cup")])
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)                   # (60, 3, 32, 32)
    places = torch.tensor(np.array(places), dtype=torch.float32)                      # (60, cups, 2)

    def share_right(words, steps=100):
        torch.manual_seed(0)
        model = make_policy({**SMALL, "policy": policy, **small_size(policy)})
        model.action_norm.fit({"min": places.amin((0, 1)), "max": places.amax((0, 1)),
                               "std": places.std((0, 1))})
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows, cup = torch.randint(44, (16,)), torch.randint(2, (16,))
            batch = {"obs": {"images": {"front": images[rows]}, "instruction": [words[k] for k in cup]},
                     "actions": places[rows, cup][:, None].repeat(1, 2, 1),           # (16, n, 2)
                     "is_pad": torch.zeros(16, 2, dtype=torch.bool)}
            optimizer.zero_grad()
            model.loss(batch)[0].backward()
            optimizer.step(), schedule.step()
        model.eval()
        nearer = []
        for k in (0, 1):
            target = model.act({"images": {"front": images[44:]}, "instruction": [words[k]] * 16})[:, :1]
            distance = (target - places[44:]).norm(dim=-1)                            # (16, cups)
            nearer.append(distance[:, k] < distance[:, 1 - k])
        return torch.cat(nearer).float().mean()

    assert share_right(("pick the blue cup", "pick the white cup")) > 0.9
    assert share_right(("", "")) < 0.7
