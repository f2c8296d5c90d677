"""Claims of prepare_data.py: the timeline, the format, and conversions that can be killed."""
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import prepare_data  # noqa: E402
from models import InputError  # noqa: E402
from prepare_data import EpisodeDataset, Reject, Source, main  # noqa: E402

SIZE, CAMERAS = 32, ["front", "side"]
LENGTHS = [4, 15, 9, 2, 12, 7, 11, 5, 20, 6]  # frames of episode e; episode 3 has a single window
TASKS = ["push the box", "lift the box"]


# ---- a video that counts its frames ------------------------------------------------------------------------

def counting_frame(episode, frame, camera):
    """(SIZE, SIZE, 3) uint8: 16 blocks of 8 x 8 pixels are 16 bits, so that JPEG cannot blur the number."""
    number = frame + 64 * episode + 8192 * CAMERAS.index(camera)
    bits = np.array([number >> i & 1 for i in range(16)], np.uint8).reshape(4, 4)
    return np.repeat(np.kron(bits * 200 + 20, np.ones((8, 8), np.uint8))[..., None], 3, axis=2)


def read_number(frame):
    """(3, H, W) -> (episode, frame, camera) as counting_frame drew them."""
    blocks = np.asarray(frame).reshape(3, 4, SIZE // 4, 4, SIZE // 4).mean((0, 2, 4)) > 120
    number = sum(int(bit) << i for i, bit in enumerate(blocks.flatten()))
    return number // 64 % 128, number % 64, CAMERAS[number // 8192]


def counting_job(episode, cameras=CAMERAS, labelled=True, lengths=LENGTHS):
    """Episode whose pixels, actions and proprio hold the frame number; $COUNTING makes it misbehave."""
    orders = json.loads(os.environ.get("COUNTING", "{}"))
    if "log" in orders:
        with open(orders["log"], "a") as f:
            print(episode, os.getpid(), file=f)
    if episode == orders.get("raise_at"):
        raise RuntimeError("a bug in a converter")
    if episode == orders.get("hang_at"):
        time.sleep(600)
    if episode == orders.get("die_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if episode in orders.get("reject", []):
        raise Reject("looks odd", f"episode {episode}")
    T = lengths[episode]
    numbers = np.arange(T)[:, None] + 100 * episode + np.linspace(0, 0.5, 7)
    item = {"images": {c: [prepare_data.encode_frame(counting_frame(episode, t, c)) for t in range(T)]
                       for c in cameras}, "instructions": [TASKS[episode % 2], "another wording"], "fps": 5.0}
    return {**item, "actions": numbers[:-1], "proprio": numbers} if labelled else item


def convert(out, labelled=True, workers=1, cameras=CAMERAS, lengths=LENGTHS, shard=3, flags=()):
    """Run the convert loop over the counting episodes."""
    jobs = [(f"episode-{e}", partial(counting_job, e, cameras, labelled, lengths))
            for e in range(len(lengths))]
    about = {"cameras": cameras} | {key: prepare_data.TWIN[key] if labelled else None
                                    for key in ("action", "proprio")}
    return convert_jobs(out, jobs, shard, about,
                        "--workers", str(workers), *flags)


def convert_jobs(out, jobs, shard, about, *flags):
    """Run the convert loop over any jobs."""
    prepare_data.SOURCES["counting"] = Source(lambda args: iter(jobs), shard, lambda args: about)
    args = prepare_data.build_parser().parse_args(
        ["videos", "--input", "/nowhere", "--out", str(out), "--image-size", str(SIZE), *flags])
    args.source = "counting"
    return prepare_data.convert(args)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counting") / "data"
    convert(folder)
    return folder


def content(folder):
    """{file: bytes} of a dataset."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def error(call, *words):
    """The call raises an InputError of one line that has all the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    return message


# ---- the timeline ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 3, 10, 19])
def test_every_window_lines_up(counting, chunk):
    """o_t .. o_t+n, a_t .. a_t+n-1, padding and borders, for every window there is."""
    data = EpisodeDataset(counting, chunk, future=1)
    assert len(data) == sum(LENGTHS) - len(LENGTHS)
    expected = [(e, t) for e, T in enumerate(LENGTHS) for t in range(T - 1)]
    for index, (e, t) in enumerate(expected):
        item, last = data[index], LENGTHS[e] - 1
        assert (item["episode"], item["t"], item["instruction_id"]) == (e, t, e % 2)
        frames = [(e, min(t + k, last), "front") for k in range(chunk + 1)]
        assert [read_number(frame) for frame in item["frames"]] == frames
        assert [read_number(item["obs"]["images"][c]) for c in CAMERAS] == [(e, t, c) for c in CAMERAS]
        assert item["is_pad"].tolist() == [t + k >= last for k in range(chunk)]
        row = np.linspace(0, 0.5, 7) + 100 * e
        hold = np.append(np.zeros(6), row[6] + last - 1)
        actions = np.stack([row + t + k if t + k < last else hold for k in range(chunk)]).astype(np.float32)
        assert np.array_equal(item["actions"].numpy(), actions)
        assert np.array_equal(item["obs"]["proprio"].numpy(), (row + t).astype(np.float32))
    with pytest.raises(IndexError):
        data[len(data)]


def test_item_shapes_and_types(counting):
    data = EpisodeDataset(counting, 4, cameras=["side"], future=1)
    batch = torch.utils.data.default_collate([data[0], data[5]])
    assert batch["frames"].shape == (2, 5, 3, SIZE, SIZE) and batch["frames"].dtype == torch.uint8
    assert batch["actions"].shape == (2, 4, 7) and batch["actions"].dtype == torch.float32
    assert batch["is_pad"].shape == (2, 4) and batch["is_pad"].dtype == torch.bool
    assert set(batch["obs"]["images"]) == {"side"} and read_number(batch["frames"][0, 0])[2] == "side"
    assert batch["obs"]["instruction"] == [TASKS[0], TASKS[1]] and batch["obs"]["proprio"].shape == (2, 7)
    assert (data.action_dim, data.proprio_dim, data.fps, data.image_size) == (7, 7, 5.0, SIZE)
    assert data.instructions == TASKS and data.num_episodes == len(LENGTHS)
    assert "frames" not in EpisodeDataset(counting, 4)[0]


def test_colours_survive(tmp_path):
    """RGB in, RGB out: a red frame is red."""
    red = np.zeros((SIZE, SIZE, 3), np.uint8)
    red[..., 2] = 255                                                     # BGR
    jpegs = [prepare_data.encode_frame(red)] * 3
    episode = {"images": {"front": jpegs}, "instructions": ["red"], "fps": 1.0}
    convert_jobs(tmp_path / "d", [("red", lambda: episode)], 3, prepare_data.VIDEO)
    mean = EpisodeDataset(tmp_path / "d", 1)[0]["obs"]["images"]["front"].float().mean((1, 2))
    assert mean[0] > 250 and mean[1] < 5 and mean[2] < 5


def test_video_alone_has_no_action_key(tmp_path):
    convert(tmp_path / "video", labelled=False, cameras=["front"])
    data = EpisodeDataset(tmp_path / "video", 3, future=1)
    assert "actions" not in data[0] and "proprio" not in data[0]["obs"]
    assert data.action_dim is None and data.proprio_dim is None and data.stats == {}


def test_statistics_are_numpys_without_the_hold_action(counting):
    actions = np.concatenate([np.arange(T - 1)[:, None] + 100 * e + np.linspace(0, 0.5, 7)
                              for e, T in enumerate(LENGTHS)]).astype(np.float32).astype(np.float64)
    stats = EpisodeDataset(counting, 1).stats
    for name, value in {"min": actions.min(0), "max": actions.max(0), "mean": actions.mean(0),
                        "std": actions.std(0), "q01": np.quantile(actions, 0.01, axis=0),
                        "q99": np.quantile(actions, 0.99, axis=0)}.items():
        np.testing.assert_allclose(stats["actions"][name], value, rtol=1e-12)
    assert stats["proprio"]["max"][0] == 900 + LENGTHS[9] - 1


# ---- split and handles -------------------------------------------------------------------------------------

def test_split_by_episode_is_stable_and_covers_every_task(tmp_path):
    convert(tmp_path / "d", lengths=[3] * 40, shard=7)
    train, val, everything = (EpisodeDataset(tmp_path / "d", 1, split=s) for s in ("train", "val", "all"))
    assert sorted([*train.episodes, *val.episodes]) == list(everything.episodes) == list(range(40))
    assert val.episodes.tolist() == [18, 19, 38, 39]                      # two of each task, for ever
    few = EpisodeDataset(tmp_path / "d", 1, split="train", demos_per_task=3)
    assert few.episodes.tolist() == [0, 1, 2, 3, 4, 5]
    assert {item["episode"] for item in few} == {0, 1, 2, 3, 4, 5}
    error(lambda: EpisodeDataset(tmp_path / "d", 1, split="train", demos_per_task=19), 19, 18, "push the box")


def test_split_of_a_tiny_dataset_has_both_parts(counting, tmp_path):
    convert(tmp_path / "d", lengths=[3, 3])
    assert [EpisodeDataset(tmp_path / "d", 1, split=s).num_episodes for s in ("train", "val")] == [1, 1]


def test_handles_do_not_travel(counting):
    """Pickling with an open handle works, and a spawned DataLoader worker reads the same as this process."""
    data = EpisodeDataset(counting, 5, future=1)
    data.MAX_OPEN = 2  # fewer than shards: handles are reopened
    here = [data[i] for i in range(len(data))]
    assert 0 < len(data._files) <= 2 and not pickle.loads(pickle.dumps(data))._files
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1,
                                         multiprocessing_context="spawn")
    for mine, other in zip(here, loader, strict=True):
        assert torch.equal(mine["frames"], other["frames"]) and torch.equal(mine["actions"], other["actions"])


# ---- killed, resumed, parallel -----------------------------------------------------------------------------

def test_two_workers_write_the_same_bytes(counting, tmp_path):
    convert(tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(counting)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_raises_leaves_a_half_made_folder_that_resumes(counting, tmp_path, monkeypatch, workers):
    out = tmp_path / "d"
    monkeypatch.setenv("COUNTING", json.dumps({"raise_at": 7}))
    with pytest.raises(RuntimeError, match="a bug"):
        convert(out, workers=workers)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.glob("*.h5")}
    assert list(before) and set(before) <= {"00000.h5", "00001.h5"} and not (out / "dataset.json").exists()
    error(lambda: EpisodeDataset(out, 1), "half made", "--resume")
    error(lambda: convert(out), "--resume", "--overwrite")
    monkeypatch.setenv("COUNTING", json.dumps({"log": str(tmp_path / "log")}))
    convert(out, flags=["--resume"])
    assert content(out) == content(counting)
    assert all((out / name).stat().st_mtime_ns == old[0] and (out / name).stat().st_ino == old[1]
               for name, old in before.items())
    done_again = [int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()]
    assert done_again == list(range(3 * len(before), len(LENGTHS)))  # only what finished shards do not hold


def test_kill_9_leaves_no_processes_and_resumes(counting, tmp_path):
    out, log = tmp_path / "d", tmp_path / "log"
    (tmp_path / "run.py").write_text("import test_prepare_data as t\nif __name__ == '__main__':\n"
                                     f"    t.convert({str(out)!r}, workers=2)")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
           "COUNTING": json.dumps({"hang_at": 7, "log": str(log)})}
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: (out / "00001.h5").exists() and "\n7 " in log.read_text())
    before = (out / "00001.h5").stat()
    workers = {int(line.split()[1]) for line in log.read_text().splitlines()}
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in workers))
    convert(out, flags=["--resume"])
    assert content(out) == content(counting)
    assert (out / "00001.h5").stat().st_mtime_ns == before.st_mtime_ns


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "did not happen in time"
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs (a zombie that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTING", json.dumps({"die_at": 4}))
    error(lambda: convert(tmp_path / "d", workers=2), "killed", "--resume", "--workers")


def test_full_disk_leaves_nothing_that_looks_whole(counting, tmp_path, monkeypatch):
    out, sync, calls = tmp_path / "d", os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) == 4:                                               # arguments.json, two shards, then
            raise OSError(28, "No space left on device")
        sync(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        convert(out)
    assert sorted(p.name for p in out.iterdir()) == ["00000.h5", "00001.h5", "arguments.json"]
    convert(out, flags=["--resume"])
    assert content(out) == content(counting)


def test_resume_and_overwrite_rules(tmp_path, capsys):
    out = tmp_path / "d"
    convert(out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    error(lambda: convert(out), "--resume", "--overwrite")
    assert convert(out, flags=["--resume"]) == 0 and "complete, nothing to do" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    error(lambda: convert(out, flags=["--resume", "--resize", "crop"]), "resize", "squash", "crop")
    error(lambda: convert(out, lengths=[3, 3], flags=["--resume"]), "items")
    (out / "notes.txt").write_text("mine")
    convert(out, lengths=[3, 3], flags=["--overwrite"])
    assert {p.name for p in out.iterdir()} == {"00000.h5", "arguments.json", "dataset.json", "rejects.jsonl",
                                               "notes.txt"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    error(lambda: convert(tmp_path / "other", flags=["--overwrite"]), "thesis.tex", "--out")


def test_rejects_are_counted_kept_over_resume_and_never_replaced(tmp_path, monkeypatch, capsys):
    out = tmp_path / "d"
    monkeypatch.setenv("COUNTING", json.dumps({"reject": [0, 1, 2, 4], "raise_at": 8}))
    with pytest.raises(RuntimeError):
        convert(out)
    monkeypatch.setenv("COUNTING", json.dumps({"reject": [0, 1, 2, 4]}))
    assert convert(out, flags=["--resume"]) == 0.4
    assert "4  looks odd" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"episode-{e}" for e in (0, 1, 2, 4)]
    assert lines[0] == {"name": "episode-0", "reason": "looks odd", "detail": "episode 0"}
    data = EpisodeDataset(out, 1)                                         # the first shard is empty
    kept = [e for e in range(len(LENGTHS)) if e not in (0, 1, 2, 4)]
    assert [read_number(data.read_frames(i, "front", 0, 1)[0])[0] for i in range(data.num_episodes)] == kept
    assert {read_number(item["obs"]["images"]["front"])[0] for item in data} == set(kept)
    assert data.attrs["counts"] == {"items": 10, "rejected": 4, "episodes": 6, "instructions": 2,
                                    "frames": sum(LENGTHS[e] for e in kept)}


# ---- what the dataset refuses ------------------------------------------------------------------------------

def test_input_errors_of_the_dataset(counting, tmp_path):
    error(lambda: EpisodeDataset(tmp_path, 1), "not a dataset", "prepare_data.py sim")
    error(lambda: EpisodeDataset(counting, 20), "chunk of 20", 19)
    error(lambda: EpisodeDataset(counting, 1, cameras=["wrist"]), "wrist", "front, side")
    error(lambda: EpisodeDataset(counting, 1, split="test"), "test", "train")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in content(counting).items():
        (copy / name).write_bytes(data)
    (copy / "00002.h5").unlink()
    error(lambda: EpisodeDataset(copy, 1), "00002.h5", "missing")


def test_fingerprint_pins_the_content(counting, tmp_path):
    manifest = json.loads((counting / "dataset.json").read_text())
    assert [s["file"] for s in manifest["shards"]] == [f"{k:05d}.h5" for k in range(4)]
    assert all(hashlib.sha256((counting / s["file"]).read_bytes()).hexdigest().startswith(s["sha256"])
               for s in manifest["shards"])
    convert(tmp_path / "d", lengths=LENGTHS[:-1] + [7])
    assert EpisodeDataset(tmp_path / "d", 1).fingerprint != EpisodeDataset(counting, 1).fingerprint


def test_shard_is_as_documented(counting):
    with h5py.File(counting / "00000.h5") as f:
        N = sum(LENGTHS[:3])
        jpg, offset = f["images/front/jpg"], f["images/front/offset"]
        assert jpg.chunks is None and jpg.dtype == np.uint8                    # contiguous
        assert offset.shape == (N + 1,) and offset[-1] == len(jpg)
        assert bytes(jpg[offset[5]:offset[5] + 2]) == b"\xff\xd8"
        assert f["episode_start"][:].tolist() == [0, 4, 19, 28] and f["actions"].shape == (N, 7)
        assert f["actions"][3].tolist()[:6] == [0] * 6 and f["actions"][3, 6] == f["actions"][2, 6]
        assert json.loads(f["instruction"].asstr()[1]) == ["lift the box", "another wording"]
        assert f.attrs["format_version"] == prepare_data.FORMAT_VERSION and json.loads(
            f.attrs["cameras"]) == CAMERAS


# ---- Something-Something v2 --------------------------------------------------------------------------------

def write_video(path, frames=24, fps=12.0, level=60, fourcc="VP80"):
    """A grey video whose brightness grows with time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*fourcc), fps, (64, 36))
    noise = np.random.default_rng(0).integers(0, 60, (36, 64, 3), dtype=np.uint8)
    for i in range(frames):
        writer.write(np.roll(noise, 3 * i, 1) + np.uint8(level + 2 * i))
    writer.release()


@pytest.fixture(scope="module")
def ssv2(tmp_path_factory):
    """The layout of Something-Something v2 with five good clips and one of each kind of damage."""
    root = tmp_path_factory.mktemp("ssv2")
    clips = root / "20bn-something-something-v2"
    for i in (9, 10, 2, 111, 3):
        write_video(clips / f"{i}.webm", level=40 + i % 100)
    whole = (clips / "9.webm").read_bytes()
    (clips / "20.webm").write_bytes(whole[:int(len(whole) * 0.6)])
    (clips / "21.webm").write_bytes(b"")
    (clips / "22.webm").write_text("<!DOCTYPE html><html>log in first</html>")
    write_video(clips / "23.webm", frames=5)
    (root / "labels").mkdir()
    names = ["9", "10", "2", "20", "21", "22", "23", "24"]                # 24 has no file
    entries = [{"id": i, "label": f"squeezing a thing {i}", "template": "Squeezing [something]",
                "placeholders": ["thing"]} for i in names]
    (root / "labels" / "train.json").write_text(json.dumps(entries))
    (root / "labels" / "something-something-v2-validation.json").write_text(json.dumps(
        [{"id": "111", "label": "pulling a/c remote", "template": "Pulling [it]", "placeholders": ["x"]},
         {"id": "3", "label": "pulling it", "template": "Pulling [something]", "placeholders": ["x"]}]))
    return root


def ssv2_command(root, out, *flags):
    return ["ssv2", "--input", str(root), "--out", str(out), "--image-size", str(SIZE), "--workers", "1",
            *flags]


def test_ssv2_keeps_the_good_and_names_the_bad(ssv2, tmp_path):
    out = tmp_path / "d"
    with pytest.raises(InputError, match="50 %"):                         # 5 of 10 rejected
        main(ssv2_command(ssv2, out))
    lines = (out / "rejects.jsonl").read_text().splitlines()
    reasons = {reject["name"]: reject["reason"] for reject in map(json.loads, lines)}
    assert reasons == {"20": "truncated", "21": "empty file", "22": "not a video", "23": "too short",
                       "24": "missing file"}
    data = EpisodeDataset(out, 11, future=1)
    with h5py.File(out / "00000.h5") as f:
        assert list(f["name"].asstr()[:]) == ["2", "3", "9", "10", "111"]             # numeric order
    assert data.instructions == ["squeezing a thing 2", "pulling it", "squeezing a thing 9",
                                 "squeezing a thing 10", "pulling a/c remote"]        # label, not template
    assert data.fps == 12.0 and data.cameras == ["front"] and data.attrs["resize"] == "squash"
    for episode, level in enumerate((42, 43, 49, 50, 51)):
        mean = data.read_frames(episode, "front", 0, 24).float().mean((1, 2, 3))  # not black, not scrambled
        assert np.allclose(mean, level + 29.5 + 2 * np.arange(24), atol=4) and (mean.diff() > 0).all()
    with pytest.raises(InputError):
        main(ssv2_command(ssv2, tmp_path / "two", "--workers", "2"))
    assert content(out) == content(tmp_path / "two")


def test_ssv2_finds_other_layouts_and_names(ssv2, tmp_path):
    clips = tmp_path / "videos"
    clips.mkdir()
    (clips / "9.webm").write_bytes((ssv2 / "20bn-something-something-v2" / "9.webm").read_bytes())
    (tmp_path / "something-something-v2-train.json").write_text('[{"id": "9", "label": "x"}]')
    main(ssv2_command(tmp_path, tmp_path / "out", "--splits", "train"))
    assert EpisodeDataset(tmp_path / "out", 1).instructions == ["x"]


def test_ssv2_input_errors(ssv2, tmp_path):
    error(lambda: main(ssv2_command(tmp_path, tmp_path / "d")), "no labels", "labels/train.json")
    (tmp_path / "labels").mkdir()
    labels = tmp_path / "labels" / "train.json"
    labels.write_text('[{"id": "7"')
    error(lambda: main(ssv2_command(tmp_path, tmp_path / "d")), "train.json", "not a JSON file")
    labels.write_text('[{"id": "7"}]')
    error(lambda: main(ssv2_command(tmp_path, tmp_path / "d")), "no label")
    labels.write_text('[{"id": "7", "label": "a"}]')
    error(lambda: main(ssv2_command(tmp_path, tmp_path / "d")), "no .webm", "tar zx")
    write_video(tmp_path / "20bn-something-something-v2" / "8.webm")
    error(lambda: main(ssv2_command(tmp_path, tmp_path / "d")), "none of the 1 labelled clips")
    labels.write_text('[{"id": "8", "label": "a"}]')
    error(lambda: main(ssv2_command(tmp_path, tmp_path / "d", "--min-frames", "99")), "none of the 1 items")
    error(lambda: EpisodeDataset(tmp_path / "d", 1), "half made")
    error(lambda: main(ssv2_command(ssv2, tmp_path / "e", "--fraction", "0")), "--fraction")


def test_fraction_is_a_stable_share():
    names = [str(i) for i in range(1, 5001)]

    def share(fraction, seed=0):
        return {name for name in names
                if prepare_data.drawn(name, types.SimpleNamespace(fraction=fraction, seed=seed))}
    assert 400 < len(share(0.1)) < 600 and share(0.1) < share(0.2) and share(1.0) == set(names)
    assert len(share(0.1) & share(0.1, seed=1)) < 100, "another seed is another share"


# ---- a folder of videos ------------------------------------------------------------------------------------

def test_videos_with_captions_and_crop(tmp_path, capsys):
    folder = tmp_path / "clips"
    for name in ("clip10.webm", "clip9.webm", "more/a.mkv", "left_out.mp4"):
        write_video(folder / name, fourcc="mp4v" if name.endswith("mp4") else "VP80", fps=10.0)
    (folder / "read.me").write_text("not a video")
    table = tmp_path / "captions.csv"
    table.write_text('\ufefffile,instruction\nclip10.webm,"pour, then wait"\nclip9.webm,push\n'
                     "clip9.webm,shove\nmore/a.mkv,x\n")
    command = ["videos", "--input", str(folder), "--out", str(tmp_path / "d"), "--image-size", str(SIZE),
               "--workers", "1", "--resize", "crop"]
    main([*command, "--captions", str(table)])
    assert "captions for 3 of 4 videos" in capsys.readouterr().out
    data = EpisodeDataset(tmp_path / "d", 1)
    assert data.instructions == ["push", "pour, then wait", "x"]
    assert data.attrs["resize"] == "crop" and data.fps == 10
    with h5py.File(tmp_path / "d" / "00000.h5") as f:
        assert list(f["name"].asstr()[:]) == ["clip9.webm", "clip10.webm", "more/a.mkv"]
        assert json.loads(f["instruction"].asstr()[0]) == ["push", "shove"]
    table.write_text("file,instruction\nclip11.webm,pull\n")
    error(lambda: main([*command, "--captions", str(table), "--overwrite"]), "clip11.webm", "line 2")
    table.write_text("name,text\nclip9.webm,pull\n")
    error(lambda: main([*command, "--captions", str(table), "--overwrite"]), "file,instruction", "name")
    assert EpisodeDataset(tmp_path / "d", 1).num_episodes == 3  # a refused command has removed nothing
    main([*command, "--overwrite"])
    assert "empty instruction" in capsys.readouterr().out
    assert EpisodeDataset(tmp_path / "d", 1).instructions == [""]
    (tmp_path / "empty").mkdir()
    error(lambda: main(["videos", "--input", str(tmp_path / "empty"), "--out", str(tmp_path / "e")]), ".webm")


def test_crop_keeps_the_centre_square():
    frame = np.zeros((40, 100, 3), np.uint8)
    frame[:, 30:70] = 255
    assert (prepare_data.shrink(frame, 20, "crop") == 255).all()
    assert prepare_data.shrink(frame, 20, "squash")[10, 0].max() == 0


# ---- the twin as a source ----------------------------------------------------------------------------------

@pytest.fixture
def fake_twin(monkeypatch):
    """A robot module whose episodes take 30 steps and fail where seed % 5 < `failures`."""
    module = types.ModuleType("robot")
    module.CONTROL_HZ, module.EVAL_SEED0, module.seen, module.failures = 20, 1_000_000, [], 2
    module.TASKS = {name: types.SimpleNamespace(instruction=f"do {name}") for name in "ab"}

    class TwinEnv:
        def __init__(self, embodiment, image_size, cameras, spread):
            self.embodiment, self.cameras = embodiment, cameras
            self.size = (image_size, image_size) if isinstance(image_size, int) else image_size

        def observe(self):
            value = np.full((*self.size, 3), 5 * self.steps + 10, np.uint8)    # the mean counts the steps
            value[:, self.size[1] // 2:] += 20
            return {"images": {c: value for c in self.cameras}, "proprio": np.full(7, self.steps, np.float32)}

        def reset(self, task, seed):
            self.instruction, self.seed, self.steps = module.TASKS[task].instruction, seed, 0
            module.seen.append((self.embodiment, task, seed))
            return self.observe()

        def step(self, action):
            assert action[0] == self.steps
            self.steps += 1
            return self.observe(), self.steps == 30, self.steps == 30 and self.seed % 5 >= module.failures

    class Expert:
        def __init__(self, env, seed):
            self.env = env

        def act(self):
            return np.full(7, float(self.env.steps))
    module.TwinEnv, module.Expert = TwinEnv, Expert
    monkeypatch.setitem(sys.modules, "robot", module)
    prepare_data.twin.cache_clear()
    yield module
    prepare_data.twin.cache_clear()


def sim_command(out, *flags):
    return ["sim", "--out", str(out), "--tasks", "a,b", "--image-size", str(SIZE), "--demos-per-task", "5",
            "--hand-videos-per-task", "2", "--workers", "1", *flags]


def test_sim_films_successes_from_starts_that_never_meet(fake_twin, tmp_path):
    main(sim_command(tmp_path))
    robot, hand = ({s for e, _, s in fake_twin.seen if e == name} for name in ("robot", "hand"))
    assert not robot & hand and max(robot | hand) < fake_twin.EVAL_SEED0
    data = EpisodeDataset(tmp_path / "robot", 10, future=1)
    assert data.instructions == ["do a", "do b"] and data.lengths.tolist() == [31] * 10
    assert data.cameras == ["front", "side"] and data.fps == 20 and data.attrs["extra"]["spread"] == 0.5
    for item in data:  # a_t was commanded while looking at o_t
        real = ~item["is_pad"]
        assert torch.equal(item["actions"][real, 0], torch.arange(item["t"], item["t"] + real.sum()).float())
        assert abs(item["obs"]["images"]["side"].float().mean() - 5 * item["t"] - 20) < 2
        assert item["obs"]["proprio"][0] == item["t"]
    entries = json.loads((tmp_path / "hand_videos" / "labels" / "train.json").read_text())
    assert [entry["id"] for entry in entries] == ["1", "2", "3", "4"]
    assert set(entries[0]) == {"id", "label", "template", "placeholders"}
    video = EpisodeDataset(tmp_path / "hand", 10)
    assert video.attrs["source"] == "ssv2" and video.fps == 10 and video.lengths.tolist() == [16] * 4
    means = video.read_frames(0, "front", 0, 16).float().mean((1, 2, 3))
    assert np.allclose(means, 20 + 10 * np.arange(16), atol=4)  # every second control step: time runs evenly


def test_sim_resumes_and_refuses(fake_twin, tmp_path):
    main(sim_command(tmp_path))
    before = content(tmp_path / "robot"), content(tmp_path / "hand")
    clips = tmp_path / "hand_videos" / "20bn-something-something-v2"
    kept = (clips / "1.webm").stat().st_mtime_ns
    for name in ("hand_videos/labels/train.json", "robot/dataset.json", "robot/00001.h5", "hand/dataset.json",
                 "hand/00000.h5"):
        (tmp_path / name).unlink()
    (clips / "2.webm").unlink()
    error(lambda: main(sim_command(tmp_path)), "robot", "--resume")
    fake_twin.seen.clear()
    main(sim_command(tmp_path, "--resume"))
    assert (content(tmp_path / "robot"), content(tmp_path / "hand")) == before
    assert (clips / "1.webm").stat().st_mtime_ns == kept
    assert {(e, t) for e, t, _ in fake_twin.seen} == {("robot", "a"), ("robot", "b"), ("hand", "b")}
    error(lambda: main(sim_command(tmp_path, "--resume", "--spread", "1")), "spread", "0.5", "1.0")
    error(lambda: main(sim_command(tmp_path / "x", "--tasks", "a,dance")), "dance", "a, b")
    error(lambda: main(sim_command(tmp_path / "x", "--seed", "499990")), "500000", "starts")
    error(lambda: main(sim_command(tmp_path / "x", "--workers", "0")), "--workers")


def test_sim_rejects_what_never_succeeds(fake_twin, tmp_path):
    fake_twin.failures = 5
    error(lambda: main(sim_command(tmp_path)), "none of the 10 items", "no success")


def test_sim_films_the_real_twin(tmp_path):
    """Smoke: two demonstrations and one hand video of the MuJoCo twin, twice the same."""
    try:
        import robot
        robot.TwinEnv(image_size=32).reset("stack_cups", 0)
    except Exception as reason:  # whatever a machine without GL raises
        pytest.skip(f"the twin does not render here: {reason}")
    for name, workers in (("one", "1"), ("two", "2")):
        main(["sim", "--out", str(tmp_path / name), "--tasks", "stack_cups", "--demos-per-task", "2",
              "--hand-videos-per-task", "1", "--image-size", "32", "--workers", workers])
    assert content(tmp_path / "one/robot") == content(tmp_path / "two/robot")
    data = EpisodeDataset(tmp_path / "one/robot", 10, future=1)
    assert data.num_episodes == 2 and data[0]["frames"].float().std() > 5
    assert EpisodeDataset(tmp_path / "one/hand", 10).instructions == data.instructions


# ---- inspect -----------------------------------------------------------------------------------------------

def test_inspect_prints_and_draws(counting, tmp_path, capsys):
    main(["inspect", str(counting), "--contact-sheet", str(tmp_path / "sheet.png")])
    out = capsys.readouterr().out
    assert "push the box" in out and "q99" in out and "gripper" in out
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape[0] >= len(LENGTHS) * 2 * 100 and sheet.std() > 10
