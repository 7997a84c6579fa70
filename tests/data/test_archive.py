"""Folders and zips: what is listed, what survives pickling and forking, and that hostile archives are
refused."""

import io
import multiprocessing
import pickle
import stat
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gen.data.archive import FolderStore, ZipStore, open_store
from lit_gen.errors import ConfigError

FILES = {"b/2.png": b"two", "a/1.png": b"one" * 1000, "a/.hidden": b"", "__MACOSX/a/1.png": b"junk"}


def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    return tmp_path / "set"


@pytest.fixture
def archive(tmp_path):
    return make_zip(tmp_path / "set.zip", FILES)


def test_folder_and_zip_list_and_read_the_same(folder, archive):
    one, two = open_store(folder), open_store(archive)
    assert isinstance(one, FolderStore)
    assert isinstance(two, ZipStore)
    assert one.names == two.names == ["a/1.png", "b/2.png"]
    for name in one.names:
        assert one.read(name) == two.read(name) == FILES[name]


def test_signature_follows_the_content(tmp_path, folder):
    before = open_store(folder).signature("b/2.png")
    (folder / "b/2.png").write_bytes(b"other")
    assert open_store(folder).signature("b/2.png") != before
    a = ZipStore(make_zip(tmp_path / "a.zip", {"x": b"abc"})).signature("x")
    b = ZipStore(make_zip(tmp_path / "b.zip", {"x": b"abd"})).signature("x")
    assert a != b


def test_linked_folders_are_followed_once(folder):
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    assert open_store(folder).names == ["a/1.png", "b/2.png"]


def test_a_zip_store_pickles_without_its_handle(archive):
    store = ZipStore(archive)
    copy = pickle.loads(pickle.dumps(store))
    assert copy._zip is None
    assert copy.read("a/1.png") == FILES["a/1.png"]


def _read_often(store, queue):
    queue.put(all(store.read(n) == FILES[n] for _ in range(200) for n in store.names))


def test_forked_readers_do_not_disturb_one_another(archive):
    store = ZipStore(archive)
    store.read("a/1.png")  # the parent's handle is open when the children are made
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_often, args=(store, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert all(store.read(n) == FILES[n] for _ in range(200) for n in store.names)
    assert [queue.get(timeout=1800) for _ in children] == [True] * 3
    for child in children:
        child.join()


def test_threads_share_a_zip(archive):
    store = ZipStore(archive)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda n: store.read(n) == FILES[n], store.names * 100))


def test_what_is_neither_folder_nor_zip(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder or zip"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.zip: not a zip file, or a truncated one"):
        open_store(tmp_path / "text.zip")


def test_a_truncated_zip_is_named(archive):
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"set\.zip: not a zip file, or a truncated one"):
        open_store(archive)


@pytest.mark.parametrize(
    "name", ["../escape.png", "a/../../escape.png", "/etc/escape.png", "..\\escape.png", "C:\\x.png"]
)
def test_names_that_climb_out_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="leads out of the archive"):
        ZipStore(make_zip(tmp_path / "t.zip", {"a.png": b"1", name: b"2"}))


def test_links_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("a.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ConfigError, match=r"'a\.png' is a link"):
        ZipStore(tmp_path / "l.zip")


def test_zip_bombs_are_refused_unread(tmp_path):
    bomb = make_zip(tmp_path / "bomb.zip", {"zeros.png": bytes(8 << 20)})
    with pytest.raises(
        ConfigError, match=r"'zeros\.png' unpacks to more than 200 times its size: a zip bomb"
    ):
        ZipStore(bomb)


def test_an_entry_that_claims_to_be_huge_is_refused(tmp_path):
    data = bytearray(make_zip(tmp_path / "h.zip", {"a.png": b"abc"}, zipfile.ZIP_STORED).read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "h.zip").write_bytes(data)
    with pytest.raises(ConfigError, match=r"unpacks to 1024 MiB, more than 256"):
        ZipStore(tmp_path / "h.zip")


def test_a_stream_longer_than_its_entry_says_is_cut_off(tmp_path):
    """The entry claims 100 bytes, the stream holds 64 MiB: an error, and nothing like 64 MiB is unpacked."""
    import tracemalloc

    data = bytearray(make_zip(tmp_path / "s.zip", {"a.png": bytes(64 << 20)}).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.rindex(signature)
        data[at + offset : at + offset + 4] = struct.pack("<I", 100)
    (tmp_path / "s.zip").write_bytes(data)
    store = ZipStore(tmp_path / "s.zip")
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"a\.png cannot be unpacked"):
        store.read("a.png")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_other_packing_and_encryption_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="another method than deflate"):
        ZipStore(make_zip(tmp_path / "b.zip", {"a.png": b"1"}, zipfile.ZIP_BZIP2))
    data = bytearray(make_zip(tmp_path / "e.zip", {"a.png": b"1"}).read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "e.zip").write_bytes(data)
    with pytest.raises(ConfigError, match="is encrypted"):
        ZipStore(tmp_path / "e.zip")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_zip_reads_right_or_raises_config_errors(tmp_path, data):
    buffer = io.BytesIO()
    make_zip(buffer, FILES)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "d.zip").write_bytes(damaged)
    try:
        store = ZipStore(tmp_path / "d.zip")
        contents = [store.read(name) for name in store.names]
    except ConfigError:
        return
    assert set(contents) <= set(FILES.values())  # CRCs hold
