"""Claims of the converters: dirt is named and never becomes data, and action k stands beside frame k."""
import collections
import json
import os
import pickle
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch

import dirty_data
import prepare_data
from dirty_data import annotations_of, convert, outcomes, picture, read_picture, table, write_video
from prepare_data import EpisodeDataset, Mixture, Reject
from test_prepare_data import content, error

LABELLED = ("bridge", "libero", "lerobot", "realman")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(source): its dirty tree, converted once -> what dirty_data.table returns, and the folders."""
    folder, done = tmp_path_factory.mktemp("dirty"), {}

    def make(source):
        if source == "lerobot":
            pytest.importorskip("pyarrow", reason="LeRobot's tables need: pip install pyarrow")
        if source not in done:
            done[source] = types.SimpleNamespace(
                **dict(zip(("items", "came", "others", "printed", "message"), table(source, folder))),
                root=folder / source, out=folder / f"{source}_data", executed=folder / "executed")
        return done[source]
    return make


def rejects_of(out):
    """{name of a reject: (reason, detail)}."""
    lines = map(json.loads, (Path(out) / "rejects.jsonl").read_text().splitlines())
    return {line["name"]: (line["reason"], line["detail"]) for line in lines}


def numbers_of(out, name):
    """Frame numbers that an episode's pictures say."""
    data, episode = EpisodeDataset(out, 1), list(annotations_of(out)).index(name)
    return [read_picture(frame)[1] for frame in data.read_frames(episode, "front", 0, data.lengths[episode])]


# ---- all sources -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", dirty_data.MAKERS)
def test_every_dirty_item_is_kept_or_named_as_the_table_says(made, source):
    result = made(source)
    wrong = [(item, result.came[item.name]) for item in result.items
             if result.came[item.name] not in item.expected.split(" or ")]
    assert not wrong and not result.others
    assert " of all items rejected" in result.message, "more than 5 % rejected is an error in the end"
    printed = [line.split(maxsplit=1)[1] for line in result.printed.splitlines()
               if line[:10].strip().isdigit()]
    assert set(printed) == {reason for reason, _ in rejects_of(result.out).values()}


@pytest.mark.parametrize("source", dirty_data.MAKERS)
def test_action_k_stands_beside_frame_k_in_every_window(made, source):
    """Pixels count frames, actions and states count steps: all the same number, at every stride."""
    out, names = made(source).out, list(annotations_of(made(source).out))
    garbage = {name for name, came in made(source).came.items() if "garbage" in came}
    for stride in (1, 3):
        data = EpisodeDataset(out, 4, future=1, stride=stride)
        windows = set()
        for item in data:
            if names[item["episode"]] in garbage:
                continue
            real = int((~item["is_pad"]).sum())
            seen = [read_picture(frame)[1] for frame in item["frames"]]
            first, last = seen[0], seen[0] - item["t"] + int(data.lengths[item["episode"]]) - 1
            assert seen == [min(first + stride * k, first + stride * real) for k in range(5)]
            assert real == min(4, (last - first) // stride) > 0
            windows.add((item["episode"], item["t"]))
            if source in LABELLED:
                steps = first + stride * np.arange(real)[:, None] + np.arange(stride)      # raw ones of each
                assert np.allclose(item["actions"][:real, 0], steps.sum(1))                 # changes add up
                half = torch.unique(item["actions"][:real, 6])
                assert set(half.tolist()) <= {0.0, 1.0, -1.0}, "the gripper is not added up"
                assert item["obs"]["proprio"][0] == first
        assert {t for _, t in windows} >= {0, 1} and len(windows) > 5


@pytest.mark.parametrize("source, dirt, texts", [
    ("ssv2", "label differs from its template", ["pushing a stress reliever"]),
    ("ssv2", "label has / and \\", ["pulling a/c remote, a\\c remote"]),
    ("ssv2", "label has a Cyrillic letter", ["holding \u0430 cup"]),
    ("ssv2", "spaces and a line break in the label", ["pushing it"]),
    ("bridge", "two annotations and a confidence line", ["take it", "grab it"]),
    ("bridge", "lang.txt in Mac Roman", ["put the caf\u00e9 there"]),
    ("bridge", "lang.txt without a last newline", ["take it"]),
    ("bridge", "no lang.txt", [""]), ("bridge", "an empty lang.txt", [""]),
    ("libero", "nothing", ["put it away"]), ("libero", "no problem_info: name says it", ["open it"]),
    ("libero", "instruction in quotes", ["turn it on", "quoted"]),
    ("libero", "instruction is a list of words", ["turn it off", "listed"]),
    ("lerobot", "begins in the middle of a video", ["move it", "shove it"]), ("lerobot", "no task", [""]),
    ("realman", "nothing", ["Stack."])])
def test_annotations_are_all_kept_and_cleaned(made, source, dirt, texts):
    name = next(item.name for item in made(source).items if item.dirt == dirt)
    assert annotations_of(made(source).out)[name] == texts


def test_items_are_in_the_order_of_their_numbers(made):
    clips, demos = annotations_of(made("ssv2").out), annotations_of(made("libero").out)
    assert list(clips) == sorted(clips, key=int) != sorted(clips)
    assert [name for name in demos if name.startswith("put_it_away")] == [
        "put_it_away_demo.hdf5/demo_2", "put_it_away_demo.hdf5/demo_10"]


def test_two_processes_write_the_same_bytes_and_check_writes_nothing(made, tmp_path):
    videos = made("videos")
    convert("videos", videos.root, tmp_path / "two", "--workers", "2")
    assert content(tmp_path / "two") == content(videos.out)
    printed, message = convert("videos", videos.root, tmp_path / "none", "--check")
    assert not (tmp_path / "none").exists() and "nothing was written" in message
    assert f"{len(annotations_of(videos.out))} good episodes" in printed


@pytest.mark.parametrize("source, files, flags, words", [
    ("bridge", {}, ["--fraction", "10"], "--fraction 10"),
    ("bridge", {"a.txt": "a"}, [], "no trajectory"),
    ("libero", {}, ["--cameras", "top"], "agentview, wrist"),
    ("realman", {}, [], "takes.json has format None"),
    ("ssv2", {}, [], "expected labels/train.json"),
    ("ssv2", {"train.json": '[{"id": "7"'}, [], "not a JSON file"),
    ("ssv2", {"train.json": '[{"id": "7"}]'}, [], "no id or label"),
    ("ssv2", {"train.json": "[[1, 2], null]"}, [], "no id or label"),
    ("ssv2", {"train.json": '[{"id": "7", "label": "a"}]'}, [], "tar zx"),
    ("videos", {"a.txt": "a"}, [], "no video"),
    *(("videos", {"a.mp4": "", "c.csv": text}, ["--captions", "c.csv"], words) for text, words in (
        ("file,instruction\na.mp4,caf\u00e9\n", "codec can't decode"), ("file,instruction\n", "no rows"),
        ("name,text\na,b\n", "first line is 'name,text'"))),
    ("videos", {"a.mp4": ""}, ["--captions", "c.csv"], "No such file")])
def test_odd_commands_and_odd_input_are_one_line(tmp_path, monkeypatch, source, files, flags, words):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for name, text in files.items():
        Path(name).write_text(text, encoding="latin1")
    message = convert(source, tmp_path / "in", tmp_path / "d", *flags)[1]
    assert message and words in message and "\n" not in message
    assert not (tmp_path / "d").exists()


def test_links_are_followed_once_and_our_own_output_is_not_input(made, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "a_demo.hdf5").write_bytes((made("libero").root / "quoted_demo.hdf5").read_bytes())
    for name, target in (("one", "../else"), ("two", "../else"), ("up", "."), ("out", "..")):
        (root / name).symlink_to(target)
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert convert("libero", root, tmp_path / "else/data", *flags)[1] is None
    assert list(annotations_of(tmp_path / "else/data")) == ["one/a_demo.hdf5/demo_0"]


# ---- Something-Something v2, videos ------------------------------------------------------------------------

def test_other_layouts_of_ssv2(tmp_path):
    """Labels and clips lie side by side, under the names of another release. Nothing usable: no dataset."""
    (tmp_path / "something-something-v2-validation.json").write_text('[{"id": "8", "label": "a"}]')
    write_video(tmp_path / "videos" / "8.webm", [picture(8, t) for t in range(14)])
    message = convert("ssv2", tmp_path, tmp_path / "d", "--min-frames", "99")[1]
    assert "none of the 1 items" in message and "too short" in message
    error(lambda: EpisodeDataset(tmp_path / "d", 1), "half made")
    convert("ssv2", tmp_path, tmp_path / "d", "--overwrite")
    assert annotations_of(tmp_path / "d") == {"8": ["a"]}


def test_frames_are_taken_by_their_times(made):
    """Cuts, trimmed starts and a variable frame rate: each number is the one that is shown at that time."""
    out = made("videos").out
    for name, first, count in (("long.webm@2-4", 20, 20), ("long.mp4@2.05-3.95", 21, 19), ("trim.mp4", 6, 34),
                               ("long.mp4@0-1.5", 0, 15), ("phone.mp4@0-1.5", 0, 18)):
        assert numbers_of(out, name) == list(range(first, first + count)), name
    held = [*range(25), 24, 26, 26, 28, 28, 30, 30, *range(32, 40)]       # the frame before stays
    assert numbers_of(out, "phone.mp4") == held
    assert EpisodeDataset(out, 1).fps == 12


def test_other_files_and_empty_instructions_are_counted(made, tmp_path):
    assert "1 .txt" in made("videos").printed and " 0 have no instruction" in made("videos").printed
    (tmp_path / "c.csv").write_text("file,instruction\nwhole.mp4,\nwhole.mp4,push\nwhole.mp4,shove\n")
    printed, _ = convert("videos", made("videos").root, tmp_path / "d", "--captions", str(tmp_path / "c.csv"))
    assert "1 have no instruction" in printed
    assert annotations_of(tmp_path / "d") == {"whole.mp4": ["", "push", "shove"]}
    (tmp_path / "c.csv").write_text("file,instruction\nwhole.mp4,pull\n")
    message = convert("videos", made("videos").root, tmp_path / "d", "--captions", str(tmp_path / "c.csv"),
                      "--resume")[1]
    assert "was made with captions" in message, "an edited CSV is not silently ignored"


@pytest.mark.parametrize("lands", [-3, 0, 4])
def test_a_seek_may_land_anywhere(lands, monkeypatch):
    """A video at 10 fps whose seeks land some frames early or late, as in odd files."""
    def decode(container, start):
        first = max(0, round(10 * start) + lands) if start else 0
        return (types.SimpleNamespace(time=t / 10, is_corrupt=False) for t in range(first, 60))
    monkeypatch.setattr(prepare_data, "decode", decode)
    for start, end, first, count in ((2.0, 3.0, 20, 10), (2.05, 3.0, 21, 9)):
        frames = list(prepare_data.even_frames(None, 10.0, start, end))
        assert [round(10 * frame.time) for frame in frames] == list(range(first, first + count))


def test_wrong_rows_are_named_up_to_ten(made, tmp_path):
    wrong = ["long.mp4,a,3,2", "long.mp4,a,x,2", "long.mp4,a,1,", "long.mp4,a,0,inf", "longer.mp4,a,0,1"]
    captions = tmp_path / "c.csv"
    captions.write_text("\n".join(["file,instruction,start,end", "whole.mp4,b,,", *wrong, *wrong, *wrong]))
    message = convert("videos", made("videos").root, tmp_path / "d", "--captions", str(captions))[1]
    for words in ("line 3: start '3', end '2'", "line 4: start 'x'", "line 5: start '1', end ''", "'inf'",
                  "line 7: no video 'longer.mp4'", "line 12: no video", "15 errors", "; ..."):
        assert words in message, (words, message)
    assert "line 13" not in message and not (tmp_path / "d").exists()


def test_a_name_that_is_no_text_is_read(made, tmp_path):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/v\xe9.mp4", "wb") as f:
        f.write((made("videos").root / "whole.mp4").read_bytes())
    convert("videos", tmp_path / "in", tmp_path / "d")
    assert outcomes(tmp_path / "d") == {"v\\udce9.mp4": "24 frames"}


def test_frames_are_turned_as_the_file_says(tmp_path):
    """A phone held upright stores its video lying, with a matrix in the track's header."""
    write_video(tmp_path / "a.mp4", [picture(1, t, 50, 84) for t in range(12)], codec="libx264")
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    film, track, rest = (tmp_path / "a.mp4").read_bytes().split(matrix)
    (tmp_path / "b.mp4").write_bytes(film + matrix + track + turned + rest)
    with prepare_data.open_video(str(tmp_path / "b.mp4")) as container:
        seen = list(prepare_data.to_bgr(prepare_data.even_frames(container, 12)))
    capture = cv2.VideoCapture(str(tmp_path / "b.mp4"), cv2.CAP_FFMPEG)
    assert len(seen) == 12 and all(np.array_equal(frame, capture.read()[1]) for frame in seen), "OpenCV's"
    with prepare_data.open_video(str(tmp_path / "a.mp4")) as container:
        lying = next(prepare_data.to_bgr(prepare_data.even_frames(container, 12)))
    assert np.array_equal(seen[0], np.rot90(lying, -1)) and seen[0].shape == (84, 50, 3)


# ---- BridgeData V2 -----------------------------------------------------------------------------------------

def test_no_pickle_was_executed(made):
    assert not made("bridge").executed.exists()
    assert ("unsafe pickle", f"it names {os.system.__module__}.system; nothing in it was run") in (
        rejects_of(made("bridge").out).values())
    assert os.system(f"touch {made('bridge').executed}") == 0 and made("bridge").executed.exists(), (
        "the payload would have worked")
    made("bridge").executed.unlink()


def read_pickle(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    return prepare_data.read_pickle(str(tmp_path / "x.pkl"), "x.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_unpickles_whatever_the_protocol(protocol, tmp_path):
    """Old and new numpy: numpy.core became numpy._core in numpy 2."""
    rows = np.arange(14.0).reshape(2, 7)
    data = {"rows": rows, "float": np.float32(3), "list": [1, "a", None, True, (2.5,)], "bytes": b"\xff",
            "columns": np.asfortranarray(rows), "half": rows.astype(">f4"), "ints": rows.astype(np.int64),
            "view": rows[:, ::2], "order": collections.OrderedDict(a=1), "text": np.array(["a"])}
    stored = pickle.dumps(data, protocol)
    for version in (stored, stored.replace(b"numpy._core", b"numpy.core") if protocol < 4 else stored):
        back = read_pickle(tmp_path, version)
        assert back.keys() == data.keys() and back["list"] == data["list"] and back["bytes"] == b"\xff"
        for key in ("rows", "float", "columns", "half", "ints", "view", "text"):
            assert np.array_equal(back[key], data[key]), key


def test_a_pickle_cannot_make_numpy_read_where_it_likes(tmp_path):
    """Bytes of an array of objects, overwritten through a second array: numpy would follow the pointer."""
    ndarray = b"cnumpy\nndarray\n"
    objects = ndarray + b"((K\x01tX\x01\x00\x00\x00OtRq\x01"                     # ndarray((1,), "O")
    view = ndarray + b"((K\x08tX\x02\x00\x00\x00u1h\x01tRq\x02"                 # ndarray((8,), "u1", objects)
    write = b"".join(b"K" + bytes([i]) + b"K\x41s" for i in range(8))               # view[i] = 0x41
    with pytest.raises(Reject, match="damaged pickle"):
        read_pickle(tmp_path, b"\x80\x02" + objects + b"0" + view + write + b"0h\x01.")
    before = np.zeros(1).__reduce_ex__(5)[0].__defaults__
    build = b"\x80\x02cnumpy._core.numeric\n_frombuffer\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    read_pickle(tmp_path, build)                           # BUILD writes into what it is given: not numpy's
    assert np.zeros(1).__reduce_ex__(5)[0].__defaults__ == before


def test_a_dangling_link_is_one_reject_and_a_dated_folder_may_be_the_input(made, tmp_path):
    for e, item in enumerate(made("bridge").items[:2]):
        shutil.copytree(made("bridge").root / item.name, tmp_path / "in" / "raw" / "traj_group0" / f"traj{e}")
    image = tmp_path / "in/raw/traj_group0/traj0/images0/im_5.jpg"
    image.unlink()
    image.symlink_to("nowhere")
    convert("bridge", tmp_path / "in", tmp_path / "d")
    assert sorted(outcomes(tmp_path / "d").values()) == ["14 frames", "unreadable"]
    item = next(item for item in made("bridge").items if item.dirt.startswith("before 2021-07-23"))
    convert("bridge", made("bridge").root / item.name.split("/raw/traj")[0], tmp_path / "dated")
    assert list(outcomes(tmp_path / "dated").values()) == ["13 frames"], "the date in the path above counts"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bridge_from_the_zip_is_bridge_from_the_folder(made, tmp_path, compression):
    """Also with a comment and what macOS adds. A damaged member is a reject, a cut zip one line."""
    path, name = tmp_path / "demos.zip", made("bridge").items[0].name
    dirty_data.zip_tree(made("bridge").root, path, compression)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment after the directory" + bytes(30)
        archive.writestr(f"__MACOSX/{name}/lang.txt", b"x")
        member = archive.getinfo(f"{name}/images0/im_3.jpg")
    convert("bridge", path, tmp_path / "d", "--workers", "2")
    zipped, unpacked = content(tmp_path / "d"), content(made("bridge").out)
    for (file, one), (_, two) in zip(sorted(zipped.items()), sorted(unpacked.items()), strict=True):
        assert one == two or file == "arguments.json", file
    data = bytearray(path.read_bytes())
    data[member.header_offset + 200] ^= 255
    path.write_bytes(data)
    convert("bridge", path, tmp_path / "damaged")
    assert outcomes(tmp_path / "damaged")[name] == "damaged in the zip"
    path.write_bytes(data[:-5000])
    assert "is not a whole zip" in convert("bridge", path, tmp_path / "e")[1]
    assert not (tmp_path / "e").exists()


def test_a_zip_of_more_than_4_gib_is_read(tmp_path):
    """zip64: offsets beyond 32 bits. The file is sparse, it takes no room."""
    path = tmp_path / "big.zip"
    with open(path, "wb") as f:
        f.seek(5 * 2 ** 30)
        with zipfile.ZipFile(f, "w") as archive:
            for i in range(3):
                archive.writestr(f"a/2022-01-01_00-00-00/raw/traj_group0/traj{i}/lang.txt", f"text {i}")
    found = prepare_data.zip_trajectories(str(path))
    texts = [prepare_data.read_bytes(files["lang.txt"]) for files in found.values()]
    assert texts == [b"text 0", b"text 1", b"text 2"]


def test_cameras_of_bridge_are_found_by_folder_or_by_name(made, tmp_path):
    name = next(item.name for item in made("bridge").items if item.dirt.startswith("a wrist camera"))
    for k, flag in enumerate(("front,wrist", "images1,front")):
        convert("bridge", made("bridge").root, tmp_path / str(k), "--cameras", flag)
        data = EpisodeDataset(tmp_path / str(k), 1)
        assert list(annotations_of(tmp_path / str(k))) == [name] and data.cameras == flag.split(",")
        seen = {camera: read_picture(data[0]["obs"]["images"][camera])[0] for camera in data.cameras}
        assert max(seen, key=seen.get) == ("wrist" if k == 0 else "images1")
    assert "no such camera" in dict(rejects_of(tmp_path / "0").values())


# ---- LIBERO ------------------------------------------------------------------------------------------------

def test_demonstrations_that_fail_are_rejected_unless_asked_for(made, tmp_path):
    """Those of a task in which none succeeds, too: each is named and counted, none vanishes."""
    failed = {item.name for item in made("libero").items if item.expected == "no success"}
    assert len(failed) == 3 and "  no success" in made("libero").printed
    convert("libero", made("libero").root, tmp_path / "d", "--keep-failures")
    assert failed <= set(annotations_of(tmp_path / "d"))


def test_no_ops_are_dropped_with_their_frames(tmp_path):
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "x_demo.hdf5", "w") as f:
        data = f.create_group("data")
        for e, still in ((1, [3, 4, 9]), (2, range(16))):
            def stop(actions, still=still):
                actions[list(still), :6] = 0
                actions[:, 6] = -1
                return actions
            dirty_data.libero_demo(data, f"demo_{e}", e, actions=stop)
    convert("libero", tmp_path / "in", tmp_path / "d", "--drop-noops")
    data = EpisodeDataset(tmp_path / "d", 1, future=1)
    assert data.lengths.tolist() == [13]
    for item in data:                     # what is left still lines up
        assert read_picture(item["frames"][0])[1] == item["actions"][0, 0] == item["obs"]["proprio"][0]
        assert item["actions"][0, 0] not in (3, 4, 9)
    assert [*dict(rejects_of(tmp_path / "d").values())] == ["nothing but no-ops"]


def test_states_without_images_ask_for_the_simulator_and_that_for_its_assets(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "x_demo.hdf5", "w") as f:
        dirty_data.libero_demo(f.create_group("data"), "demo_0", 1, **{"obs/agentview_rgb": None})
    message = convert("libero", tmp_path / "x_demo.hdf5", tmp_path / "d")[1]
    assert "holds states but no images" in message and "--render" in message
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    error(lambda: prepare_data.import_libero(str(tmp_path)),
          str(tmp_path), "--libero-assets", "LIBERO_ASSETS")


def test_axis_angle_is_continuous_where_the_hand_points_down():
    angle = np.linspace(np.pi - 0.3, np.pi + 0.3, 50)
    quaternion = np.stack([np.sin(angle / 2), 0 * angle, 0 * angle, np.cos(angle / 2)], 1)
    assert np.allclose(prepare_data.axis_angle(quaternion)[:, 0], angle)
    assert np.array_equal(prepare_data.axis_angle(np.array([[0.0, 0, 0, 1]])), np.zeros((1, 3)))


# ---- LeRobot, Realman --------------------------------------------------------------------------------------

def test_lerobot_attributes_tasks_and_flags(made, tmp_path):
    data = EpisodeDataset(made("lerobot").out, 1)
    assert data.cameras == ["front", "wrist"], "the depth camera is left out"
    assert data.attrs["action"]["names"][0] == "x" and data.attrs["action"]["delta"] == prepare_data.CHANGES
    assert "frame 8" in dict(rejects_of(made("lerobot").out).values())["several tasks"]
    convert("lerobot", made("lerobot").root, tmp_path / "d", "--action-kind", "absolute", "--flip", "both",
            "--cameras", "front")
    data = EpisodeDataset(tmp_path / "d", 5)
    item = data[int(data.lengths[0]) - 2]                                  # one step before the end
    assert item["is_pad"].tolist() == [False, True, True, True, True]
    assert torch.equal(item["actions"][1], item["actions"][0]), "absolute actions hold their last value"
    assert data.cameras == ["front"] and data.attrs["flip"] == "both"
    assert read_picture(data[3]["obs"]["images"]["front"].flip(1, 2)) == (0, 3)


def test_a_lerobot_task_may_be_a_plain_string(made, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    shutil.copytree(made("lerobot").root, tmp_path / "in")
    for path in tmp_path.glob("in/meta/episodes/*/*.parquet"):
        table = parquet.read_table(path)
        i = table.column_names.index("tasks")
        parquet.write_table(table.set_column(i, "tasks", [["move it"] * len(table)]), path)
    convert("lerobot", tmp_path / "in", tmp_path / "d")
    assert EpisodeDataset(tmp_path / "d", 1).instructions == ["move it"]


def test_odd_lerobot_metadata_is_one_line(made, tmp_path, monkeypatch):
    shutil.copytree(made("lerobot").root / "meta", tmp_path / "meta")
    info, good = tmp_path / "meta" / "info.json", dirty_data.LEROBOT_INFO
    odd = {"fps": 0}, {"fps": -10}, {"features": {}}, {"codebase_version": "v2.1"}, {"data_path": None}
    for text in (*(good | o for o in odd), [], good | {"features": {"action": {"shape": [7]}}}):
        info.write_text(json.dumps(text))
        assert "convert_dataset_v21_to_v30" in convert("lerobot", tmp_path, tmp_path / "d")[1], text
    info.write_text(json.dumps(good))
    message = convert("lerobot", tmp_path, tmp_path / "d", "--cameras", "top")[1]
    assert "top: " in message and message.endswith("has front, wrist")
    (tmp_path / "meta/episodes/chunk-000/file-001.parquet").write_bytes(b"PAR1")
    assert "meta/episodes is not as expected" in convert("lerobot", tmp_path, tmp_path / "d")[1]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in convert("lerobot", tmp_path, tmp_path / "d")[1]


def test_takes_keep_what_the_arm_says_about_them(made):
    data = EpisodeDataset(made("realman").out, 1)
    assert data.attrs["action"] == prepare_data.ACTION and data.fps == 20
    assert data.cameras == ["front", "side"]


# ---- mixtures ----------------------------------------------------------------------------------------------

def test_a_mixture_draws_by_weight_and_spans_the_same_time(made):
    paths = [made("bridge").out, made("ssv2").out]
    mix = Mixture(paths, 4, cameras=1, future=1, labels=())
    assert [part.stride for part in mix.parts] == [1, 2], "5 and 12 frames per second"
    assert len(mix) == sum(len(part) for part in mix.parts)
    again = Mixture(paths, 4, cameras=1, future=1, labels=())
    assert mix.draw(np.random.default_rng(0), 400) == again.draw(np.random.default_rng(0), 400)
    weighted = Mixture(paths, 4, weights=[3, 1], cameras=1, future=1, labels=())
    first = np.mean(np.array(weighted.draw(np.random.default_rng(0), 4000)) < len(weighted.parts[0]))
    assert abs(first - 0.75) < 0.03 and weighted.shares() == [0.75, 0.25]
    batch = torch.utils.data.default_collate([mix[0], mix[len(mix) - 1]])   # one of each
    assert batch["frames"].shape[1] == 5 and set(batch["obs"]["images"]) == {"front"}
    assert "actions" not in batch and "proprio" not in batch["obs"]
    assert batch["episode"][0] < len(mix.parts[0].lengths) <= batch["episode"][1]
    assert [mix.instructions[i] for i in batch["instruction_id"]] == batch["obs"]["instruction"]
    assert mix.attrs["mixture"][1]["stride"] == 2
    assert mix.fingerprint not in [p.fingerprint for p in mix.parts]


def test_a_mixture_of_one_is_that_dataset(made):
    path = made("bridge").out
    mix, data = Mixture([path], 4, split="train"), EpisodeDataset(path, 4, split="train")
    assert len(mix) == len(data) and mix.fingerprint == data.fingerprint
    drawn = np.random.default_rng(3).integers(len(data), size=9).tolist()
    assert mix.draw(np.random.default_rng(3), 9) == drawn
    for a, b in ((mix[5], data[5]), (mix[len(mix) - 1], data[len(data) - 1])):
        assert torch.equal(a["actions"], b["actions"]) and a["episode"] == b["episode"]
    assert all(np.array_equal(mix.limits("actions")[k], data.limits("actions")[k]) for k in ("min", "max"))
    coarse = Mixture([path], 1, strides=[13], split="all")                # some episodes are shorter
    assert coarse.limits("actions")["max"][0] == sum(range(13))


def test_mixing_what_does_not_agree_is_refused(made):
    bridge, libero, video = (made(source).out for source in ("bridge", "libero", "ssv2"))
    error(lambda: Mixture([bridge, video], 4), "of actions", "None")
    error(lambda: Mixture([bridge, libero], 3, cameras=1), "frame of actions")
    error(lambda: Mixture([bridge, libero], 3, labels=()), "number of cameras")
    error(lambda: Mixture([bridge, video], 4, weights=[1]), "--weights", "2 datasets")
    error(lambda: Mixture([bridge, video], 4, strides=[1, 2, 3]), "--strides")
    error(lambda: Mixture([bridge, video], 4, weights=[0, 0]), "not all 0")
    error(lambda: Mixture([bridge, video], 4, strides=[1, 0], labels=()), "stride of 0")
    error(lambda: EpisodeDataset(bridge, 5, stride=3), "chunk of 5", "at stride 3")
