"""Claims of the converters: dirt is named and never becomes data, and action k stands beside frame k."""
import collections
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import dirty_data
import finetune
import prepare_data
import pretrain
from conftest import metrics
from dirty_data import SIZE, convert, outcomes, read_picture, table
from models import InputError, load_checkpoint
from prepare_data import EpisodeDataset, Mixture, Reject
from test_prepare_data import content, error, wait_for

ROOT = Path(__file__).resolve().parent.parent
LABELLED = ("bridge", "libero", "lerobot")


def needs_readers(source):
    if source == "lerobot":
        pytest.importorskip("pyarrow", reason="LeRobot's tables need: pip install pyarrow av")
        pytest.importorskip("av", reason="LeRobot's videos need: pip install pyarrow av")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(source): its dirty tree, converted once -> what dirty_data.table returns, and the folders."""
    folder, done = tmp_path_factory.mktemp("dirty"), {}

    def make(source):
        needs_readers(source)
        if source not in done:
            done[source] = types.SimpleNamespace(
                **dict(zip(("items", "came", "others", "printed", "message"), table(source, folder))),
                root=folder / source, out=folder / f"{source}_data", executed=folder / "executed")
        return done[source]
    return make


def names_of(out):
    """Names of the episodes of a dataset, in order."""
    names = []
    for path in sorted(Path(out).glob("*.h5")):
        with h5py.File(path) as f:
            names += list(f["name"].asstr()[:])
    return names


def annotations_of(out):
    """{name: annotations}."""
    result = {}
    for path in sorted(Path(out).glob("*.h5")):
        with h5py.File(path) as f:
            result |= dict(zip(f["name"].asstr()[:], map(json.loads, f["instruction"].asstr()[:])))
    return result


# ---- dirt --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", dirty_data.MAKERS)
def test_every_dirty_item_is_kept_or_named_as_the_table_says(made, source):
    result = made(source)
    wrong = [(item, result.came[item.name]) for item in result.items
             if result.came[item.name] not in item.expected.split(" or ")]
    assert not wrong and not result.others
    assert " of all items rejected" in result.message, "more than 5 % rejected is an error in the end"
    table = [line for line in result.printed.splitlines() if line[:10].strip().isdigit()]
    reasons = {line.split(maxsplit=1)[1] for line in table}
    assert reasons == set(json.loads(line)["reason"] for line in open(result.out / "rejects.jsonl"))


@pytest.mark.parametrize("source", dirty_data.MAKERS)
def test_action_k_stands_beside_frame_k_in_every_window(made, source):
    """Pixels count frames, actions and states count steps: all the same number, at every stride."""
    out, names = made(source).out, names_of(made(source).out)
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


@pytest.mark.parametrize("source", dirty_data.MAKERS)
def test_two_processes_write_the_same_bytes(made, source, tmp_path):
    convert(source, made(source).root, tmp_path / "two", "--workers", "2")
    assert content(tmp_path / "two") == content(made(source).out)


@pytest.mark.parametrize("source", dirty_data.MAKERS)
def test_check_reads_everything_and_writes_nothing(made, source, tmp_path):
    printed, message = convert(source, made(source).root, tmp_path / "none", "--check")
    assert not (tmp_path / "none").exists() and "nothing was written" in message
    assert f"{len(names_of(made(source).out))} good episodes" in printed


@pytest.mark.parametrize("source", dirty_data.MAKERS)
def test_the_output_trains(made, source, tmp_path):
    flags = ["--smoke", "--data", str(made(source).out), "--device", "cpu"]
    pretrain.main([*flags, "--probe-data", "none", "--out", str(tmp_path / "a")])
    assert np.isfinite(metrics(tmp_path / "a")[-1]["shuffle_ratio"])
    if source in LABELLED:
        finetune.main([*flags, "--init", str(tmp_path / "a" / "last.pt"), "--out", str(tmp_path / "b")])
        assert np.isfinite([line["loss"] for line in metrics(tmp_path / "b") if "loss" in line]).all()


def test_100_clips_killed_in_between_end_in_the_same_bytes(tmp_path):
    """1 process, 2 processes, and 2 processes killed (-9) after some shards: the same datasets."""
    root = tmp_path / "ssv2"
    clips = root / "20bn-something-something-v2"
    for i in range(1, 101):
        dirty_data.write_video(clips / f"{i}.webm", [dirty_data.picture(i, t) for t in range(16)])
    (root / "labels").mkdir()
    (root / "labels" / "train.json").write_text(json.dumps([{"id": str(i), "label": f"do {i % 7}"}
                                                            for i in range(1, 101)]))
    script = tmp_path / "run.py"
    script.write_text("import sys, prepare_data as p\nif __name__ == '__main__':\n"
                      "    p.SOURCES['ssv2'] = p.SOURCES['ssv2']._replace(shard=10)\n"
                      "    p.main(sys.argv[1:])\n")

    def start(out, *flags):
        return subprocess.Popen(
            [sys.executable, str(script), "ssv2", "--input", str(root), "--out", str(tmp_path / out),
             "--image-size", "64", *flags], env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert start("one", "--workers", "1").wait() == 0 and start("two", "--workers", "2").wait() == 0
    process = start("killed", "--workers", "2")
    wait_for(lambda: len(list((tmp_path / "killed").glob("*.h5"))) >= 2)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.h5")}
    assert 2 <= len(before) and not (tmp_path / "killed" / "dataset.json").exists()
    assert start("killed", "--workers", "2", "--resume").wait() == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "finished shards stay"
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "killed")
    assert len(content(tmp_path / "one")) == 13


def test_odd_commands_are_one_line(made, tmp_path):
    libero, bridge = made("libero").root, made("bridge").root
    (tmp_path / "excel.csv").write_bytes("file,instruction\nwhole.mp4,caf\u00e9\n".encode("cp1252"))
    (tmp_path / "heading.csv").write_text("file,instruction\n")
    (tmp_path / "null.json").write_text("null")
    ssv2 = tmp_path / "ssv2"
    (ssv2 / "labels").mkdir(parents=True)
    (ssv2 / "labels" / "train.json").write_text("[[1, 2], null]")
    for source, root, flags, words in (
            ("bridge", bridge, ["--fraction", "10"], "--fraction 10"),
            ("bridge", bridge, ["--cameras", "front,front"], "different names"),
            ("libero", libero, ["--cameras", "top"], "agentview, wrist"),
            ("videos", made("videos").root, ["--captions", str(tmp_path / "excel.csv")], "UTF-8"),
            ("videos", made("videos").root, ["--captions", str(tmp_path / "heading.csv")], "no row"),
            ("ssv2", ssv2, [], "has no id or no label"),
            ("bridge", tmp_path / "null.json", [], "is not a whole zip")):
        message = convert(source, root, tmp_path / "d", *flags)[1]
        assert message and words in message and "\n" not in message, (source, flags, message)
    assert not (tmp_path / "d").exists()


def test_links_are_followed_once(made, tmp_path):
    """A linked folder counts; a link back up, or a second one to the same place, makes no second copy."""
    (tmp_path / "in").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "a.mp4").write_bytes((made("videos").root / "whole.mp4").read_bytes())
    for name, target in (("one", "../else"), ("two", "../else"), ("up", "."), ("out", "..")):
        (tmp_path / "in" / name).symlink_to(target)
    found = [os.path.join(folder, name) for folder, _, names in prepare_data.walk(tmp_path / "in")
             for name in names]
    assert len(found) == 1 and found[0].endswith("a.mp4")


def test_our_own_output_below_the_input_is_not_taken_for_input(made, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a_demo.hdf5").write_bytes((made("libero").root / "quoted_demo.hdf5").read_bytes())
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert convert("libero", root, root / "out", *flags)[1] is None
    assert names_of(root / "out") == ["a_demo.hdf5/demo_0"]


def test_a_file_name_that_is_no_text_is_named_and_ends_nothing(made, tmp_path):
    (tmp_path / "in").mkdir()
    for name in (b"v\xe9.mp4", b"good.mp4"):
        with open(os.path.join(os.fsencode(tmp_path), b"in", name), "wb") as f:
            f.write((made("videos").root / "whole.mp4").read_bytes())
    with pytest.raises(InputError, match="50 %"):
        prepare_data.main(["videos", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "d"),
                           "--workers", "1", "--image-size", "32"])
    assert outcomes(tmp_path / "d") == {"good.mp4": "24 frames", "v\\udce9.mp4": "odd file name"}


def test_a_cut_shard_is_named_when_the_run_goes_on(made, tmp_path):
    convert("bridge", made("bridge").root, tmp_path / "d")
    (tmp_path / "d" / "dataset.json").unlink()
    (tmp_path / "d" / "00000.h5").write_bytes((tmp_path / "d" / "00000.h5").read_bytes()[:1000])
    message = convert("bridge", made("bridge").root, tmp_path / "d", "--resume")[1]
    assert "00000.h5 cannot be read" in message and "delete it" in message
    (tmp_path / "d" / "00000.h5").unlink()
    convert("bridge", made("bridge").root, tmp_path / "d", "--resume")
    assert content(tmp_path / "d") == content(made("bridge").out)


# ---- Something-Something v2 --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, head, words", [
    ("20bn-something-something-v2-00.zip", b"PK\3\4", "still zipped"),
    ("20bn-something-something-v2-00", b"PK\3\4", "still zipped"),          # the API serves zips without .zip
    ("20bn-something-something-v2-00", b"\x1f\x8b\x08\0", "in 2 parts of one archive"),
    ("20bn-something-something-v2-01", b"\x9a\x12\x33\x44", "fetch part 00"),
    ("20bn-something-something-v2-00", b"\x1a\x45\xdf\xa3", "a clip without its ending")])
def test_archive_parts_are_told_by_their_first_bytes(tmp_path, name, head, words):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "train.json").write_text('[{"id": "1", "label": "a"}]')
    (tmp_path / "20bn-something-something-download-package-labels.zip").write_bytes(b"PK\3\4")
    (tmp_path / name).write_bytes(head + bytes(50))
    (tmp_path / "20bn-something-something-v2-19").write_bytes(bytes(50))
    message = error(lambda: prepare_data.main(["ssv2", "--input", str(tmp_path)]), words, name)
    assert "tar zx" in message or "a clip" in words


def test_the_label_is_kept_as_written(made):
    texts = annotations_of(made("ssv2").out)
    assert texts["3"] == ["pushing a stress reliever"] and texts["7"] == ["pushing it"]
    assert texts["4"] == ["pulling a/c remote, a\\c remote"] and texts["5"] == ["holding \u0430 cup"]


# ---- videos ------------------------------------------------------------------------------------------------

def test_clips_are_cut_where_the_csv_says_and_stride_thins_them(made, tmp_path):
    out, root = tmp_path / "thin", made("videos").root
    convert("videos", root, out, "--stride", "3", "--min-frames", "5")
    data, names = EpisodeDataset(out, 1), names_of(out)
    for name, first, count in (("long.webm@2-4", 20, 7), ("long.mp4@2.05-3.95", 21,
                               7), ("long.mp4@0-1.5", 0, 5), ("whole.mp4", 0, 8)):
        episode = names.index(name)
        frames = data.read_frames(episode, "front", 0, data.lengths[episode])
        assert [read_picture(frame)[1] for frame in frames] == [first + 3 * k for k in range(count)]
    assert data.fps == pytest.approx(10 / 3)


@pytest.mark.parametrize("lands", [-3, 0, 4])
def test_the_frames_times_decide_wherever_a_seek_lands(lands):
    """A capture at 10 fps whose seeks land some frames early or late, as in odd files."""
    class Capture:
        at, shown = 0, None

        def set(self, what, milliseconds):
            self.at = max(0, round(milliseconds / 100) + (lands if milliseconds else 0))

        def grab(self):
            self.shown, self.at = self.at, self.at + 1
            return self.shown < 60

        def get(self, what):
            return 100.0 * self.shown

        def retrieve(self):
            return True, self.shown
    assert list(prepare_data.video_frames(Capture(), 10.0, 2.0, 3.0, 1)) == list(range(20, 30))
    assert list(prepare_data.video_frames(Capture(), 10.0, 2.05, 3.0, 4)) == [21, 25, 29]


@pytest.mark.parametrize("row, words", [("long.mp4,a,3,2", "0 <= start < end"), ("long.mp4,a,x,2", "'x'"),
                                        ("long.mp4,a,1,", "0 <= start < end"), ("long.mp4,a,0,inf", "'inf'"),
                                        ("longer.mp4,a,0,1", "no video 'longer.mp4'")])
def test_times_that_make_no_sense_are_named_with_their_line(made, tmp_path, row, words):
    captions = tmp_path / "c.csv"
    captions.write_text(f"file,instruction,start,end\nwhole.mp4,b,,\n{row}\n")
    message = convert("videos", made("videos").root, tmp_path / "d", "--captions", str(captions))[1]
    assert words in message and "line 3" in message and not (tmp_path / "d").exists()


# ---- BridgeData V2 -----------------------------------------------------------------------------------------

def test_no_pickle_was_executed(made):
    assert "unsafe pickle" in made("bridge").came.values() and not made("bridge").executed.exists()
    lines = [json.loads(line) for line in open(made("bridge").out / "rejects.jsonl")]
    details = [line["detail"] for line in lines if line["reason"] == "unsafe pickle"]
    assert f"policy_out.pkl: it names {os.system.__module__}.system; nothing in it was run" in details
    assert os.system(f"touch {made('bridge').executed}") == 0 and made("bridge").executed.exists(), (
        "the payload would have worked")
    made("bridge").executed.unlink()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_unpickles_whatever_the_protocol(protocol):
    rows = np.arange(14.0).reshape(2, 7)
    data = {"rows": rows, "float": np.float32(3), "list": [1, "a", None, True, (2.5,)], "bytes": b"\xff",
            "columns": np.asfortranarray(rows), "half": rows.astype(">f4"), "ints": rows.astype(np.int64),
            "view": rows[:, ::2], "order": collections.OrderedDict(a=1), "text": np.array(["a"]),
            "objects": np.array([{"a": 1}, None])}
    back = prepare_data.read_pickle(pickle.dumps(data, protocol), "x.pkl")
    assert back.keys() == data.keys() and back["list"] == data["list"] and back["bytes"] == b"\xff"
    for key in ("rows", "float", "columns", "half", "ints", "view"):
        assert np.array_equal(prepare_data.as_array(back[key]), data[key]), key
    assert np.array_equal(prepare_data.as_array([list(rows[0]), rows[1]]), rows)
    for key in ("text", "objects"):                        # nobody asks for them; who does gets no array
        with pytest.raises((ValueError, TypeError, LookupError)):
            prepare_data.as_array(back[key])


def test_pickles_of_old_numpy_load():
    """numpy.core became numpy._core in numpy 2: files written before name the old one."""
    data = pickle.dumps(np.arange(3.0), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert np.array_equal(prepare_data.as_array(prepare_data.read_pickle(data, "x.pkl")), np.arange(3.0))


def test_a_pickle_cannot_make_numpy_read_where_it_likes():
    """Bytes of an array of objects, overwritten through a second array: numpy would follow the pointer."""
    ndarray = b"cnumpy\nndarray\n"
    objects = ndarray + b"((K\x01tX\x01\x00\x00\x00OtRq\x01"                     # ndarray((1,), "O")
    view = ndarray + b"((K\x08tX\x02\x00\x00\x00u1h\x01tRq\x02"                 # ndarray((8,), "u1", objects)
    write = b"".join(b"K" + bytes([i]) + b"K\x41s" for i in range(8))               # view[i] = 0x41
    with pytest.raises(Reject, match="damaged pickle"):
        prepare_data.read_pickle(b"\x80\x02" + objects + b"0" + view + write + b"0h\x01.", "x.pkl")
    back = prepare_data.read_pickle(b"\x80\x02" + objects + b".", "x.pkl")
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
        prepare_data.as_array(back)
    before = np.zeros(1).__reduce_ex__(5)[0].__defaults__
    build = b"\x80\x02cnumpy._core.numeric\n_frombuffer\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    prepare_data.read_pickle(build, "x.pkl")               # BUILD writes into what it is given: not numpy's
    assert np.zeros(1).__reduce_ex__(5)[0].__defaults__ == before


def test_a_dangling_link_is_one_reject(made, tmp_path):
    for e, item in enumerate(made("bridge").items[:2]):
        shutil.copytree(made("bridge").root / item.name, tmp_path / "in" / "raw" / "traj_group0" / f"traj{e}")
    image = tmp_path / "in/raw/traj_group0/traj0/images0/im_5.jpg"
    image.unlink()
    image.symlink_to("nowhere")
    convert("bridge", tmp_path / "in", tmp_path / "d")
    assert sorted(outcomes(tmp_path / "d").values()) == ["14 frames", "unreadable"]


def test_annotations_are_all_kept_and_cleaned(made):
    dirt = {item.dirt: item.name for item in made("bridge").items}
    texts = annotations_of(made("bridge").out)
    assert texts[dirt["two annotations and a confidence line"]] == ["take it", "grab it"]
    assert texts[dirt["lang.txt in Mac Roman"]] == ["put the caf\u00e9 there"]
    assert texts[dirt["lang.txt without a last newline"]] == ["take it"], "not 'take i'"
    assert texts[dirt["no lang.txt"]] == texts[dirt["an empty lang.txt"]] == [""]


def test_the_date_counts_also_when_the_dated_folder_itself_is_the_input(made, tmp_path):
    item = next(item for item in made("bridge").items if item.dirt.startswith("before 2021-07-23"))
    convert("bridge", made("bridge").root / item.name.split("/raw/traj")[0], tmp_path / "d")
    assert list(outcomes(tmp_path / "d").values()) == ["13 frames"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bridge_from_the_zip_is_bridge_from_the_folder(made, tmp_path, compression):
    root = made("bridge").root
    dirty_data.zip_tree(root, tmp_path / "demos.zip", compression)
    convert("bridge", tmp_path / "demos.zip", tmp_path / "d")
    zipped, unpacked = content(tmp_path / "d"), content(made("bridge").out)
    assert zipped["rejects.jsonl"] == unpacked["rejects.jsonl"]
    for (name, one), (_, two) in zip(sorted(zipped.items()), sorted(unpacked.items()), strict=True):
        assert one == two or name == "arguments.json", name


def test_damage_inside_a_zip_is_named_by_the_member(made, tmp_path):
    path = tmp_path / "demos.zip"
    dirty_data.zip_tree(made("bridge").root, path, zipfile.ZIP_STORED)
    name = made("bridge").items[0].name
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}/images0/im_3.jpg")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 200] ^= 255
    path.write_bytes(data)
    convert("bridge", path, tmp_path / "d")
    assert outcomes(tmp_path / "d")[name] == "damaged in the zip"
    path.write_bytes(data[:-5000])
    message = convert("bridge", path, tmp_path / "e")[1]
    assert "is not a whole zip" in message and not (tmp_path / "e").exists()


def test_what_macos_adds_and_a_comment_are_no_trajectories(made, tmp_path):
    path, name = tmp_path / "demos.zip", made("bridge").items[0].name
    dirty_data.zip_tree(made("bridge").root, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"not the end PK\5\6 yet" + bytes(30)
        archive.writestr(f"__MACOSX/{name}/._lang.txt", b"x")
        archive.writestr(f"__MACOSX/{name}/lang.txt", b"x")
    found = prepare_data.zip_trajectories(str(path))
    assert name in found and len(found) == len(made("bridge").items) and not any("MACOSX" in n for n in found)
    path.write_bytes(path.read_bytes()[:-7])
    error(lambda: prepare_data.zip_trajectories(str(path)), "not a whole zip")


def test_a_zip_of_more_than_4_gib_is_read(tmp_path):
    """zip64: offsets beyond 32 bits. The file is sparse, it takes no room."""
    path = tmp_path / "big.zip"
    with open(path, "wb") as f:
        f.seek(5 * 2 ** 30)
        with zipfile.ZipFile(f, "w") as archive:
            for i in range(3):
                archive.writestr(f"a/2022-01-01_00-00-00/raw/traj_group0/traj{i}/lang.txt", f"text {i}")
    found = prepare_data.zip_trajectories(str(path))
    assert [files()["lang.txt"]() for files in found.values()] == [b"text 0", b"text 1", b"text 2"]


def test_cameras_of_bridge_are_found_by_folder_or_by_name(made, tmp_path):
    name = next(item.name for item in made("bridge").items if item.dirt.startswith("a wrist camera"))
    for k, flag in enumerate(("front,wrist", "images1,front")):
        convert("bridge", made("bridge").root, tmp_path / str(k), "--cameras", flag)
        data = EpisodeDataset(tmp_path / str(k), 1)
        assert names_of(tmp_path / str(k)) == [name] and data.cameras == flag.split(",")
        seen = {camera: read_picture(data[0]["obs"]["images"][camera])[0] for camera in data.cameras}
        assert max(seen, key=seen.get) == ("wrist" if k == 0 else "images1")
    reasons = {json.loads(line)["reason"] for line in open(tmp_path / "0" / "rejects.jsonl")}
    assert "no such camera" in reasons


# ---- LIBERO ------------------------------------------------------------

def test_libero_demos_keep_their_numeric_order_and_instructions(made):
    names, texts = names_of(made("libero").out), annotations_of(made("libero").out)
    mine = [name for name in names if name.startswith("put_it_away")]
    assert mine == ["put_it_away_demo.hdf5/demo_2", "put_it_away_demo.hdf5/demo_10"]
    assert texts[mine[0]] == ["put it away"]
    assert texts["KITCHEN_SCENE1_open_it_demo.hdf5/demo_0"] == ["open it"]
    assert texts["quoted_demo.hdf5/demo_0"] == ["turn it on", "quoted"]
    assert texts["listed_demo.hdf5/demo_0"] == ["turn it off", "listed"]


def test_failures_are_left_out_but_never_a_whole_task(made, tmp_path):
    printed = made("libero").printed
    assert "processed_demo.hdf5: 1 of 2 demonstrations left out" in printed
    assert "all_failed_demo.hdf5: none of the 2 demonstrations succeeds" in printed and "KEPT" in printed
    convert("libero", made("libero").root, tmp_path / "d", "--keep-failures")
    assert "processed_demo.hdf5/demo_1" in names_of(tmp_path / "d")


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
    convert("libero", tmp_path / "in", tmp_path / "all")
    assert EpisodeDataset(tmp_path / "all", 1).lengths.tolist() == [16, 16]
    convert("libero", tmp_path / "in", tmp_path / "d", "--drop-noops")
    data = EpisodeDataset(tmp_path / "d", 1, future=1)
    assert data.lengths.tolist() == [13]
    for item in data:                     # what is left still lines up
        assert read_picture(item["frames"][0])[1] == item["actions"][0, 0] == item["obs"]["proprio"][0]
        assert item["actions"][0, 0] not in (3, 4, 9)
    reasons = [json.loads(line)["reason"] for line in open(tmp_path / "d" / "rejects.jsonl")]
    assert reasons == ["nothing but no-ops"]


def test_states_without_images_ask_for_the_simulator(tmp_path):
    with h5py.File(tmp_path / "x_demo.hdf5", "w") as f:
        dirty_data.libero_demo(f.create_group("data"), "demo_0", 1, **{"obs/agentview_rgb": None})
    message = convert("libero", tmp_path / "x_demo.hdf5", tmp_path / "d")[1]
    assert "holds states but no images" in message and "--render" in message


def test_axis_angle_is_continuous_where_the_hand_points_down():
    angle = np.linspace(np.pi - 0.3, np.pi + 0.3, 50)
    quaternion = np.stack([np.sin(angle / 2), 0 * angle, 0 * angle, np.cos(angle / 2)], 1)
    assert np.allclose(prepare_data.axis_angle(quaternion)[:, 0], angle)
    assert np.array_equal(prepare_data.axis_angle(np.array([[0.0, 0, 0, 1]])), np.zeros((1, 3)))


BOWL, STEPS = "put_the_bowl_on_the_plate", 14


def record_demonstration(folder):
    """A short demonstration in the real simulator, recorded as LIBERO's create_dataset.py does: states from
    before, observations from after the action. Poses of the furniture in both forms that files have."""
    libero = prepare_data.import_libero()
    bddl = str(Path(libero.__file__).parent / "bddl_files" / "libero_goal" / f"{BOWL}.bddl")
    from libero.libero.envs import OffScreenRenderEnv
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=SIZE * 4, camera_widths=SIZE * 4)
    env.env.reset()
    rows = {key: [] for key in ("actions", "states", "agentview_rgb", "eye_in_hand_rgb", "ee_pos", "ee_ori",
                                "gripper_states", "joint_states")}
    for t in range(STEPS):
        rows["states"].append(env.get_sim_state())
        rows["actions"].append(np.array([0.5, 0.3, -0.4, 0, 0, 0.2, -1]) * (1 + t / STEPS) / 2)
        obs = env.step(rows["actions"][-1])[0]
        for key, name in (("agentview_rgb", "agentview_image"), ("ee_pos", "robot0_eef_pos"),
                          ("eye_in_hand_rgb", "robot0_eye_in_hand_image"),
                          ("gripper_states", "robot0_gripper_qpos"), ("joint_states", "robot0_joint_pos")):
            rows[key].append(obs[name])
        rows["ee_ori"].append(prepare_data.axis_angle(obs["robot0_eef_quat"][None])[0])
    model = env.sim.model
    poses = {name: [model.body_pos[i].tolist(), model.body_quat[i].tolist()] for name in model.body_names
             if "main" in name for i in [model.body_name2id(name)]}
    with h5py.File(Path(folder) / f"{BOWL}_demo.hdf5", "w") as f:
        data = f.create_group("data")
        data.attrs["bddl_file_name"] = f"chiliocosm/bddl_files/libero_goal/{BOWL}.bddl"
        for key, attribute, value in (("demo_0", "model_file", model.get_xml()),
                                      ("demo_1", "fixture_poses", json.dumps(poses))):
            demo = data.create_group(key)
            demo.attrs[attribute] = value
            for name, values in rows.items():
                demo[name if name in ("actions", "states") else f"obs/{name}"] = np.array(values)
    env.close()
    prepare_data.close_simulator()                           # collects what is left of OpenGL


def test_the_simulator_draws_what_a_recorder_saw(libero_assets, tmp_path, monkeypatch):
    """Stored and drawn images are the same world at each step, from a reset with other furniture; and neither
    a question on stdin nor a file in the home folder."""
    monkeypatch.setenv("LIBERO_ASSETS", libero_assets)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))       # libero itself would write settings there
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    (tmp_path / "in").mkdir()
    for name, code in (("record", f"test_sources.record_demonstration({str(tmp_path / 'in')!r})"),
                       ("draw", f"""dirty_data.prepare_data.main(["libero", "--render", "--keep-failures",
                        "--input", {str(tmp_path / "in")!r}, "--out", {str(tmp_path / "drawn")!r},
                        "--image-size", "{SIZE * 4}", "--workers", "1"])""")):
        done = subprocess.run([sys.executable, "-c", f"import dirty_data, test_sources; {code}"],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (name, done.stderr[-2000:])
    convert("libero", tmp_path / "in", tmp_path / "stored", "--image-size", str(SIZE * 4))
    stored, drawn = (EpisodeDataset(tmp_path / name, 1) for name in ("stored", "drawn"))
    for episode in (0, 1):
        for camera in stored.cameras:
            a = stored.read_frames(episode, camera, 0, STEPS).float()      # worlds 1 .. T
            b = drawn.read_frames(episode, camera, 0, STEPS).float()       # worlds 0 .. T-1
            at = [(x - y).abs().mean() for x, y in ((a[:-1], b[1:]), (a[:-1], b[:-1]), (a[:-2], b[2:]))]
            assert at[0] < 3 and at[0] < 0.7 * min(at[1:]), (camera, at)
            assert (a[:-1].flip(2) - b[1:]).abs().mean() > 5 * at[0], "upside down"
    one, two = stored[3], drawn[4]
    assert torch.equal(one["actions"][0], two["actions"][0])
    assert torch.allclose(one["obs"]["proprio"], two["obs"]["proprio"], atol=0.01)
    assert not (tmp_path / "home" / ".libero").exists()


def test_without_assets_the_simulator_says_where_they_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    error(lambda: prepare_data.import_libero(str(tmp_path)),
          str(tmp_path), "--libero-assets", "LIBERO_ASSETS")


# ---- LeRobot -----------------------------------------------------------------------------------------------

def test_lerobot_attributes_and_tasks(made):
    data, texts = EpisodeDataset(made("lerobot").out, 1), annotations_of(made("lerobot").out)
    assert data.cameras == ["front", "wrist"], "the depth camera is left out"
    assert data.attrs["action"]["names"][0] == "x" and data.attrs["action"]["delta"] == prepare_data.CHANGES
    assert texts["episode-000001"] == ["move it", "shove it"] and texts["episode-000008"] == [""]


def test_absolute_actions_hold_their_last_value(made, tmp_path):
    flags = ["--action-kind", "absolute", "--cameras", "wrist"]
    convert("lerobot", made("lerobot").root, tmp_path / "d", *flags)
    data = EpisodeDataset(tmp_path / "d", 5)
    item = data[int(data.lengths[0]) - 2]                                  # one step before the end
    assert item["is_pad"].tolist() == [False, True, True, True, True]
    assert torch.equal(item["actions"][1], item["actions"][0]) and data.cameras == ["wrist"]


def test_odd_lerobot_metadata_is_one_line(made, tmp_path):
    root = tmp_path / "in"
    for change, words in ((lambda info: {**info, "fps": 0}, "fps 0"),
                          (lambda info: {**info, "fps": None}, "fps"),
                          (lambda info: [info], "not as expected"),
                          (lambda info: {**info, "features": {}}, "features"),
                          (lambda info: {k: v for k, v in info.items() if k != "data_path"}, "data_path")):
        shutil.copytree(made("lerobot").root / "meta", root / "meta", dirs_exist_ok=True)
        info = json.loads((root / "meta" / "info.json").read_text())
        (root / "meta" / "info.json").write_text(json.dumps(change(info)))
        message = convert("lerobot", root, tmp_path / "d")[1]
        assert words in message and "info.json" in message and "\n" not in message, message
    shutil.copytree(made("lerobot").root / "meta", root / "meta", dirs_exist_ok=True)
    (root / "meta/episodes/chunk-000/file-001.parquet").write_bytes(b"PAR1")
    assert "file-001.parquet is not as expected" in convert("lerobot", root, tmp_path / "d")[1]


def test_lerobot_input_errors(made, tmp_path, monkeypatch):
    root = made("lerobot").root
    message = convert("lerobot", root, tmp_path / "d", "--cameras", "top")[1]
    assert "no camera 'top', but front, wrist" in message
    (tmp_path / "old" / "meta").mkdir(parents=True)
    assert "no meta/info.json" in convert("lerobot", tmp_path, tmp_path / "d")[1]
    info = json.loads((root / "meta" / "info.json").read_text())
    (tmp_path / "old" / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    assert "v2.1, expected v3" in convert("lerobot", tmp_path / "old", tmp_path / "d")[1]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow av" in convert("lerobot", root, tmp_path / "d")[1]


def test_flip_turns_the_stored_images(made, tmp_path):
    convert("lerobot", made("lerobot").root, tmp_path / "d", "--flip", "both")
    data = EpisodeDataset(tmp_path / "d", 1)
    assert data.attrs["flip"] == "both"
    assert read_picture(data[3]["obs"]["images"]["front"].flip(1, 2)) == (0, 3)


# ---- mixtures ----------------------------------------------------------------------------------------------

def test_a_mixture_draws_by_weight_and_spans_the_same_time(made):
    paths = [made("bridge").out, made("ssv2").out]
    mix = Mixture(paths, 4, cameras=1, future=1, labels=())
    assert [part.stride for part in mix.parts] == [1, 2], "5 and 12 frames per second"
    assert len(mix) == sum(len(part) for part in mix.parts)
    windows = mix.draw(np.random.default_rng(0), 4000)
    assert windows == Mixture(
    paths, 4, cameras=1, future=1, labels=()).draw(
        np.random.default_rng(0), 4000)
    weighted = Mixture(paths, 4, weights=[3, 1], cameras=1, future=1, labels=())
    first = np.mean(np.array(weighted.draw(np.random.default_rng(0), 4000)) < len(weighted.parts[0]))
    assert abs(first - 0.75) < 0.03 and weighted.shares() == [0.75, 0.25]
    batch = torch.utils.data.default_collate([mix[0], mix[len(mix) - 1]])   # one of each
    assert batch["frames"].shape[1] == 5 and set(batch["obs"]["images"]) == {"front"}
    assert "actions" not in batch and "proprio" not in batch["obs"]
    total = len(mix.parts[0].lengths)
    assert batch["episode"][0] < total <= batch["episode"][1]
    texts = [mix.instructions[i] for i in batch["instruction_id"]]
    assert texts[1] == mix.parts[1].instructions[mix.parts[1][len(mix.parts[1]) - 1]["instruction_id"]]
    assert mix.attrs["mixture"][1]["stride"] == 2 and mix.fingerprint not in [
        p.fingerprint for p in mix.parts]


def test_a_mixture_of_one_is_that_dataset(made):
    path = made("bridge").out
    mix, data = Mixture([path], 4, split="train"), EpisodeDataset(path, 4, split="train")
    assert len(mix) == len(data) and mix.fingerprint == data.fingerprint
    assert mix.draw(
    np.random.default_rng(3),
    9) == np.random.default_rng(3).integers(
        len(data),
         size=9).tolist()
    for a, b in ((mix[5], data[5]), (mix[len(mix) - 1], data[len(data) - 1])):
        assert torch.equal(a["actions"], b["actions"]) and a["episode"] == b["episode"]
    assert all(np.array_equal(mix.limits("actions")[k], data.limits("actions")[k]) for k in ("min", "max"))


def test_mixing_what_does_not_agree_is_refused(made, tmp_path):
    bridge, libero, video = (made(source).out for source in ("bridge", "libero", "ssv2"))
    error(lambda: Mixture([bridge, video], 4), "action_dim", "7", "None")
    error(lambda: Mixture([bridge, libero], 3, cameras=1), "proprio_dim", "8")
    error(lambda: Mixture([bridge, libero], 3, labels=()), "2 cameras")
    error(lambda: Mixture([bridge, video], 4, weights=[1]), "--weights", "2 datasets")
    error(lambda: Mixture([bridge, video], 4, strides=[1, 2, 3]), "--strides")
    error(lambda: Mixture([bridge, video], 4, weights=[0, 0]), "not all 0")
    error(lambda: Mixture([bridge, video], 4, strides=[1, 0], labels=()), "stride of 0")
    error(lambda: EpisodeDataset(bridge, 5, stride=3), "chunk of 5", "at stride 3")


def test_pretraining_on_a_mixture_resumes_to_the_bit(made, tmp_path, monkeypatch):
    data = [str(made(source).out) for source in ("bridge", "ssv2")]
    flags = [
    "--smoke",
    "--data",
    *data,
    "--weights",
    "1",
    "2",
    "--probe-data",
    "none",
    "--device",
    "cpu",
     "--out"]
    pretrain.main([*flags, str(tmp_path / "whole")])
    save = pretrain.save_checkpoint

    def save_then_die(path, checkpoint):
        save(path, checkpoint)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main([*flags, str(tmp_path / "run")])
    pretrain.main([*flags, str(tmp_path / "run"), "--resume"])
    one, two = (load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "run"))
    assert all(torch.equal(one["policy"][k], two["policy"][k]) for k in one["policy"])
    assert [part["weight"] for part in one["data"]["mixture"]] == pytest.approx([1 / 3, 2 / 3])


def test_limits_at_a_stride_that_some_episodes_are_shorter_than(made):
    mix = Mixture([made("bridge").out], 1, strides=[13], split="all")
    assert mix.limits("actions")["max"][0] == sum(range(13))


def test_finetuning_on_two_datasets_of_one_robot(made, tmp_path):
    path = str(made("libero").out)
    finetune.main(["--smoke", "--data", path, path, "--init",
                  "scratch", "--out", str(tmp_path), "--device", "cpu"])
    assert np.isfinite(metrics(tmp_path)[-1]["val_l1/0"])


# ---- inspect --check ---------------------------------------------------------------------------------------

def test_inspect_check_finds_a_flipped_byte(made, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in content(made("bridge").out).items():
        (copy / name).write_bytes(data)
    prepare_data.main(["inspect", str(copy), "--check", "--contact-sheet", str(tmp_path / "x.png")])
    assert "all good" in capsys.readouterr().out
    data = bytearray((copy / "00000.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "00000.h5").write_bytes(data)
    error(lambda: prepare_data.main(["inspect", str(copy), "--check"]),
          "00000.h5", "not the file that was written")
