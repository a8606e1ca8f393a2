"""Files and folders are whole or absent, whatever stops the writer; one process writes at a time.

Knows nothing of models. Disk-full is real: the kernel's limit on file sizes, in another process.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conch_dna.checkpoints import (
    DIGESTS,
    FolderLock,
    content_digest,
    differences,
    file_digest,
    numbered_folders,
    read_folder,
    read_json,
    remove_folder,
    remove_unfinished,
    save_arrays,
    verify_folder,
    write_atomically,
    write_folder,
    write_json,
)
from conch_dna.errors import ConchError, FolderInUseError, NotWholeError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_folder(path: Path, value: float = 1.0) -> Path:
    write_folder(
        path,
        arrays={"a.safetensors": {"x": mx.full((4, 3), value), "y": mx.arange(5)}},
        documents={"state.json": {"step": 3, "name": "größe"}, "samples.md": "# Hi\n"},
        writers={"picture.png": lambda file: file.write_bytes(b"\x89PNG")},
    )
    return path


# Single files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x00\xff", b"\x00\xff"),
        ("größe", "größe".encode()),
        (lambda file: file.write_bytes(b"written"), b"written"),
    ],
    ids=["bytes", "text", "function"],
)
def test_write_atomically_writes_and_replaces(tmp_path, content, expected):
    path = tmp_path / "new" / "file.bin"
    write_atomically(path, b"old and longer than what comes")
    write_atomically(path, content)
    assert path.read_bytes() == expected
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("[save] failed")])
def test_a_writer_that_fails_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def half(file: Path) -> None:
        file.write_text("ne")
        raise error

    with pytest.raises(ConchError, match=r"cannot write .*file\.txt: .*--resume") as caught:
        write_atomically(path, half)
    assert str(error) in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_an_interrupt_while_writing_leaves_no_temporary_and_goes_on_up(tmp_path):
    def stopped(file: Path) -> None:
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.txt", stopped)
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_a_message_not_a_traceback(tmp_path):
    (tmp_path / "taken").write_text("I am a file")
    for path in (tmp_path / "taken" / "file.txt", tmp_path / "taken" / "deep" / "file.txt"):
        with pytest.raises(ConchError, match="cannot write"):
            write_atomically(path, "text")
        with pytest.raises(ConchError, match="cannot write"):
            write_folder(path, documents={"a.json": {}})


def test_write_json_refuses_nan_and_keeps_unicode(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "ö"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ö"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": 1, "a": "ö"}
    assert names(tmp_path) == ["a.json"]


def test_the_same_arrays_are_the_same_bytes_whatever_their_order(tmp_path):
    """A resumed run has them in the order in which a file gave them back."""
    names_ = [
        f"layers.{layer}.{part}.lora_{x}" for layer in range(8) for part in "qv" for x in "ab"
    ]
    arrays = {name: mx.full((2,), number) for number, name in enumerate(names_)}
    contents = set()
    for number in range(3):
        save_arrays(tmp_path / "one.safetensors", arrays)
        write_folder(tmp_path / "folder", arrays={"one.safetensors": arrays})
        contents |= {(tmp_path / p / "one.safetensors").read_bytes() for p in (".", "folder")}
        again = mx.load(str(tmp_path / "one.safetensors"))
        assert isinstance(again, dict)
        arrays = dict(reversed(again.items())) if number else again
    assert len(contents) == 1


def test_a_folder_that_is_removed_is_whole_or_gone(tmp_path, monkeypatch):
    """Killed between two of its files, a checkpoint without digests stood there for ever."""
    folder = make_folder(tmp_path / "checkpoint_2")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    remove_folder(folder)
    assert not folder.exists()
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_save_arrays_keeps_types_and_metadata(tmp_path):
    arrays = {"ids": mx.array([1, 65535], mx.uint16), "p": mx.array([-np.inf, 0.5])}
    save_arrays(tmp_path / "shard.safetensors", arrays, {"format": "1"})
    loaded, metadata = mx.load(str(tmp_path / "shard.safetensors"), return_metadata=True)
    assert metadata == {"format": "1"}
    assert {name: value.dtype for name, value in loaded.items()} == {
        "ids": mx.uint16,
        "p": mx.float32,
    }
    assert loaded["ids"].tolist() == [1, 65535]
    assert loaded["p"].tolist() == [-np.inf, 0.5]


# Folders


def test_a_folder_comes_back_as_it_was_written(tmp_path):
    arrays, documents = read_folder(make_folder(tmp_path / "deep" / "down"))
    assert documents == {"state.json": {"step": 3, "name": "größe"}}
    assert set(arrays) == {"a.safetensors"}
    np.testing.assert_array_equal(arrays["a.safetensors"]["x"], np.ones((4, 3)))
    assert arrays["a.safetensors"]["y"].tolist() == [0, 1, 2, 3, 4]
    assert (tmp_path / "deep" / "down" / "samples.md").read_text() == "# Hi\n"
    assert (tmp_path / "deep" / "down" / "picture.png").read_bytes() == b"\x89PNG"
    assert names(tmp_path / "deep") == ["down"]


def test_a_folder_replaces_the_one_that_stood_there(tmp_path):
    path = make_folder(tmp_path / "checkpoint_1", value=1.0)
    write_folder(path, arrays={"b.safetensors": {"z": mx.zeros(2)}})
    arrays, documents = read_folder(path)
    assert set(arrays) == {"b.safetensors"} and documents == {}
    assert names(tmp_path) == ["checkpoint_1"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_folder_whose_writer_fails_leaves_the_old_one(tmp_path, error):
    path = make_folder(tmp_path / "checkpoint_1")

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise error

    expected = ConchError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_folder(path, documents={"state.json": {"step": 9}}, writers={"picture.png": fail})
    assert read_folder(path)[1]["state.json"]["step"] == 3
    assert names(tmp_path) == ["checkpoint_1"]


@pytest.mark.parametrize("error", [OSError("Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_is_back_when_the_new_one_cannot_take_its_place(
    tmp_path, monkeypatch, error
):
    path = make_folder(tmp_path / "checkpoint_1")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == path and "old" not in source.name:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    expected = ConchError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        make_folder(path, value=2.0)
    assert read_folder(path)[0]["a.safetensors"]["x"][0, 0].item() == 1.0
    assert names(tmp_path) == ["checkpoint_1"]


def _missing(file: Path) -> None:
    file.unlink()


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_missing, _truncated, _altered])
@pytest.mark.parametrize("name", ["a.safetensors", "state.json", "samples.md", "picture.png"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = make_folder(tmp_path / "checkpoint_1")
    damage(path / name)
    for read in (verify_folder, read_folder):
        with pytest.raises(NotWholeError, match=f"checkpoint_1 is not whole: {name}"):
            read(path)


def test_an_added_file_is_named(tmp_path):
    path = make_folder(tmp_path / "checkpoint_1")
    (path / "more.safetensors").write_bytes(b"")
    with pytest.raises(NotWholeError, match=r"more\.safetensors"):
        read_folder(path)


def test_a_file_that_the_finder_hides_in_a_folder_does_no_harm(tmp_path):
    path = make_folder(tmp_path / "checkpoint_1")
    (path / ".DS_Store").write_bytes(b"Bud1")
    verify_folder(path)


@pytest.mark.parametrize("text", [None, "", "{", '{"a.safetensors": 3}', "[]", "3"])
def test_a_folder_without_good_digests_is_not_whole(tmp_path, text):
    path = make_folder(tmp_path / "checkpoint_1")
    (path / "digests.json").unlink()
    if text is not None:
        (path / "digests.json").write_text(text)
    with pytest.raises(NotWholeError, match="not whole"):
        verify_folder(path)


def test_a_folder_that_is_not_there_is_not_whole(tmp_path):
    with pytest.raises(NotWholeError):
        read_folder(tmp_path / "checkpoint_1")


def test_numbered_folders_are_sorted_as_numbers(tmp_path):
    for name in ("checkpoint_100", "checkpoint_20", "checkpoint_3", "checkpoint_x", "other_1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint_7").write_text("a file")
    found = numbered_folders(tmp_path, "checkpoint_")
    assert [(number, path.name) for number, path in found] == [
        (3, "checkpoint_3"),
        (20, "checkpoint_20"),
        (100, "checkpoint_100"),
    ]
    assert numbered_folders(tmp_path / "absent", "checkpoint_") == []


def test_remove_unfinished_puts_back_a_folder_that_was_moved_aside(tmp_path):
    """As after a kill between moving the old folder away and the new one in."""
    make_folder(tmp_path / "checkpoint_1", value=7.0)
    os.rename(tmp_path / "checkpoint_1", tmp_path / ".writing-old-checkpoint_1")
    make_folder(tmp_path / ".writing-123-checkpoint_1")
    (tmp_path / ".writing-123-run.json").write_text("{")
    (tmp_path / "run.json").write_text("{}")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["checkpoint_1", "run.json"]
    arrays, _ = read_folder(tmp_path / "checkpoint_1")
    assert arrays["a.safetensors"]["x"][0, 0].item() == 7.0


def test_remove_unfinished_drops_a_folder_whose_replacement_came(tmp_path):
    make_folder(tmp_path / "checkpoint_1", value=8.0)
    make_folder(tmp_path / ".writing-old-checkpoint_1", value=7.0)
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "absent")
    assert names(tmp_path) == ["checkpoint_1"]
    arrays, _ = read_folder(tmp_path / "checkpoint_1")
    assert arrays["a.safetensors"]["x"][0, 0].item() == 8.0


@pytest.mark.parametrize("write", ["folder", "file"])
def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path, write):
    """Silent failure: a model's weights that nobody sees fill the disk."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    ended, other = process.pid, subprocess.Popen(["sleep", "60"])
    names = [f".writing-{ended}-x", f".writing-{10**30}-x", f".writing-{other.pid}-x"]
    names += [f".writing-{ended}-a-x", f".writing-{ended}-xx", ".writing-old-a-x"]
    try:
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights").write_text("many")
        (tmp_path / f".writing-{2**22 + 5}-x").write_text("many")
        if write == "folder":
            write_folder(tmp_path / "x", documents={"a.json": 1})
        else:
            write_atomically(tmp_path / "x", lambda path: path.write_text("new"))
    finally:
        other.kill()
        other.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"x", *names[2:]}


def test_a_link_to_a_folder_stays_one(tmp_path):
    """Silent failure: the folder lands on another disk, and the old one stays where it was."""
    folder = tmp_path / "disk" / "model"
    make_folder(folder)
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    for number in range(2):
        write_folder(link, documents={"a.json": number})
        assert link.is_symlink() and json.loads((folder / "a.json").read_text()) == number
        assert [*tmp_path.iterdir()] and not [*tmp_path.rglob(".writing-*")]
    assert not (folder / "weights.safetensors").exists()


def test_a_full_disk_is_one_clear_error_and_leaves_what_stood_there(tmp_path):
    """Writes stop at 64 KiB for real; both Python's and MLX's writers must notice."""
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import conch_dna
        import mlx.core as mx
        from conch_dna.checkpoints import save_arrays, write_atomically, write_folder
        from conch_dna.errors import ConchError

        folder, big = Path(sys.argv[1]), {"x": mx.ones((256, 1024))}
        write_folder(folder / "checkpoint_1", documents={"state.json": {"step": 1}})
        write_atomically(folder / "file.safetensors", "old")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
        for write in (
            lambda: write_atomically(folder / "file.safetensors", b"x" * 200_000),
            lambda: save_arrays(folder / "file.safetensors", big),
            lambda: write_folder(folder / "checkpoint_1", arrays={"a.safetensors": big}),
            lambda: write_folder(folder / "checkpoint_2", documents={"a.txt": "x" * 200_000}),
        ):
            try:
                write()
                print("no error")
            except ConchError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    expected = ["file.safetensors", "file.safetensors", "checkpoint_1", "checkpoint_2"]
    for line, name in zip(lines, expected, strict=True):
        assert line.startswith(f"cannot write {tmp_path / name}: ")
        assert "free some disk space" in line
    assert names(tmp_path) == ["checkpoint_1", "file.safetensors"]
    assert (tmp_path / "file.safetensors").read_text() == "old"
    assert read_folder(tmp_path / "checkpoint_1")[1] == {"state.json": {"step": 1}}


# Differences, digests


def test_differences_name_every_key_with_both_values():
    saved = {"seed": 0, "alpha": 0.7, "gone": 1, "same": [1, 2]}
    now = {"seed": 1, "alpha": 0.5, "same": [1, 2], "new": "x"}
    assert differences(saved, now) == [
        "seed: was 0, now 1",
        "alpha: was 0.7, now 0.5",
        "gone: was 1, now 'absent'",
        "new: was 'absent', now 'x'",
    ]
    assert differences(saved, dict(saved)) == []


def test_content_digest_is_sha256_of_length_prefixed_parts():
    data = (3).to_bytes(8, "little") + b"abc" + (2).to_bytes(8, "little") + "ö".encode()
    assert content_digest(b"abc", "ö") == hashlib.sha256(data).hexdigest()


@given(
    first=st.lists(st.binary(max_size=4), max_size=4),
    second=st.lists(st.binary(max_size=4), max_size=4),
)
def test_lists_of_parts_have_one_digest_only_if_equal(first, second):
    assert (content_digest(*first) == content_digest(*second)) == (first == second)


@given(st.binary(min_size=2, max_size=12), st.data())
def test_cutting_the_same_bytes_elsewhere_changes_the_digest(data, draw):
    cuts = st.integers(0, len(data))
    first, second = draw.draw(cuts), draw.draw(cuts)
    same = content_digest(data[:first], data[first:]) == content_digest(
        data[:second], data[second:]
    )
    assert same == (first == second)


def test_file_digest_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"conch" * 100_000)
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"conch" * 100_000).hexdigest()


# One process per folder

HOLDER = """
import sys
from pathlib import Path
from conch_dna.checkpoints import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the folder until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as process:
        with (
            pytest.raises(FolderInUseError, match=rf"in use by process {process.pid} on .* since"),
            FolderLock(folder),
        ):
            pass
        process.communicate(timeout=60)
        with FolderLock(folder):
            assert json.loads((folder / "run.lock.json").read_text())["pid"] == os.getpid()
    assert not (folder / "run.lock.json").exists()


def test_a_killed_process_frees_the_folder(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert json.loads((folder / "run.lock.json").read_text())["pid"] == process.pid
        with FolderLock(folder):
            assert json.loads((folder / "run.lock.json").read_text())["pid"] == os.getpid()


def test_a_second_lock_in_the_same_process_is_refused_too(tmp_path):
    with FolderLock(tmp_path):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} "), FolderLock(tmp_path):
            pass
        (tmp_path / "run.lock.json").write_text("{")
        with pytest.raises(FolderInUseError, match="another process"), FolderLock(tmp_path):
            pass


def test_the_lock_goes_when_the_work_fails(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    with FolderLock(tmp_path):
        pass
    assert not (tmp_path / "run.lock.json").exists()


def test_a_folder_that_cannot_be_made_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConchError, match="--output-dir"), FolderLock(tmp_path / "file" / "run"):
        pass


# Of another form than was written


FOREIGN = ["", "null", "7", "[]", '[["a", "b"]]', '{"state.json": 7}', "[" * 200_000, "\ud7ff"]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("read", [verify_folder, read_folder])
def test_digests_of_another_form_are_no_whole_folder(tmp_path, content, read):
    folder = make_folder(tmp_path / "folder")
    (folder / DIGESTS).write_text(content)
    with pytest.raises(NotWholeError, match="is not whole"):
        read(folder)


@pytest.mark.parametrize("name", ["../secret", "a/b", ""])
def test_digests_of_files_elsewhere_are_refused(tmp_path, name):
    folder = make_folder(tmp_path / "folder")
    (folder / DIGESTS).write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(NotWholeError, match=f"no readable {DIGESTS}"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "recursion|depth"),
        ("[" * 65 + "]" * 65, "nested deeper than 64 levels"),
        ('{"step": 99999999999999999999999999}', "more than 64 bits"),
        ('{"step": ' + "9" * 9000 + "}", "integer string conversion"),
        ("{", "Expecting property name"),
    ],
    ids=["deep", "levels", "large", "huge", "cut"],
)
def test_json_that_python_cannot_work_with_is_not_whole(tmp_path, text, reason):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(NotWholeError, match=reason):
        read_json(path, needs={})


def test_sixty_four_levels_and_bits_are_read(tmp_path):
    path = tmp_path / "state.json"
    path.write_text('{"a": ' + "[" * 63 + str(2**64 - 1) + "]" * 63 + "}")
    assert "a" in read_json(path, needs={"a": list})


def test_a_lock_of_another_form_still_names_the_folder(tmp_path):
    with FolderLock(tmp_path / "run"):
        (tmp_path / "run" / "run.lock.json").write_text("[1]")
        with pytest.raises(FolderInUseError, match="in use by another process"):
            FolderLock(tmp_path / "run").__enter__()


@pytest.mark.parametrize("error", [OSError("No such file"), RuntimeError("[load] failed")])
def test_a_folder_that_was_deleted_in_use_is_named(tmp_path, error):
    def use() -> None:
        with FolderLock(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            raise error

    with pytest.raises(ConchError, match="was deleted or moved while it was in use"):
        use()
