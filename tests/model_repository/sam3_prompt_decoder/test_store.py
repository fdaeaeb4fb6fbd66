"""Kept images: which are evicted and when, and that no other memory is kept."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from store import ID_BYTES, Features, ImageNotKept, ImageStore, StoreTooSmall

SHAPE = (2, 1, 2)
SIZE = 3 * 4 * 4
"""Bytes of one image below: three tensors of four floats."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def image(value: float = 0.0, dtype: torch.dtype = torch.float32) -> Features:
    return Features(*(torch.full(SHAPE, value, dtype=dtype) for _ in range(3)))


def store(images: float = 2, idle: float = 10, clock: Clock | None = None) -> ImageStore:
    return ImageStore(int(images * SIZE), idle, clock or Clock())


def kept(shelf: ImageStore, image_id: str) -> bool:
    try:
        shelf.get(image_id)
    except ImageNotKept:
        return False
    return True


def test_a_kept_image_is_found() -> None:
    shelf = store()
    first, second = shelf.keep(image(1)), shelf.keep(image(2))
    assert torch.equal(shelf.get(first).image_embed, torch.ones(SHAPE))
    assert torch.equal(shelf.get(second).high_res_feats_1, torch.full(SHAPE, 2.0))
    assert (len(shelf), shelf.nbytes) == (2, 2 * SIZE)


def test_a_copy_is_kept() -> None:
    shelf, features = store(), image(1)
    image_id = shelf.keep(features)
    for tensor in features:
        tensor.zero_()
    assert all(torch.equal(tensor, torch.ones(SHAPE)) for tensor in shelf.get(image_id))


def test_features_are_kept_channels_last() -> None:
    sent = Features(*(torch.randn(3, 4, 5) for _ in range(3)))
    for tensor, given in zip(sent.kept_copy(), sent, strict=True):
        assert torch.equal(tensor, given)
        assert tensor.permute(1, 2, 0).is_contiguous()


def test_a_slice_is_kept_without_the_rest_of_its_batch() -> None:
    batch = torch.arange(40.0).reshape(10, *SHAPE)
    shelf = store()
    shelf.get(shelf.keep(Features(batch[0], batch[1], batch[2])))
    (entry,) = shelf._entries.values()
    assert sum(t.untyped_storage().nbytes() for t in entry.features) == shelf.nbytes == SIZE


def test_the_type_is_kept() -> None:
    shelf = store()
    assert shelf.get(shelf.keep(image(1, torch.float16))).image_embed.dtype == torch.float16
    assert shelf.nbytes == SIZE // 2


@pytest.mark.semantic("session", "the least recently used image is evicted first", "the contract")
def test_the_least_recently_used_image_is_evicted_first() -> None:
    shelf = store(images=3)
    a, b, c = (shelf.keep(image(i)) for i in range(3))
    shelf.get(a)
    d = shelf.keep(image(3))
    assert [kept(shelf, i) for i in (a, b, c, d)] == [True, False, True, True]
    e = shelf.keep(image(4))
    assert [kept(shelf, i) for i in (a, c, d, e)] == [False, True, True, True]


@pytest.mark.semantic("session", "kept images are bounded in bytes", "the contract")
def test_the_limit_is_in_bytes_and_not_in_images() -> None:
    shelf = store(images=2.5)
    ids = [shelf.keep(image(i)) for i in range(2)]
    small = shelf.keep(image(9, torch.float16))
    assert all(kept(shelf, i) for i in (*ids, small))
    assert shelf.nbytes == 2.5 * SIZE
    shelf.keep(image())
    assert [kept(shelf, i) for i in (*ids, small)] == [False, True, True]
    assert shelf.nbytes <= shelf.max_bytes


@pytest.mark.semantic("session", "kept images are bounded in idle seconds", "the contract")
def test_idle_images_are_evicted() -> None:
    clock = Clock()
    shelf = store(images=9, idle=10, clock=clock)
    old = shelf.keep(image())
    clock.now += 6
    new = shelf.keep(image())
    clock.now += 5
    assert not kept(shelf, old)
    assert kept(shelf, new)


def test_a_used_image_is_not_idle() -> None:
    clock = Clock()
    shelf = store(idle=10, clock=clock)
    image_id = shelf.keep(image())
    for _ in range(5):
        clock.now += 9
        assert kept(shelf, image_id)
    clock.now += 11
    assert not kept(shelf, image_id)


def test_a_sweep_evicts_without_a_request() -> None:
    clock = Clock()
    shelf = store(idle=10, clock=clock)
    shelf.keep(image())
    shelf.sweep()
    assert len(shelf) == 1
    clock.now += 11
    shelf.sweep()
    assert (len(shelf), shelf.nbytes, shelf.counts.evictions) == (0, 0, 1)


def test_an_image_that_was_never_kept_is_not_found() -> None:
    shelf = store()
    shelf.keep(image())
    for image_id in ("", "unknown", "\ufffd", "a" * 10_000):
        with pytest.raises(ImageNotKept):
            shelf.get(image_id)


def test_an_image_larger_than_the_store_is_rejected_and_evicts_no_other() -> None:
    shelf = store(images=1)
    image_id = shelf.keep(image())
    large = Features(*(torch.zeros(5, 1, 1) for _ in range(3)))
    with pytest.raises(StoreTooSmall) as caught:
        shelf.keep(large)
    assert str(caught.value) == (
        "keep_image is not possible: this request's embeddings take 60 bytes, but this server "
        "keeps at most 48 in all; ask without keep_image or for fewer images at a time, or raise "
        "kept_images_bytes in sam3_prompt_decoder's config"
    )
    assert kept(shelf, image_id)


def test_images_of_one_request_must_fit_together() -> None:
    shelf = store(images=2)
    shelf.check_size([image()] * 2)
    with pytest.raises(StoreTooSmall, match=r"take 144 bytes, .* at most 96 in all"):
        shelf.check_size([image()] * 3)


def test_everything_is_counted() -> None:
    shelf = store(images=1)
    first = shelf.keep(image())
    second = shelf.keep(image())
    kept(shelf, first), kept(shelf, second), kept(shelf, second)
    counts = shelf.counts
    assert (counts.hits, counts.misses, counts.evictions) == (2, 1, 1)


@pytest.mark.semantic("session", "ids are unique and cannot be guessed", "the contract")
def test_ids_are_unique_and_long_enough_not_to_be_guessed() -> None:
    shelf = store(images=5)
    ids = [shelf.keep(image()) for _ in range(500)]
    assert len(set(ids)) == 500
    assert ID_BYTES >= 16
    assert all(re.fullmatch(r"[\w-]{22}", image_id) for image_id in ids)
    # The same image twice gives two ids: an id says nothing about its image.
    bits = [sum(a != b for a, b in zip(x, y, strict=True)) for x, y in pairwise(ids)]
    assert min(bits) > 8


def test_threads_share_a_store() -> None:
    """Every id gives its own image or none, and every byte is counted."""

    def clock() -> float:
        time.sleep(1e-4)  # the store reads it halfway through, and another thread runs
        return 0.0

    shelf = ImageStore(2 * SIZE, 1, clock)

    def work(number: int) -> None:
        for _ in range(25):
            image_id = shelf.keep(image(number))
            shelf.sweep()
            try:
                found = shelf.get(image_id)
            except ImageNotKept:
                continue
            assert all(bool((t == number).all()) for t in found)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert (len(shelf), shelf.nbytes) == (2, 2 * SIZE)
    assert shelf.counts.evictions == 8 * 25 - 2
    assert shelf.counts.hits + shelf.counts.misses == 8 * 25
