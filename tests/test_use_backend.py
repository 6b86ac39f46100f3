"""use_backend: for a process, a block, a function, a thread, and one inside another."""

import threading

import pytest
import torch
from test_backend import algorithm, randn, runs_kernels

import fastcnn
import fastcnn.functional as FF


@pytest.fixture(autouse=True)
def _leave_the_backend_as_it_was():
    with fastcnn.use_backend("auto"):
        yield


def test_sets_for_every_call_that_follows():
    fastcnn.use_backend("triton")
    assert runs_kernels()
    fastcnn.use_backend("torch")
    assert not runs_kernels()


def test_scopes_and_restores():
    with fastcnn.use_backend("triton"):
        assert runs_kernels()
    assert not runs_kernels()


def test_restores_after_an_exception():
    def fail_inside():
        with fastcnn.use_backend("triton"):
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert not runs_kernels()


def test_nests():
    with fastcnn.use_backend("triton"):
        with fastcnn.use_backend("torch"):
            assert not runs_kernels()
            with fastcnn.use_backend("triton"):
                assert runs_kernels()
            assert not runs_kernels()
        assert runs_kernels()


def test_algorithm_is_scoped_with_the_backend():
    with fastcnn.use_backend("triton", algorithm="implicit_gemm"):
        assert algorithm() == "implicit_gemm"
        with fastcnn.use_backend("triton", algorithm="epilogue"):
            assert algorithm() == "epilogue"
        assert algorithm() == "implicit_gemm"
    with fastcnn.use_backend("triton"):
        assert algorithm() is None


@pytest.mark.parametrize(
    ("backend", "algorithm", "able", "why"),
    [
        ("auto", "tma", "one of 'triton'", "chooses algorithms itself"),
        ("auto", "implicit_gemm:128x64x32w8s3", "one of 'triton', 'cuda'", "chooses algorithms itself"),
        ("torch", "epilogue", "one of 'triton', 'cuda', 'cpu'", "has none"),
        ("torch", "epilogue+wgrad", "one of 'triton'", "has none"),
        ("auto", "direct+wgrad", "and none has all of it", "chooses algorithms itself"),
    ],
)
def test_an_algorithm_needs_its_backend_named(backend, algorithm, able, why):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fastcnn.use_backend(backend, algorithm=algorithm)
    assert str(caught.value) == (
        f"algorithm: {algorithm!r} needs its backend named, {able} (use_backend, FASTCNN_BACKEND); "
        f"got backend {backend!r}, which {why}"
    )


def test_worker_threads_see_the_backend():
    seen = []
    with fastcnn.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(runs_kernels()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_an_object_may_be_entered_again_and_within_itself():
    triton = fastcnn.use_backend("triton")
    assert runs_kernels()  # until a block takes over what making the object chose
    for _ in range(2):
        with triton:
            with triton:
                assert runs_kernels()
            assert runs_kernels()
        assert not runs_kernels()


def test_a_block_undoes_only_its_own_choice():
    torch_then = fastcnn.use_backend("torch")
    fastcnn.use_backend("triton")
    with torch_then:
        assert not runs_kernels()
    assert runs_kernels()


def test_decorates_a_function_for_its_calls_alone():
    @fastcnn.use_backend("triton")
    def recurse(depth):
        """Count down."""
        return [runs_kernels(), *(recurse(depth - 1) if depth else [])]

    assert not runs_kernels()
    assert recurse(2) == [True] * 3
    assert not runs_kernels()
    assert recurse.__doc__ == "Count down."


def test_decorates_a_generator_while_it_runs():
    @fastcnn.use_backend("triton")
    def steps():
        yield runs_kernels()
        yield runs_kernels()

    seen = []
    for step in steps():
        seen += [step, runs_kernels()]
    assert seen == [True, False, True, False]


def test_overlapping_blocks_of_threads_leave_each_other_and_the_process_alone():
    entered, leave, seen = threading.Barrier(3), threading.Barrier(3), {}

    def block(name, last):
        with fastcnn.use_backend(name):
            entered.wait()
            seen[name] = runs_kernels()
            leave.wait()
            if last:
                threads[0].join()  # the first block has ended, this one goes on
                seen["after the first"] = runs_kernels()
        seen[f"after {name}"] = runs_kernels()

    threads = [threading.Thread(target=block, args=each) for each in (("torch", False), ("triton", True))]
    for thread in threads:
        thread.start()
    entered.wait()
    seen["process"] = runs_kernels()
    leave.wait()
    for thread in threads:
        thread.join()
    kernels = {"triton", "after the first"}
    assert seen == {
        each: each in kernels
        for each in ("torch", "triton", "process", "after the first", "after torch", "after triton")
    }
    assert not runs_kernels()


def test_a_block_counts_within_a_compiled_function_without_a_break():
    targets = []

    def note(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    @torch.compile(backend=note, fullgraph=True)
    def pools(x):
        with fastcnn.use_backend("torch"):
            x = FF.max_pool2d(x, 2)
        return FF.max_pool2d(x, 2)

    torch._dynamo.reset()
    with fastcnn.use_backend("triton"):
        pools(randn(1, 2, 8, 8))
        assert [target for target in targets if target.startswith("fastcnn.")] == ["fastcnn.max_pool.triton"]
        assert runs_kernels()
    assert not runs_kernels()


def test_threads_go_on_following_the_process_after_a_block_of_their_own():
    seen = []

    def work():
        with fastcnn.use_backend("torch"):
            seen.append(runs_kernels())
        seen.append(runs_kernels())

    with fastcnn.use_backend("triton"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ({"name": "cudnn"}, "backend", "cudnn"),
        ({"name": ""}, "backend", ""),
        ({"name": "Triton"}, "backend", "Triton"),
        ({"name": "triton", "algorithm": "winograd"}, "algorithm", "winograd"),
    ],
)
def test_unknown_name_is_a_value_error_that_lists_the_names(arguments, name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected one of .*, got '{value}'"):
        fastcnn.use_backend(**arguments)
    assert not runs_kernels()


def test_backends_tells_what_is_available_and_why_one_is_not():
    status = fastcnn.backends()
    assert list(status) == ["auto", "torch", "triton", "cuda", "cpu"]
    assert status["auto"].available
    assert status["torch"].available
    assert all(bool(entry.reason) != entry.available for entry in status.values())


@pytest.mark.parametrize("name", [name for name, status in fastcnn.backends().items() if not status.available])
def test_unavailable_backend_is_a_runtime_error_with_the_reason(name):
    with pytest.raises(RuntimeError) as caught:
        fastcnn.use_backend(name)
    assert repr(name) in str(caught.value)
    assert fastcnn.backends()[name].reason in str(caught.value)
    assert not runs_kernels()
