"""Shards from elsewhere, over a server on the loopback address that misbehaves on demand."""

import multiprocessing
import signal
import subprocess
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tars import samples, write_shards, write_tar
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from supermix_transforms import ShardDataset
from supermix_transforms.data import cache
from supermix_transforms.data.tarindex import index_path, load_index, write_index


class Server(ThreadingHTTPServer):
    """Serves a folder; `asked` are the paths, `cut` is where a file's bytes end.

    What is `stalled` is not sent to its end, and its connection stays open until `released`.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.cut, self.delay = folder, [], None, 0.0
        self.stalled, self.released = (), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        file = self.server.folder / self.path.removeprefix("/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        time.sleep(self.server.delay)
        if self.path.endswith(self.server.stalled):
            self.wfile.write(content[: len(content) // 2])
            self.server.released.wait()
            return
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def copies(tmp_path):
    return tmp_path / "copies"


def files(folder):
    """What is kept, without locks."""
    return sorted(path.name for path in folder.glob("[!.]*")) if folder.exists() else []


def test_shards_are_copied_once(server, copies):
    write_shards(server.folder, [3, 2])
    urls = f"{server.url}/part-{{0,1}}.tar"
    dataset = ShardDataset(urls, cache_dir=copies)
    assert [label for _, label in dataset] == [0, 1, 2, 3, 4]
    assert [label for _, label in ShardDataset(urls, cache_dir=copies)] == [0, 1, 2, 3, 4]
    assert server.asked.count("/part-0.tar") == server.asked.count("/part-1.tar") == 1
    assert len(files(copies)) == 4  # and their indices


def test_with_a_published_index_a_shard_is_copied_when_it_is_read(server, copies):
    for shard in write_shards(server.folder, [3, 2]):
        load_index(shard)
    dataset = ShardDataset(f"{server.url}/part-{{0,1}}.tar", cache_dir=copies)
    assert len(dataset) == 5
    assert files(copies) == []
    assert dataset[4][1] == 4
    assert server.asked.count("/part-0.tar") == 0
    assert server.asked.count("/part-1.tar") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_copy_each_shard_once(server, copies, workers):
    for shard in write_shards(server.folder, [3, 4]):
        load_index(shard)
    server.delay = 0.2
    dataset = ShardDataset(
        f"{server.url}/part-{{0,1}}.tar", cache_dir=copies, transform=v2.ToImage()
    )
    labels = [int(label) for _, label in DataLoader(dataset, 1, num_workers=workers)]
    assert labels == list(range(7))
    assert server.asked.count("/part-0.tar") == server.asked.count("/part-1.tar") == 1


def test_an_index_that_is_damaged_is_not_believed(server, copies):
    (shard,) = write_shards(server.folder, [3])
    load_index(shard)
    path = index_path(shard)
    path.write_bytes(path.read_bytes().replace(b"0001", b"0009"))
    dataset = ShardDataset(f"{server.url}/part-0.tar", cache_dir=copies)
    assert [label for _, label in dataset] == [0, 1, 2]


def test_a_connection_that_is_cut_leaves_nothing(server, copies):
    (shard,) = write_shards(server.folder, [3])
    server.cut = shard.stat().st_size // 2
    with pytest.raises(ValueError, match=r"whole tar at .http.*part-0.tar.*Nothing was"):
        ShardDataset(f"{server.url}/part-0.tar", cache_dir=copies)
    assert files(copies) == []
    assert not list(copies.glob("*.part"))
    server.cut = None
    assert len(ShardDataset(f"{server.url}/part-0.tar", cache_dir=copies)) == 3


def test_a_server_that_stalls_is_an_error_and_nothing_of_it_is_believed(
    server, copies, monkeypatch
):
    write_shards(server.folder, [3])
    url = f"{server.url}/part-0.tar"
    monkeypatch.setattr(cache, "MOST_SECONDS", 0.2)
    server.stalled = (".tar",)
    message = (
        r"whole tar at .*part-0.tar.*got: nothing for 0.2 seconds after \d+ bytes. Nothing was"
    )
    with pytest.raises(ValueError, match=message):
        ShardDataset(url, cache_dir=copies)
    assert files(copies) == []
    assert not list(copies.glob(".*.part"))
    monkeypatch.undo()
    server.stalled = ()
    assert len(ShardDataset(url, cache_dir=copies)) == 3


def test_a_published_index_that_stalls_is_none(server, monkeypatch):
    (shard,) = write_shards(server.folder, [3])
    load_index(shard)
    assert cache.published_index(f"{server.url}/part-0.tar") is not None
    monkeypatch.setattr(cache, "MOST_SECONDS", 0.2)
    server.stalled = (".index",)
    assert cache.published_index(f"{server.url}/part-0.tar") is None


def test_a_command_that_stalls_is_killed(tmp_path, copies, monkeypatch):
    (shard,) = write_shards(tmp_path, [3])
    killed = []
    kill = subprocess.Popen.kill
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: killed.append(self) or kill(self))
    monkeypatch.setattr(cache, "MOST_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"got: nothing for 0.2 seconds after \d+ bytes"):
        cache.fetch(f"pipe:cat {shard}; exec sleep 600", copies / "a.tar")
    (command,) = killed
    assert command.returncode == -signal.SIGKILL


def test_a_shard_of_another_hash_than_its_index_is_an_error(server, copies):
    (shard,) = write_shards(server.folder, [3])
    load_index(shard)
    dataset = ShardDataset(f"{server.url}/part-0.tar", cache_dir=copies)
    write_tar(shard, samples(50, 3))
    with pytest.raises(ValueError, match=r"part-0.tar.index, for \w{64}, says something else"):
        dataset[0]
    assert files(copies) == []


def test_a_published_index_that_gives_samples_the_places_of_others_is_an_error(server, copies):
    (shard,) = write_shards(server.folder, [3])
    index = load_index(shard)
    swapped = {suffix: table[::-1].copy() for suffix, table in index.places.items()}
    write_index(shard, replace(index, places=swapped))
    dataset = ShardDataset(f"{server.url}/part-0.tar", cache_dir=copies)
    with pytest.raises(ValueError, match="says something else"):
        dataset[0]
    assert files(copies) == []


def test_a_full_disk_leaves_nothing(server, copies, monkeypatch):
    write_shards(server.folder, [3])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("supermix_transforms.data.cache.os.fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        ShardDataset(f"{server.url}/part-0.tar", cache_dir=copies)
    assert files(copies) == []
    assert not list(copies.glob("*.part"))


def test_a_stream_without_end_is_an_error(server, copies, monkeypatch):
    write_shards(server.folder, [3])
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="got: more than 1000 bytes"):
        ShardDataset(f"{server.url}/part-0.tar", cache_dir=copies)
    assert files(copies) == []


def test_two_processes_copy_once(server, copies):
    write_shards(server.folder, [3])
    server.delay = 0.5
    url = f"{server.url}/part-0.tar"
    target = cache.cached_path(url, copies)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=cache.fetch, args=(url, target)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert server.asked == ["/part-0.tar"]


def test_addresses_that_differ_have_copies_of_their_own(copies):
    urls = ["http://a/x.tar", "http://b/x.tar", "http://a/x.tar?token=1", "hf://d/../../x.tar"]
    paths = {cache.cached_path(url, copies) for url in urls}
    assert len(paths) == 4
    assert {path.parent for path in paths} == {copies}
    assert all(path.name.endswith("-x.tar") for path in paths)


def test_a_command_runs_where_the_user_wrote_it_only(tmp_path, copies):
    (shard,) = write_shards(tmp_path, [3])
    dataset = ShardDataset(f"pipe:cat {shard}", cache_dir=copies)
    assert [label for _, label in dataset] == [0, 1, 2]
    with pytest.raises(ValueError, match="expected a whole tar at 'pipe:false'"):
        ShardDataset("pipe:false", cache_dir=copies)
    with pytest.raises(ValueError, match="cache_dir: expected a folder for copies"):
        ShardDataset("pipe:touch sprung")
    with pytest.raises(ValueError, match="expected a whole tar at 'pipe:head"):
        ShardDataset(f"pipe:head -c 3000 {shard}", cache_dir=copies)  # ends with 0 all the same


def test_a_command_is_not_asked_for_an_index(tmp_path):
    assert cache.published_index(f"pipe:touch {tmp_path / 'asked'}") is None
    assert not any(tmp_path.iterdir())


def test_the_index_of_an_address_with_a_query_is_asked_with_it(server):
    cache.published_index(f"{server.url}/part-0.tar?token=1")
    assert set(server.asked) == {"/part-0.tar.index?token=1"}
