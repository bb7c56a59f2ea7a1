"""Batches on their way to a GPU: order, bounds, errors and clean ends, on streams that are not there."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.data import Prefetcher, prefetch

ROOT = Path(__file__).resolve().parents[2]
Labelled = namedtuple("Labelled", "images labels")


class LateLane:
    """A stream whose copies take place only when somebody waits for an event behind them."""

    def __init__(self):
        self.pending, self.log, self.kept = [], [], []

    def upload(self, array):
        result = torch.full_like(array, 77)
        self.pending.append(lambda: result.copy_(array))
        return result

    def mark(self):
        work, self.pending = self.pending, []
        return work

    def hand_over(self, arrays, copied):
        for copy in copied:
            copy()
        self.log.append(len(arrays))
        self.kept += arrays


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ernet_fast-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert threads() == []


def test_batches_come_in_order_and_are_copied_before_they_are_handed_over():
    batches = [torch.full((size, 3), float(i)) for i, size in enumerate([4, 4, 4, 1])]
    lane = LateLane()
    found = list(prefetch.prefetch(batches, lane, depth=2))
    assert [len(batch) for batch in found] == [4, 4, 4, 1], "the ragged last batch comes too"
    for got, given in zip(found, batches, strict=True):
        assert torch.equal(got, given) and got is not given
    assert lane.log == [1, 1, 1, 1] and lane.pending == []


def test_nested_batches_keep_their_form():
    image, label = torch.rand(2, 3), np.arange(2)
    batch = {"x": Labelled(image, label), "names": ["a", "b"], "parts": (image, [image, 3.5]), "none": None}
    (found,) = prefetch.prefetch([batch], LateLane(), depth=1)
    assert isinstance(found["x"], Labelled) and torch.equal(found["x"].images, image)
    assert torch.equal(found["x"].labels, torch.arange(2)) and found["names"] == ["a", "b"] and found["none"] is None
    assert (
        isinstance(found["parts"], tuple) and torch.equal(found["parts"][1][0], image) and found["parts"][1][1] == 3.5
    )


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_batches_are_ahead(depth):
    given, taken = [], 0

    def source():
        for i in range(20):
            given.append(i)
            yield torch.tensor([i])

    for batch in prefetch.prefetch(source(), LateLane(), depth):
        taken += 1
        assert int(batch) == taken - 1 and len(given) <= taken + depth
    assert taken == 20


def test_an_error_of_the_source_comes_after_the_batches_before_it():
    def source():
        yield torch.zeros(1)
        yield torch.ones(1)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone") as caught:
        for batch in prefetch.prefetch(source(), LateLane(), depth=2):
            found.append(float(batch))
    assert found == [0.0, 1.0]
    assert any(entry.name == "source" for entry in caught.traceback), "the traceback leads into the source"


def test_an_error_of_the_upload_is_raised():
    class Full(LateLane):
        def upload(self, array):
            raise MemoryError("no page-locked memory")

    with pytest.raises(MemoryError, match="no page-locked memory"):
        list(prefetch.prefetch([torch.zeros(1)], Full(), depth=2))


@pytest.mark.parametrize("leave", ["close", "break", "error", "forget"])
def test_leaving_early_frees_everything(leave):
    alive, closed = weakref.WeakSet(), threading.Event()

    def source():
        try:
            while True:
                batch = torch.zeros(5)
                alive.add(batch)
                yield batch
        finally:
            closed.set()

    def use():
        batches = prefetch.prefetch(source(), PassingLane(), depth=3)
        if leave == "error":
            with pytest.raises(KeyError):
                for _ in batches:
                    raise KeyError
            batches.close()
        elif leave == "break":
            for _ in batches:
                break
        else:
            next(batches)
            if leave == "close":
                batches.close()

    class PassingLane(LateLane):
        def upload(self, array):
            return array

    use()
    gc.collect()
    assert closed.is_set() and threads() == [] and len(alive) == 0


def test_an_iteration_that_never_begins_starts_no_thread():
    prefetch.prefetch([torch.zeros(1)], LateLane(), depth=2)
    assert threads() == []


def test_a_batch_in_use_is_held_by_the_caller_alone():
    lane = LateLane()
    batches = prefetch.prefetch((torch.zeros(3) for _ in range(4)), lane, depth=1)
    first = weakref.ref(next(batches))
    lane.kept.clear()
    assert first() is None
    batches.close()


def test_the_interpreter_ends_with_an_iteration_open():
    """The thread is at work in torch then, with many places left."""
    code = (
        "import itertools, sys; sys.path.insert(0, 'tests/data')\n"
        "import torch; from ernet_fast.data import prefetch; from test_prefetch import LateLane\n"
        "source = (torch.randn(3000).sum().reshape(1) for _ in itertools.count())\n"
        "batches = prefetch.prefetch(source, LateLane(), 5000); next(batches); print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


class TestCopyLane:
    """The calls that a lane makes of torch, in order, with a stream that only writes down what it is asked."""

    @pytest.fixture
    def log(self, monkeypatch):
        log = []

        class Stream:
            def __init__(self, device):
                self.name = "side"

            def wait_event(self, event):
                log.append((self.name, "waits", event.of))

        class Event:
            def record(self, stream):
                self.of = f"event on {stream.name}"
                log.append((stream.name, "records"))

        class Entered:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                log.append((self.stream.name, "is entered"))

            def __exit__(self, *error):
                log.append((self.stream.name, "is left"))

        current = Stream(None)
        current.name = "current"
        real_like, real_to = torch.empty_like, torch.Tensor.to

        def empty_like(array, pin_memory=False, **options):
            if pin_memory:
                log.append(("page-locked", tuple(array.shape)))
            return real_like(array, **options)

        def to(array, device, non_blocking=False):
            log.append(("copy", tuple(array.shape), non_blocking))
            return real_to(array, "cpu", copy=True)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", Entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(torch, "empty_like", empty_like)
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda array, stream: log.append(("memory", stream.name)))
        return log

    def test_order_of_events(self, log):
        batch = [torch.arange(6.0).reshape(2, 3), np.arange(4)]
        (found,) = prefetch.prefetch([batch], prefetch.CopyLane(torch.device("cuda", 0)), depth=2)
        assert torch.equal(found[0], batch[0]) and torch.equal(found[1], torch.arange(4))
        copies = [("side", "is entered"), None, ("side", "is left")]
        assert log == [
            ("page-locked", (2, 3)), *(step or ("copy", (2, 3), True) for step in copies),
            ("page-locked", (4,)), *(step or ("copy", (4,), True) for step in copies),
            ("side", "records"),
            ("current", "waits", "event on side"), ("memory", "current"), ("memory", "current"),
        ]  # fmt: skip

    def test_page_locked_batches_are_not_copied_again(self, log, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda array: True)
        lane = prefetch.CopyLane(torch.device("cuda", 0))
        lane.upload(torch.zeros(2, 3))
        assert log[1] == ("copy", (2, 3), True)
        log.clear()
        lane.upload(torch.zeros(4, 6)[:, ::2])
        assert log[0] == ("page-locked", (4, 3)), "a copy of strided memory would wait"

    def test_memory_format_is_kept(self, log):
        images = torch.rand(2, 3, 5, 7).to("cpu").contiguous(memory_format=torch.channels_last)
        assert prefetch.CopyLane(torch.device("cuda", 0)).upload(images).stride() == images.stride()

    def test_tensors_of_another_device_are_refused(self, log):
        with pytest.raises(RuntimeError, match="a tensor on meta; expected the CPU"):
            prefetch.CopyLane(torch.device("cuda", 0)).upload(torch.empty(1, device="meta"))

    def test_tensors_on_the_device_are_handed_on(self, log):
        lane, here = prefetch.CopyLane(torch.device("cpu")), torch.zeros(2)
        (found,) = prefetch.prefetch([here], lane, depth=1)
        assert found is here and ("memory", "current") not in log


def test_on_the_cpu_batches_pass_through():
    tensor, array = torch.rand(2, 3), np.arange(3.0)
    loader = Prefetcher([(tensor, array), (tensor, "last")], device="cpu")
    assert len(loader) == 2
    for _ in range(2):
        first, last = list(loader)
        assert first[0] is tensor and first[1].data_ptr() == array.ctypes.data and last[1] == "last"
    assert threads() == []


def test_read_only_arrays_are_taken(recwarn):
    array = np.arange(3)
    array.setflags(write=False)
    found = list(Prefetcher([array, np.arange(3)[::-1], np.array(["a"])], device="cpu"))
    assert found[0].tolist() == [0, 1, 2] and found[1].tolist() == [2, 1, 0] and found[2][0] == "a"
    assert len(recwarn) == 0


def test_a_data_loader_with_workers_is_prefetched():
    data = torch.utils.data.TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1)
    found = list(prefetch.prefetch(loader, LateLane(), depth=2))
    assert [labels.tolist() for _, labels in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": 3}, TypeError, "source is a int; expected an iterable"),
        ({"depth": 0}, ValueError, "depth=0; at least one"),
        ({"depth": 1.5}, TypeError, "depth is 1.5; expected an integer"),
        ({"device": "meta"}, ValueError, "device='meta'; expected 'cuda'"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Prefetcher(**{"source": [], "device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_device_is_said_at_once():
    with pytest.raises(RuntimeError, match="torch sees no CUDA device here; pass device='cpu'"):
        Prefetcher([torch.zeros(1)])


@pytest.mark.gpu
class TestOnTheGpu:
    def test_batches_arrive_whole_behind_a_busy_stream(self):
        generator = torch.Generator().manual_seed(0)
        batches = [
            torch.randint(0, 255, (size, 3, 64, 64), generator=generator, dtype=torch.uint8) for size in (8, 8, 3)
        ]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            sums = []
            for batch in Prefetcher(batches * 4, depth=2):
                assert batch.is_cuda
                torch.cuda._sleep(2_000_000)
                sums.append(batch.long().sum())
        stream.synchronize()
        assert [int(value) for value in sums] == [int(batch.long().sum()) for batch in batches] * 4

    def test_taking_a_batch_does_not_wait_for_the_device(self):
        batches = iter(Prefetcher([torch.ones(1 << 20) for _ in range(3)], depth=2))
        next(batches)
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 31)
        busy = torch.cuda.Event()
        busy.record()
        batch = next(batches)
        total = batch.sum()
        assert not busy.query(), "the second batch was handed over while the device was still busy"
        assert float(total) == 1 << 20
        batches.close()

    def test_channels_last_and_nested_batches(self):
        images = torch.rand(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
        (found,) = list(Prefetcher([{"images": images, "name": "a"}], device="cuda:0"))
        assert found["name"] == "a" and found["images"].stride() == images.stride()
        assert torch.equal(found["images"].cpu(), images)
