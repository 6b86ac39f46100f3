"""`make gpu`: on a CUDA GPU, whether the swap gains, parity of every backend, tuning, headline benchmarks, the report.

It begins nothing new after MINUTES (9.5) and says what is left; running it again goes on there, as long as the sources
are the same: every test and every stage is noted as soon as it is done, and one that crashes, hangs or leaves the GPU
unusable costs itself alone. It needs torch, pytest and pytest-benchmark; the report needs the `report` extra too.

PARTS: which of `trial parity tune bench report`. FILES: which test files, by their stems. RESULTS: where result files
go (benchmarks/results). STATE: where notes, logs and the tuning table are kept (build/gpu), a folder for each state of
the sources.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DONE = ("passed", "skipped", "failed")
PARTS = ("trial", "parity", "tune", "bench", "report")
MINUTES = 9.5
GRACE = 15  # seconds
# The longest first: file, and in how many processes.
FILES = {
    **dict.fromkeys(("gradients", "tma", "first_layers_triton", "lrn", "lrn_pool", "implicit_gemm"), 3),
    **dict.fromkeys(("configurations", "warp_specialized", "compile", "bn_relu", "bn_relu_pool", "graphed"), 2),
    **dict.fromkeys(("conv_relu", "conv_relu_pool", "max_pool", "linear_relu", "linear_relu_dropout", "normalize"), 1),
    **dict.fromkeys(("normalize_conv_relu", "normalize_conv_relu_pool", "add_relu", "batch_norm_stages"), 1),
    **dict.fromkeys(("equal_values", "first_layers", "optim", "cuda", "autograd", "func", "sequential", "fuse"), 1),
    **dict.fromkeys(
        ("resnet", "shared_gradients", "strided_operands", "compile_func", "flops", "overrides", "turning"), 1
    ),
}


class Run:
    """One call: its deadline, where it keeps what, and what it found."""

    def __init__(self, minutes: float, state: Path, results: Path) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.state = state
        self.results = results
        self.left: list[str] = []  # what another call has to do
        self.failed: list[str] = []

    @property
    def seconds(self) -> float:
        """How long is left."""
        return self.end - time.monotonic()

    def start(self, *arguments: str, log: Path, **environment: str) -> int | None:
        """Run python with these arguments, its output appended to a file; None where the time is up."""
        if self.seconds < 5:
            return None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file
            )
            try:
                return process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # what is under way is no failure then, and begins anew
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()  # what waits for the GPU heeds nothing less
                process.wait()
            return None


def build(run: Run) -> None:
    """Build the extension for this GPU alone, where it is not built."""
    import torch

    ask = "import fastcnn, sys; sys.exit(not fastcnn.backends()['cuda'].available)"
    log = run.state / "build.log"
    if run.start("-c", ask, log=log) == 0:
        return
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "FASTCNN_BUILD_CUDA": "1",
        "NVCC_APPEND_FLAGS": "",  # a warning of another nvcc is no error here
    }
    run.start("setup.py", "--quiet", "build_ext", "--inplace", log=log, **environment)
    if run.start("-c", ask, log=log) != 0:
        run.failed.append(f"the CUDA extension was not built, see {log}: backend cuda was not tested")


def trial(run: Run) -> None:
    """Answer first of all whether the swap gains: the proof and the trial of three networks, and their times."""
    done, log = run.state / "trial.done", run.state / "trial.log"
    if done.exists():
        return
    log.unlink(missing_ok=True)
    code = run.start(str(HERE / "trial.py"), str(run.results), log=log)
    said = log.read_text() if log.exists() else ""  # nothing where the build has taken all the time
    print("".join(line for line in said.splitlines(keepends=True) if not line.startswith("  ")))
    if code is None:
        run.left.append("trial")
    elif code:
        run.failed.append(f"the trial ended with exit status {code}: see {log}")
    else:
        done.touch()


def parity(run: Run, files: dict[str, int], processes: int) -> None:
    """Run the test files side by side, each test once."""
    shards = [(name, number, count) for name, count in files.items() for number in range(count)]
    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(lambda shard: _tests(run, *shard), shards))
    outcomes = [each for name, number, _ in shards for each in read(run.state / "parity" / f"{name}.{number}.jsonl")]
    counted = Counter(each["outcome"] for each in outcomes if each["outcome"] in DONE)
    print("parity:", ", ".join(f"{counted[kind]} {kind}" for kind in DONE))
    for each in outcomes:
        if each["outcome"] == "failed":
            run.failed.append(f"{each['test']}: {each['text'].strip().splitlines()[-1] if each['text'] else ''}")
    run.failed += [problem for _, problem in done if problem]
    if not all(complete for complete, _ in done):
        run.left.append("parity")


def _tests(run: Run, name: str, number: int, count: int) -> tuple[bool, str]:
    """Run a share of a file's tests, again after each that ended the process: is it complete, what went wrong."""
    place = run.state / "parity" / f"{name}.{number}"
    outcomes, log, complete = (Path(f"{place}.{what}") for what in ("jsonl", "log", "complete"))
    if complete.exists():
        return True, ""
    while True:
        before = len(read(outcomes))
        code = run.start(
            *("-m", "pytest", "-q", "-p", "outcomes", f"tests/test_{name}.py"),
            log=log,
            PYTHONPATH=os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]]),
            FASTCNN_OUTCOMES=str(outcomes),
            FASTCNN_COMPLETE=str(complete),
            FASTCNN_SHARD=f"{number}/{count}",
        )
        if code is None:
            return False, ""
        if complete.exists():  # the plugin's word: a test that hangs ends with an exit status of 1 too
            return True, ""
        if len(read(outcomes)) == before:
            return False, f"tests/test_{name}.py does not run (exit status {code}): see {log}"


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a file of outcomes; a last one that is half-written is none."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def tune(run: Run, processes: int) -> None:
    """Compile and check the candidates of all stages side by side, then time them one by one."""
    marker = run.state / "tune.checked"
    if not marker.exists():
        with ThreadPoolExecutor(processes) as pool:
            shares = range(processes)
            done = list(pool.map(lambda share: _tuned(run, f"check.{share}", "check", f"{share}/{processes}"), shares))
        if not all(done):
            run.left.append("tune")
            return
        marker.touch()
    if not _tuned(run, "time", "time", str(run.results)):
        run.left.append("tune")


def _tuned(run: Run, name: str, *arguments: str) -> bool:
    """Run a step of tuning, again after each candidate that ended it: whether it got to its end."""
    log = run.state / f"tune.{name}.log"
    while True:
        before = len(list(run.state.glob("cache/tuning/*.attempts/*")))
        code = run.start(str(HERE / "tuning.py"), *arguments, log=log)
        if code in (0, None):
            return code == 0
        if len(list(run.state.glob("cache/tuning/*.attempts/*"))) == before:  # no candidate ended it
            run.failed.append(f"tuning ended with exit status {code}: see {log}")
            return False


def bench(run: Run) -> None:
    """Measure the headline cells, with the table that tuning has written."""
    log = run.state / "bench.log"
    log.unlink(missing_ok=True)
    while True:
        minutes = f"{max(run.seconds - 45, 0) / 60:.2f}"  # what was begun must have time to end
        arguments = ("--quick", "--minutes", minutes, "--results", str(run.results))
        code = run.start("-m", "pytest", "benchmarks", *arguments, log=log)
        if code is None or not list(run.results.glob("*/*.under-way")):  # else a row has ended the process
            break
    said = log.read_text() if log.exists() else ""
    print(said[said.rfind("= times =") :])
    if code is None or "run again to go on" in said:
        run.left.append("bench")
    elif " rows in " not in said:
        run.failed.append(f"the benchmarks ended with exit status {code}: see {log}")


def report(run: Run) -> None:
    """Write the report, where the packages for it are there."""
    log = run.state / "report.log"
    arguments = ("-m", "benchmarks.report", str(run.results), "--output", str(run.results / "report"))
    if run.start(*arguments, log=log) != 0:
        print(f"no report (see {log}): run `python {' '.join(arguments)}` where the report extra is installed")


def main(parts: Sequence[str]) -> int:
    """Do the parts that were asked for, and say what was found and what is left."""
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        print("make gpu: no CUDA GPU that this torch can use; nothing was run (make test checks all that needs none)")
        return 1
    if unknown := [part for part in parts if part not in PARTS]:
        print(f"make gpu: PARTS: expected some of {' '.join(PARTS)}, got {' '.join(unknown)}")
        return 2
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # this tree
    sys.path.insert(0, str(ROOT))
    from benchmarks.results import commit

    tests = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "tests").glob("*.py")))).hexdigest()
    state = Path(os.environ.get("STATE", ROOT / "build/gpu")).absolute() / f"{commit()}-{tests[:8]}"
    results = Path(os.environ.get("RESULTS", ROOT / "benchmarks/results")).absolute()
    run = Run(float(os.environ.get("MINUTES", MINUTES)), state, results)
    asked = os.environ.get("FILES", " ".join(FILES)).split()
    files = {name: FILES.get(name, 1) for name in asked}
    os.environ["FASTCNN_CACHE"] = str(state / "cache")  # the table of this run, which its benchmarks follow
    state.mkdir(parents=True, exist_ok=True)
    build(run)
    processes = max(1, min(12, (os.cpu_count() or 2) - 2))
    steps: dict[str, Callable[[], None]] = {
        "trial": lambda: trial(run),
        "parity": lambda: parity(run, files, processes),
        "tune": lambda: tune(run, min(processes, 8)),
    }
    steps |= {"bench": lambda: bench(run), "report": lambda: report(run)}
    for part in PARTS:
        if part in parts:
            began = time.monotonic()
            steps[part]()
            print(f"make gpu: {part} took {time.monotonic() - began:.0f} s", flush=True)
    for each in run.failed:
        print("FAILED", each)
    print(
        f"\nmake gpu on {torch.cuda.get_device_name()}: results in {run.results}, logs and the tuning table in {state}"
    )
    if run.left:
        print(f"make gpu: out of time in {', '.join(run.left)}: run again to go on")
    print(f"make gpu: {len(run.failed) or 'nothing'} FAILED" + (" so far" if run.left else ""))
    return 1 if run.failed or run.left else 0


if __name__ == "__main__":
    sys.exit(main(os.environ.get("PARTS", " ".join(PARTS)).split()))
