"""Saves with ``snapshot="lazy"``: what is written is what was there at the call, and training waits for memory only."""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import optimizer

import async_ckpt
from async_ckpt import CheckpointService, StateChangedError
from tests.lazy_training import Training, copies_held, digest, digest_of_torch, left_to_copy
from tests.support import PATIENCE_SECONDS, Harness, complaints, gated, python, reached


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a file goes."""
    return tmp_path / "a.ckpt"


def test_every_save_of_a_training_is_right(path: Path) -> None:
    """Many saves, a step after each, the threads as they come: each file is what torch.save would have written (S1)."""
    training = Training(numel=1 << 19)
    with CheckpointService(snapshot="lazy") as service:
        training.step()
        for number in range(12):
            expected = digest_of_torch(training.state())
            handle = service.save(training.state(), path)
            for _ in range(number % 3):
                training.step()
            handle.wait(PATIENCE_SECONDS)
            assert digest(path) == expected


def test_most_is_copied_after_the_call(path: Path) -> None:
    """The call copies small things only; backward and zero_grad wait for nothing; the step does, and helps."""
    training = Training()
    with CheckpointService(snapshot="lazy") as service, copies_held(service) as go_on:
        training.step()
        expected = digest_of_torch(training.state())
        handle = service.save(training.state(), path)
        _, snapshot = _newest(service)
        assert left_to_copy(snapshot) == 9 * (4 << 16)
        training.loss()
        training.optimizer.zero_grad()
        assert not snapshot.later.is_complete
        training.step()  # although no worker copies
        assert snapshot.later.is_complete
        training.step()
        go_on.set()
        handle.wait(PATIENCE_SECONDS)
    assert digest(path) == expected


def test_a_step_does_not_wait_for_storage() -> None:
    """A save that waits behind one whose storage hangs is copied all the same, and no step waits."""
    gate, hold = gated()
    training = Training()
    with Harness(hold, memory=True, queue_depth=3, snapshot="lazy") as harness:
        training.step()
        handles, files = [], []
        for name in "abc":
            files.append(digest_of_torch(training.state()))
            handles.append(harness.service.save(training.state(), f"memory://{name}"))
            training.step()
        reached(gate)
        gate.open()
        for handle in handles:
            handle.wait(PATIENCE_SECONDS)
        assert harness.memory is not None
        assert [digest(harness.memory.files[f"/{name}"]) for name in "abc"] == files


def test_a_write_in_the_window_fails_the_save_and_says_where(path: Path, caplog: Any) -> None:
    """Weights that are changed before they are copied, but not by a step, fail that save; later ones copy at once."""
    training = Training()
    with CheckpointService(snapshot="lazy") as service:
        with copies_held(service):
            training.step()
            handle = service.save(training.state(), path)
            with torch.no_grad():
                training.params[1].add_(1)
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(StateChangedError, match="snapshot='copy'") as raised,
        ):
            handle.wait(PATIENCE_SECONDS)
        assert raised.value.where == "state['model']['p1']"
        assert not path.exists()
        assert [each.message for each in caplog.records if "is off from now on" in each.message]
        expected = digest_of_torch(training.state())
        handle = service.save(training.state(), path)
        with torch.no_grad():
            training.params[1].add_(1)
        handle.wait(PATIENCE_SECONDS)
        assert digest(path) == expected


def test_the_failure_is_raised_at_the_next_call_if_nobody_waits(path: Path) -> None:
    """As that of any other save (E1); the step itself raises nothing."""
    training = Training()
    with CheckpointService(snapshot="lazy") as service:
        with copies_held(service):
            training.step()
            service.save(training.state(), path)
            training.optimizer.state[training.params[0]]["exp_avg"].zero_()
            training.step()
        with pytest.raises(StateChangedError, match="exp_avg"):
            service.wait(PATIENCE_SECONDS)


def test_a_write_after_the_copy_turns_it_off_but_fails_nothing(path: Path, caplog: Any) -> None:
    """Whoever changes weights in the window is told, though this time the copy came first."""
    gate, hold = gated()
    training = Training()
    with Harness(hold, memory=True, snapshot="lazy") as harness:
        training.step()
        expected = digest_of_torch(training.state())
        handle = harness.service.save(training.state(), "memory://a")
        reached(gate)  # so it is copied
        with torch.no_grad():
            training.params[0].zero_()
        with caplog.at_level(logging.WARNING):
            training.step()
        assert "otherwise than by its step" in caplog.text
        gate.open()
        handle.wait(PATIENCE_SECONDS)
        assert harness.memory is not None
        assert digest(harness.memory.files["/a"]) == expected


def test_checksums_find_what_torch_does_not_count(path: Path) -> None:
    """With verify_snapshots, a write through .data in the window fails the save."""
    training = Training()
    with CheckpointService(snapshot="lazy", verify_snapshots=True) as service:
        training.step()
        with copies_held(service):
            handle = service.save(training.state(), path)
            training.params[0].data[7] = 1
        with pytest.raises(StateChangedError, match="unseen by torch") as raised:
            handle.wait(PATIENCE_SECONDS)
        assert raised.value.where == "state['model']['p0']"
        service.save(training.state(), path).wait(PATIENCE_SECONDS)


def test_two_saves_in_a_row_share_the_memory_that_is_yet_to_be_copied() -> None:
    """What save_last=True does: the second save takes no memory, copies nothing, and is right (B1)."""
    gate, hold = gated()
    training = Training()
    with (
        Harness(hold, memory=True, queue_depth=3, snapshot="lazy") as harness,
        copies_held(harness.service) as go_on,
    ):
        training.step()
        expected = digest_of_torch(training.state())
        first = harness.service.save(training.state(), "memory://a")
        second = harness.service.save(training.state(), "memory://b")
        assert len(harness.service._own.resources.account.pool._leased) == 1
        training.step()
        changed = digest_of_torch(training.state())
        third = harness.service.save(training.state(), "memory://c")
        assert len(harness.service._own.resources.account.pool._leased) == 2
        go_on.set()
        gate.open()
        for handle, file in ((first, expected), (second, expected), (third, changed)):
            handle.wait(PATIENCE_SECONDS)
            assert harness.memory is not None
            assert digest(harness.memory.files[handle.url.removeprefix("memory:/")]) == file


def test_a_save_that_is_removed_before_it_ran_stands_in_nobodys_way(path: Path) -> None:
    """Nothing of a save that is cancelled is copied, no step waits for it, and its memory serves the next one (O3)."""
    gate, hold = gated(calls=[1])
    training = Training()
    with (
        Harness(hold, memory=True, queue_depth=3, snapshot="lazy") as harness,
        copies_held(harness.service) as go_on,
    ):
        training.step()
        harness.service.save({"x": torch.ones(3)}, "memory://first")
        cancelled = harness.service.save(training.state(), "memory://a")
        later = _newest(harness.service)[1].later
        removed = harness.service.remove("memory://a")
        with pytest.raises(async_ckpt.CancelledSaveError):
            cancelled.wait(PATIENCE_SECONDS)
        assert not any(share.stepper.fences for share in later._shares)
        training.step()
        assert not later.is_complete
        go_on.set()
        gate.open()
        removed.wait(PATIENCE_SECONDS)
        expected = digest_of_torch(training.state())
        harness.service.save(training.state(), "memory://a").wait(PATIENCE_SECONDS)
        assert harness.memory is not None
        assert digest(harness.memory.files["/a"]) == expected


def test_closing_gives_up_what_is_not_copied(tmp_path: Path) -> None:
    """A service that is closed without time fails its saves; training goes on, and no fence stands (D4)."""
    gate, hold = gated()
    training = Training()
    with Harness(hold, memory=True, snapshot="lazy", abandon_grace_seconds=0.0) as harness:
        training.step()
        harness.service.save({"x": torch.ones(3)}, "memory://first")
        harness.service.save(training.state(), "memory://a")
        later = _newest(harness.service)[1].later
        with pytest.raises(async_ckpt.FlushError):
            harness.service.close(timeout=0.0)
        assert not any(share.stepper.fences for share in later._shares)
        training.step()
        gate.open()


def test_a_forked_child_waits_for_nothing(path: Path) -> None:
    """In a child that is forked in the window, steps are its own; the parent's file is right (L1)."""
    training = Training()
    with CheckpointService(snapshot="lazy") as service, copies_held(service) as go_on:
        training.step()
        expected = digest_of_torch(training.state())
        handle = service.save(training.state(), path)
        child = multiprocessing.get_context("fork").Process(target=_step_in_child, args=(training,))
        child.start()
        child.join(PATIENCE_SECONDS)
        assert child.exitcode == 0
        training.step()
        go_on.set()
        handle.wait(PATIENCE_SECONDS)
    assert digest(path) == expected


def _step_in_child(training: Training) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        training.params[0].add_(1)
    training.optimizer.step()


def test_the_exit_completes_what_is_pending(path: Path) -> None:
    """A program that ends right after the call leaves the right file (D4)."""
    done = python(
        f"""
        import torch
        from async_ckpt import CheckpointService
        from tests.lazy_training import Training, digest_of_torch
        service = CheckpointService(snapshot="lazy")
        training = Training()
        training.step()
        open({str(path)!r} + ".expected", "w").write(digest_of_torch(training.state()))
        service.save(training.state(), {str(path)!r})
        """
    )
    assert done.returncode == 0, complaints(done)
    assert digest(path) == Path(f"{path}.expected").read_text()


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
def test_a_signal_handler_saves_and_steps_while_a_step_waits(path: Path, tmp_path: Path) -> None:
    """A handler that interrupts the copy before a step may save, and even step; both files are right (L1)."""
    training = Training(numel=1 << 21)
    other = tmp_path / "b.ckpt"
    with CheckpointService(snapshot="lazy", queue_depth=3) as service, copies_held(service) as go_on:
        training.step()
        expected = digest_of_torch(training.state())
        handles = [service.save(training.state(), path)]
        later = _newest(service)[1].later
        files: list[str] = []

        def handler(number: int, frame: Any) -> None:
            assert not later.is_complete
            files.append(digest_of_torch(training.state()))
            handles.append(service.save(training.state(), other))
            training.optimizer.step()

        before = signal.signal(signal.SIGUSR1, handler)
        share = later._shares[0]
        move, once = share._move, iter([True])

        def interrupted(*args: Any) -> None:
            if next(once, False):
                os.kill(os.getpid(), signal.SIGUSR1)
            move(*args)

        share._move = interrupted
        try:
            training.optimizer.step()
        finally:
            signal.signal(signal.SIGUSR1, before)
        go_on.set()
        for handle in handles:
            handle.wait(PATIENCE_SECONDS)
    assert digest(path) == expected
    assert digest(other) == files[0]


def test_an_interrupted_step_can_be_taken_again(path: Path) -> None:
    """Ctrl-C while a step waits for the copy ends the step before it changes anything; the file is right."""
    training = Training()
    with CheckpointService(snapshot="lazy") as service, copies_held(service) as go_on:
        training.step()
        expected = digest_of_torch(training.state())
        handle = service.save(training.state(), path)
        share = _newest(service)[1].later._shares[0]
        move, calls = share._move, []

        def interrupted(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            move(*args)

        share._move = interrupted
        before = training.params[0].detach().clone()
        with pytest.raises(KeyboardInterrupt):
            training.optimizer.step()
        assert torch.equal(before, training.params[0])
        training.optimizer.step()
        go_on.set()
        handle.wait(PATIENCE_SECONDS)
    assert digest(path) == expected


def test_several_optimizers_wait_each_for_its_own(path: Path) -> None:
    """The step of one copies what it changes, not what another one will; as with an optimizer for each layer."""
    one, two = Training(), Training(torch.optim.SGD, lr=0.1)
    with CheckpointService(snapshot="lazy") as service, copies_held(service) as go_on:
        one.step()
        two.step()
        state = {"one": one.state(), "two": two.state()}
        expected = digest_of_torch(state)
        handle = service.save(state, path)
        later = _newest(service)[1].later
        two.step()
        assert [share.is_decided for share in later._shares] == [False, True]
        one.step()
        assert later.is_complete
        go_on.set()
        handle.wait(PATIENCE_SECONDS)
    assert digest(path) == expected


def test_two_services_and_two_saves_of_the_same_weights(tmp_path: Path) -> None:
    """One step passes the fences of all saves in flight, of all services."""
    training = Training()
    with CheckpointService(snapshot="lazy") as one, CheckpointService(snapshot="lazy") as two:
        with copies_held(one), copies_held(two):
            training.step()
            expected = digest_of_torch(training.state())
            handles = [
                service.save(training.state(), tmp_path / f"{n}.ckpt") for n, service in enumerate((one, two))
            ]
            training.step()
        for handle in handles:
            handle.wait(PATIENCE_SECONDS)
            assert digest(Path(handle.url)) == expected


def test_a_load_comes_after_the_copy(path: Path, tmp_path: Path) -> None:
    """Who loads a checkpoint will write to the weights: the load has what is pending copied first."""
    training = Training()
    with CheckpointService(snapshot="lazy") as service:
        training.step()
        service.save(training.state(), path).wait(PATIENCE_SECONDS)
        with copies_held(service) as go_on:
            training.step()
            expected = digest_of_torch(training.state())
            handle = service.save(training.state(), tmp_path / "b.ckpt")
            loaded = service.load(path)
            with torch.no_grad():
                for name, value in loaded["model"].items():
                    training.params[int(name[1:])].copy_(value)
            go_on.set()
            handle.wait(PATIENCE_SECONDS)
    assert digest(tmp_path / "b.ckpt") == expected


def test_an_optimizer_that_is_gone_leaves_right_files(path: Path) -> None:
    """Another optimizer of the same weights waits, too."""
    training = Training()
    with CheckpointService(snapshot="lazy") as service, copies_held(service) as go_on:
        training.step()
        expected = digest_of_torch(training.state())
        handle = service.save(training.state(), path)
        training.optimizer = torch.optim.SGD(training.params, lr=0.1)
        gc.collect()
        training.step()
        go_on.set()
        handle.wait(PATIENCE_SECONDS)
    assert digest(path) == expected


def test_training_is_the_same_and_nothing_is_left_on_the_optimizer() -> None:
    """Same numbers, same random state; optimizers can be copied, pickled and freed; parameters can be swapped."""
    with CheckpointService(snapshot="lazy"):
        pass
    torch.manual_seed(1)
    training = Training()
    training.step()
    with_hooks = digest_of_torch(training.state()), torch.get_rng_state()
    pre, post = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
    kept = dict(pre), dict(post)
    pre.clear()
    post.clear()
    try:
        torch.manual_seed(1)
        plain = Training()
        plain.step()
        assert digest_of_torch(plain.state()) == with_hooks[0]
        assert torch.equal(torch.get_rng_state(), with_hooks[1])
    finally:
        pre.update(kept[0])
        post.update(kept[1])
    assert set(vars(training.optimizer)) == set(vars(plain.optimizer))
    copy.deepcopy(training.optimizer).step()
    pickle.loads(pickle.dumps(training.optimizer)).step()
    torch.utils.swap_tensors(training.params[0], torch.nn.Parameter(torch.ones(3)))
    gone = weakref.ref(training.optimizer)
    del training
    gc.collect()
    assert gone() is None


def _newest(service: CheckpointService) -> Any:
    newest = service._own.resources.account.newest
    assert newest is not None
    return newest
