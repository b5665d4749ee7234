"""Memory of large results: used again once freed, never while a tensor lives."""

import threading

import torch

from mlpkit.functional import linear_act_dropout

WEIGHT = torch.eye(512)


def result(value, rows=256):
    """Half a MiB and more, all of one value."""
    return linear_act_dropout(torch.full((rows, 512), value), WEIGHT, activation="identity")


def test_a_freed_result_gives_its_memory_to_the_next_of_its_size():
    first = result(1.0)
    place = first.data_ptr()
    del first
    assert result(2.0, rows=300).data_ptr() != place
    assert result(2.0).data_ptr() == place


def test_living_results_share_nothing():
    living = [result(float(i)) for i in range(5)]
    result(9.0)
    for i, y in enumerate(living):
        assert torch.equal(y, torch.full((256, 512), float(i)))


def test_a_view_keeps_the_memory():
    row = result(3.0)[7]
    result(4.0)
    assert torch.equal(row, torch.full((512,), 3.0))


def test_it_grows_and_moves_like_any_tensor():
    y = result(1.0)
    y.resize_(600, 512)
    assert torch.equal(y[:256], torch.ones(256, 512))
    assert torch.equal(result(2.0).share_memory_(), torch.full((256, 512), 2.0))


def test_threads_that_free_and_ask_at_once_get_memory_of_their_own():
    wrong = []

    def work(value):
        for _ in range(50):
            y = result(value)
            if not torch.equal(y, torch.full_like(y, value)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
