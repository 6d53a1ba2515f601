"""Engines that cannot run here, as processes that speak their command line and API. Standard library only.

`install(folder)` writes an executable for each of `vllm` (0.33.0), `sglang` (0.5.23), `trtllm-serve` (1.2) and
`tritonserver` (2.60). Flags, relations, messages and metric names are those of the named versions, written down here a
second time and not read from Flyball's catalogues, so that a mistake there is found. An unknown flag or an illegal
combination is refused in the engine's own words and with its exit code.

What goes wrong on real machines is asked for by the variable STUB_FAULT: `hang` (never ready), `killed` (by signal 9
while it starts), `crash` (aborts at the first request), `oom` (at the first request). STUB_CHILD names a file that gets
the process id of a grandchild in a session of its own, as engines' workers are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULT = os.environ.get("STUB_FAULT", "")
TOKEN_S = 0.001


def install(folder: Path) -> Path:
    """Executables of all stubs in `folder/bin`; returns the folder, as a virtual environment would be given."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("vllm", "sglang", "trtllm-serve", "tritonserver"):
        path = folder / "bin" / name
        path.write_text(f"#!{sys.executable} -SE\nexec(compile(open({__file__!r}).read(), {__file__!r}, 'exec'))\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def say(line: str) -> None:
    """A line of the log."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Counts:
    """What the server has done, for its metrics."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests = self.prompt = self.generated = 0
        self.ttft_s = self.e2e_s = 0.0


class Handler(BaseHTTPRequestHandler):
    """OpenAI's completions, health and metrics; Triton's v2 API where a repository is given."""

    counts = Counts()
    metrics: dict[str, str]  # our word -> the engine's name
    metrics_path = "/metrics"
    model = ""
    triton: Triton | None = None

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, body: object, status: int = 200, kind: str = "application/json") -> None:
        """A whole reply."""
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        """Health, metrics, models."""
        if self.path == "/health" and self.triton is None:
            self.answer("")
        elif self.path == self.metrics_path:
            self.answer(self.exposition(), kind="text/plain")
        elif self.path == "/v1/models" and self.triton is None:
            self.answer({"object": "list", "data": [{"id": self.model, "object": "model", "max_model_len": 1024}]})
        elif self.triton is not None:
            self.answer(*self.triton.get(self.path))
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        """Completions, and Triton's model control."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.triton is not None and self.path.startswith("/v2/repository"):
            self.answer(*self.triton.post(self.path))
        elif self.path == "/v1/completions" and self.triton is None:
            request = json.loads(body)
            self.stream(request["max_tokens"], len(request["prompt"]), openai=True)
        elif self.triton is not None and self.path == f"/v2/models/{self.triton.model}/generate_stream":
            request = json.loads(body)
            self.stream(request["max_tokens"], len(request["text_input"].split()), openai=False)
        else:
            self.answer({"error": "not found"}, 404)

    def stream(self, tokens: int, prompt: int, *, openai: bool) -> None:
        """An answer, token by token."""
        if FAULT == "crash":
            os.abort()
        if FAULT == "oom":
            say("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
            os._exit(1)
        begun = time.monotonic()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for i in range(tokens):
            time.sleep(TOKEN_S)
            if i == 0:
                first = time.monotonic() - begun
            event = {"choices": [{"index": 0, "text": " a", "token_ids": [7]}]} if openai else {"text_output": " a"}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        if openai:
            self.wfile.write(b"data: [DONE]\n\n")
        with self.counts.lock:
            self.counts.requests += 1
            self.counts.prompt += prompt
            self.counts.generated += tokens
            self.counts.ttft_s += first
            self.counts.e2e_s += time.monotonic() - begun

    def exposition(self) -> str:
        """What Prometheus would scrape."""
        c = self.counts
        values = {
            "ttft_sum": c.ttft_s, "ttft_count": c.requests, "e2e_sum": c.e2e_s, "e2e_count": c.requests,
            "running": 0, "prompt": c.prompt, "generated": c.generated, "done": c.requests,
        }  # fmt: skip
        lines = ["# HELP stub a stub"]
        lines += [f'{name}{{model_name="m"}} {values[word]}' for word, name in self.metrics.items()]
        return "\n".join(lines) + "\n"


def histograms(
    prefix: str, ttft: str = "time_to_first_token_seconds", e2e: str = "e2e_request_latency_seconds"
) -> dict[str, str]:
    """Sample names of two histograms."""
    names = {"ttft": prefix + ttft, "e2e": prefix + e2e}
    return {f"{word}_{part}": f"{name}_{part}" for word, name in names.items() for part in ("sum", "count")}


def serve(port: int, host: str = "127.0.0.1") -> None:
    """Until ended."""
    if child := os.environ.get("STUB_CHILD"):
        worker = subprocess.Popen([sys.executable, "-SEc", "import time; time.sleep(600)"], start_new_session=True)
        Path(child).write_text(str(worker.pid))
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "hang":
        say("loading weights ...")
        time.sleep(600)
    ThreadingHTTPServer((host, port), Handler).serve_forever()


def fail(message: str, code: int = 1) -> None:
    """Last words."""
    say(message)
    sys.exit(code)


def heads(model: str) -> int:
    """Attention heads of a checkpoint."""
    return json.loads((Path(model) / "config.json").read_text())["num_attention_heads"]


def vllm(argv: list[str]) -> None:
    """vLLM 0.33.0: argparse with underscores and dashes alike, pydantic's checks of SchedulerConfig."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for flag in ("--host", "--served-model-name", "--distributed-executor-backend", "--kv-cache-dtype"):
        parser.add_argument(flag)
    integers = {
        "--port": 8000, "--max-num-batched-tokens": 2048, "--max-num-seqs": 256, "--block-size": 16,
        "--long-prefill-token-threshold": 0, "--stream-interval": 1, "--tensor-parallel-size": 1,
        "--pipeline-parallel-size": 1, "--data-parallel-size": 1, "--decode-context-parallel-size": 1,
        "--max-model-len": 1024, "--prefill-schedule-interval": 1,
    }  # fmt: skip
    for flag, default in integers.items():
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--watermark", type=float, default=0.0)
    parser.add_argument("--performance-mode", choices=["balanced", "interactivity", "throughput"])
    parser.add_argument("--scheduling-policy", choices=["fcfs", "priority"])
    for flag, default in {
        "--enable-chunked-prefill": True, "--enable-prefix-caching": True, "--async-scheduling": True,
        "--scheduler-reserve-full-isl": True, "--enable-expert-parallel": False, "--disable-custom-all-reduce": False,
        "--enforce-eager": False,
    }.items():  # fmt: skip
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
    a = parser.parse_args(argv)

    def invalid(config: str, why: str) -> None:
        fail(f"pydantic_core._pydantic_core.ValidationError: 1 validation error for {config}\n  Value error, {why}")

    if a.max_num_batched_tokens < a.max_model_len and not a.enable_chunked_prefill:
        invalid("SchedulerConfig", f"max_num_batched_tokens ({a.max_num_batched_tokens}) is smaller than max_model_len "
                f"({a.max_model_len}).")  # fmt: skip
    if a.max_num_batched_tokens < a.max_num_seqs:
        invalid("SchedulerConfig", f"max_num_batched_tokens ({a.max_num_batched_tokens}) must be greater than or equal "
                f"to max_num_seqs ({a.max_num_seqs}).")  # fmt: skip
    if a.long_prefill_token_threshold > a.max_model_len:
        invalid("SchedulerConfig", f"long_prefill_token_threshold ({a.long_prefill_token_threshold}) cannot be greater "
                f"than the max_model_len ({a.max_model_len}).")  # fmt: skip
    if heads(a.model) % a.tensor_parallel_size:
        invalid("ModelConfig", "Total number of attention heads must be divisible by tensor parallel size.")
    if a.block_size not in (16, 32, 64, 128):
        fail(f"ValueError: No common block size for {a.block_size} (FLASH_ATTN: [MultipleOf(16)]).\n"
             "RuntimeError: Engine core initialization failed. See root cause above.")  # fmt: skip
    if a.gpu_memory_utilization < 0.3:
        fail("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.\n"
             "RuntimeError: Engine core initialization failed. See root cause above.")  # fmt: skip
    Handler.model = a.served_model_name or a.model
    Handler.metrics = histograms("vllm:") | {
        "running": "vllm:num_requests_running", "prompt": "vllm:prompt_tokens_total",
        "generated": "vllm:generation_tokens_total", "done": "vllm:request_success_total",
    }  # fmt: skip
    serve(a.port, a.host)


def sglang(argv: list[str]) -> None:
    """SGLang 0.5.23: `sglang serve`, assertions of ServerArgs; /metrics only with --enable-metrics."""
    parser = argparse.ArgumentParser(prog="sglang", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    integers = {
        "--port": 30000, "--chunked-prefill-size": 8192, "--max-prefill-tokens": 16384, "--max-running-requests": None,
        "--page-size": 1, "--num-continuous-decode-steps": 1, "--cuda-graph-max-bs-decode": 256, "--stream-interval": 1,
        "--tp-size": 1, "--pp-size": 1, "--dp-size": 1, "--context-length": None,
    }  # fmt: skip
    for flag, default in integers.items():
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--mem-fraction-static", type=float, default=0.88)
    parser.add_argument("--schedule-conservativeness", type=float, default=1.0)
    parser.add_argument("--schedule-policy", default="fcfs", choices=[
        "lpm", "random", "fcfs", "dfs-weight", "lof", "priority", "routing-key", "hrrn", "shortest-prefill-first",
    ])  # fmt: skip
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8_e5m2", "fp8_e4m3", "bf16"])
    for flag in ("--enable-mixed-chunk", "--disable-overlap-schedule", "--disable-radix-cache", "--enable-metrics",
                 "--enable-dynamic-chunking"):  # fmt: skip
        parser.add_argument(flag, action="store_true")
    a = parser.parse_args(argv)
    if a.pp_size > 1 and not a.disable_overlap_schedule:
        fail("AssertionError: Pipeline parallelism is not compatible with overlap schedule.")
    if a.chunked_prefill_size > 0 and a.chunked_prefill_size % a.page_size:
        fail("AssertionError: chunked_prefill_size must be divisible by page_size")
    if heads(a.model_path) % a.tp_size:
        fail("ValueError: The number of attention heads must be divisible by tp_size")
    if a.mem_fraction_static > 0.96:
        fail("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB.")
    Handler.model = a.model_path
    Handler.metrics = histograms("sglang:") | {
        "running": "sglang:num_running_reqs", "prompt": "sglang:prompt_tokens_total",
        "generated": "sglang:generation_tokens_total", "done": "sglang:num_requests_total",
    }  # fmt: skip
    Handler.metrics_path = "/metrics" if a.enable_metrics else "/none"
    serve(a.port, a.host)


LLM_ARGS = {
    "return_perf_metrics": None, "kv_cache_config": {"free_gpu_memory_fraction", "enable_block_reuse", "dtype",
    "tokens_per_block", "max_tokens", "host_cache_size"}, "enable_chunked_prefill": None,
    "scheduler_config": {"capacity_scheduler_policy", "context_chunking_policy"},
    "cuda_graph_config": {"enable_padding", "max_batch_size", "batch_sizes"}, "stream_interval": None,
    "num_postprocess_workers": None, "disable_overlap_scheduler": None, "enable_attention_dp": None,
}  # fmt: skip


def trtllm(argv: list[str]) -> None:
    """trtllm-serve 1.2: click's words for a bad flag, pydantic's for a bad key of the YAML file."""
    flags = {"--host": "localhost", "--port": "8000", "--max_batch_size": "2048", "--max_num_tokens": "8192",
             "--max_seq_len": "0", "--tp_size": "1", "--pp_size": "1", "--extra_llm_api_options": ""}  # fmt: skip
    model, *rest = argv
    for flag, value in zip(rest[::2], rest[1::2], strict=True):
        if flag not in flags:
            fail(f"Error: No such option: {flag}", 2)
        flags[flag] = value
    options: dict[str, dict[str, str] | str] = {}
    section = ""
    for line in (
        Path(flags["--extra_llm_api_options"]).read_text().splitlines() if flags["--extra_llm_api_options"] else ()
    ):
        name, _, value = line.strip().partition(":")
        if line.startswith("  "):
            options.setdefault(section, {})[name] = value.strip()
            bad = name not in (LLM_ARGS[section] or ())
        else:
            section = name
            options[name] = {} if not value.strip() else value.strip()
            bad = name not in LLM_ARGS
        if bad:
            fail(f"1 validation error for TorchLlmArgs\n{name}\n  Extra inputs are not permitted")
    if int(flags["--max_num_tokens"]) < int(flags["--max_batch_size"]):
        fail("ValueError: max_num_tokens must be at least max_batch_size")
    if heads(model) % int(flags["--tp_size"]):
        fail("ValueError: the number of attention heads must be divisible by tp_size")
    cache = options.get("kv_cache_config", {})
    if float(cache.get("free_gpu_memory_fraction", 0.9)) > 0.97:
        fail("[TensorRT-LLM][ERROR] CUDA out of memory while the KV cache was allocated")
    Handler.model = Path(model).name
    Handler.metrics = histograms("trtllm_") | {
        "running": "trtllm_num_requests_running", "prompt": "trtllm_prompt_tokens_total",
        "generated": "trtllm_generation_tokens_total", "done": "trtllm_request_success_total",
    }  # fmt: skip
    Handler.metrics_path = "/prometheus/metrics" if options.get("return_perf_metrics") == "true" else "/none"
    serve(int(flags["--port"]), flags["--host"])


class Triton:
    """A model repository with one model, loaded and reloaded by the model-control API."""

    def __init__(self, repository: Path, model: str) -> None:
        self.repository = repository
        self.model = model
        self.loaded = ""
        if error := self.load():
            fail(f"error: creating server: Internal - failed to load all models\n{error}")

    def load(self) -> str:
        """Read config.pbtxt; what is wrong with it, or nothing."""
        text = (self.repository / self.model / "config.pbtxt").read_text()
        known = r"name|backend|platform|max_batch_size|input|output|instance_group|dynamic_batching|parameters"
        depth = 0
        for line in re.sub(r'"[^"]*"', '""', text).splitlines():
            word = re.match(r"\s*(\w+)", line)
            if depth == 0 and word and not re.fullmatch(known, word[1]):
                return f'Error parsing text-format inference.ModelConfig: has no field named "{word[1]}"'
            depth += line.count("{") + line.count("[") - line.count("}") - line.count("]")
        if depth:
            return "Error parsing text-format inference.ModelConfig: unbalanced braces"
        batch = int(re.search(r"^max_batch_size:\s*(\d+)", text, re.MULTILINE)[1])
        for preferred in re.findall(r"preferred_batch_size:\s*\[\s*(\d+)", text):
            if int(preferred) > batch:
                return f"Invalid argument: dynamic batching preferred size must be <= max batch size for {self.model}"
        if "dynamic_batching" in text and batch == 0:
            return f"Invalid argument: dynamic batching preferred size must be <= max batch size for {self.model}"
        count = re.search(r"\bcount:\s*(\d+)", text)
        if count and int(count[1]) > 8:
            return "CUDA error: out of memory"
        self.loaded = text
        return ""

    def get(self, path: str) -> tuple[object, int]:
        """Health, version and the configuration that is loaded."""
        if path in ("/v2/health/ready", f"/v2/models/{self.model}/ready"):
            return "", 200
        if path == "/v2":
            return {"name": "triton", "version": "2.60.0"}, 200
        if path == f"/v2/models/{self.model}/config":
            return {"name": self.model, "text": self.loaded}, 200
        return {"error": "not found"}, 404

    def post(self, path: str) -> tuple[object, int]:
        """Reload."""
        if path == f"/v2/repository/models/{self.model}/load":
            error = self.load()
            return ({"error": f"failed to load '{self.model}', {error}"}, 400) if error else ("", 200)
        return {"error": f"no such action {path}"}, 400


def tritonserver(argv: list[str]) -> None:
    """tritonserver 2.60 with --model-control-mode=explicit."""
    parser = argparse.ArgumentParser(prog="tritonserver", allow_abbrev=False)
    for flag in ("--model-repository", "--model-control-mode", "--load-model", "--http-address", "--metrics-address",
                 "--disable-auto-complete-config"):  # fmt: skip
        parser.add_argument(flag)
    parser.add_argument("--allow-grpc", default="true")
    for flag in ("--http-port", "--metrics-port"):
        parser.add_argument(flag, type=int)
    a, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"tritonserver: unrecognized option '{unknown[0]}'", 1)
    Handler.triton = Triton(Path(a.model_repository), a.load_model)
    Handler.metrics_path = "/none"
    metrics = type("Metrics", (Handler,), {"triton": None, "metrics_path": "/metrics"})
    Handler.metrics = {
        "done": "nv_inference_request_success", "ttft_sum": "nv_inference_first_response_histogram_ms_sum",
        "ttft_count": "nv_inference_first_response_histogram_ms_count",
    }  # fmt: skip
    threading.Thread(
        target=ThreadingHTTPServer((a.metrics_address, a.metrics_port), metrics).serve_forever, daemon=True
    ).start()
    serve(a.http_port, a.http_address)


if __name__ == "__main__":
    {"vllm": vllm, "sglang": sglang, "trtllm-serve": trtllm, "tritonserver": tritonserver}[Path(sys.argv[0]).name](
        sys.argv[1:]
    )
