"""Single kernels of which there is a suspicion, at the shapes of a micro-batch."""

import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from benchmarks.gpu_first_run.jobs import Machine
from benchmarks.gpu_first_run.recipes import recipes, sizes
from benchmarks.gpu_first_run.report import NO_CPU, Report
from megacocomix.config.load import load_config
from megacocomix.config.schema import Config


def time_kernels(machine: Machine, report: Report) -> None:
    """The kernels of which there is a suspicion, at the shapes of a micro-batch."""
    for name, recipe in recipes(machine).items():
        config = load_config(*recipe)
        for measure in (head_product, loss_chunks, compress_step):
            try:
                measure(f"{name}: ", config, machine, report)
            except Exception as error:
                title = f"{name}: {measure.__name__.replace('_', ' ')}"
                report.add("suspicions", title, False, f"{type(error).__name__}: {error}".splitlines()[0][:300])
    encode_in_tf32(machine, report)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of a call, the mean after two that are not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for repeat in range(repeats + 2):
        if repeat == 2:
            wait()
            begun = time.perf_counter()
        call()
    wait()
    return (time.perf_counter() - begun) / repeats


def peak_of(call: Callable[[], object], device: torch.device) -> str:
    """Device memory that a call takes."""
    if device.type != "cuda":
        return f"memory {NO_CPU}"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f} MiB"


def head_product(name: str, config: Config, machine: Machine, report: Report) -> None:
    """The head's product, forward and backward, with the vocabulary as it is and as a multiple of 64."""
    rows, width = config.training.micro_batch * config.model.context, config.model.hidden_size
    vocab = config.model.vocab_size
    times = []
    for columns in (vocab, -(-vocab // 64) * 64):
        make = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device=machine.device)
        x, weight, grad = make(rows, width).requires_grad_(), make(columns, width).requires_grad_(), make(rows, columns)
        call = lambda x=x, weight=weight, grad=grad: torch.nn.functional.linear(x, weight).backward(grad)
        times.append((columns, seconds_of(call, machine.device)))
    (_, plain), (_, padded) = times
    value = " against ".join(f"{seconds * 1e3:.2f} ms ({columns} columns)" for columns, seconds in times)
    report.add(
        "suspicions", f"{name}head product", "figure", f"{value}: {plain / padded:.2f}×", "above 1.00×: alignment"
    )


def loss_chunks(name: str, config: Config, machine: Machine, report: Report) -> None:
    """The next-token loss, forward and backward, with chunks of another size."""
    from megacocomix.model import losses

    rows, vocab = config.training.micro_batch * config.model.context, config.model.vocab_size
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device=machine.device, requires_grad=True)
    labels = torch.randint(vocab, (rows, 1), device=machine.device)

    def call() -> None:
        logits.grad = None
        losses.label_cross_entropy(logits, labels).backward()

    default, found = losses.CHUNK_ELEMENTS, []
    for factor in (0.25, 1, 4, 16):
        with mock.patch.object(losses, "CHUNK_ELEMENTS", int(default * factor)):
            found.append(
                f"{factor:g}: {seconds_of(call, machine.device) * 1e3:.2f} ms, {peak_of(call, machine.device)}"
            )
    expected = "time within 5% from 1 on; else make chunks larger"
    report.add("suspicions", f"{name}loss, chunks × {default:,} elements", "figure", "; ".join(found), expected)


def compress_step(name: str, config: Config, machine: Machine, report: Report) -> None:
    """Compress, in bf16, with concepts that are kept equally often, and with one that every position keeps."""
    from megacocomix.model.concept import Compress

    method, shape = config.method, (config.training.micro_batch, config.model.context, config.method.num_kept)
    layer = Compress(method.num_concepts, config.model.hidden_size).to(machine.device, torch.bfloat16)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    value = torch.randn(shape, dtype=torch.bfloat16, device=machine.device, requires_grad=True)
    uniform = torch.randint(method.num_concepts, shape, device=machine.device)
    hot = uniform.clone()
    hot[..., 0] = 0

    def call(index: torch.Tensor) -> None:
        for tensor in (value, *layer.parameters()):
            tensor.grad = None
        layer(value, index).sum().backward()

    positions = shape[0] * shape[1]
    rows = positions * method.num_kept
    size = rows * config.model.hidden_size * 2 / 2**20
    traffic = f"memory-bound: the {rows:,} gathered rows are {size:,.0f} MiB in bf16, read or written about 5 times"
    adding = f"about {positions / 8192 * 4:.1f} ms more: one thread a feature adds up {positions:,} gradients"
    for row, index, expected in (("Compress", uniform, traffic), ("Compress, a concept kept everywhere", hot, adding)):
        step = partial(call, index)
        found = f"{seconds_of(step, machine.device) * 1e3:.2f} ms, {peak_of(step, machine.device)}"
        report.add("suspicions", f"{name}{row}", "figure", found, expected)


def encode_in_tf32(machine: Machine, report: Report) -> None:
    """The autoencoder's encoding in fp32 and in TF32, and how often it keeps the same latents."""
    from megacocomix.sae.file import load_sae

    sae = load_sae(machine.out / "inputs/sae.safetensors", machine.device)
    x = torch.randn(4 * sizes(machine).context, sae.width, device=machine.device)
    times, kept = [], []
    for sae.tf32 in (False, True):
        times.append(seconds_of(lambda: sae.encode(x), machine.device) * 1e3)
        kept.append(sae.encode(x)[0].sort(-1).values)
    if not machine.has_gpu:
        return report.add("suspicions", "encoding in TF32", "n/a", f"{NO_CPU}; fp32 {times[0]:.2f} ms")
    same = (kept[0] == kept[1]).all(-1).float().mean().item()
    value = (
        f"{times[0]:.2f} ms, in TF32 {times[1]:.2f} ms: {times[0] / times[1]:.2f}×; {same:.2%} keep the same latents"
    )
    report.add(
        "suspicions",
        "encoding in TF32",
        "figure",
        value,
        "2× or more; latents of equal rank swap, more with random weights",
    )
