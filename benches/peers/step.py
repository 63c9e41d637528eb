"""The whole step of scripts/peers/mae_step.py in bf16, from uint8 images on the GPU to updated weights, as PyTorch's
users would speed it up. A step is as many micro-batches as its batch takes, and one update; it ends when the loss is
back. Unlike ours it copies no images from the host, and takes no norm of the gradient."""

import contextlib
import functools
import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mae_step import SIZES, Trainer, adamw, check
from measure import BF16
from ops import BACKENDS, low_pass_filters
from torch.nn.attention import sdpa_kernel


@dataclass(frozen=True)
class Variant:
    """What PyTorch is told. `graph`: micro-batches are recorded as a CUDA graph. `pure`: parameters in bf16 beside f32
    ones for the optimizer, no autocast. `products`: the target by products in place of Fourier transforms."""

    name: str
    compile: bool = False
    mode: str | None = None
    graph: bool = False
    pure: bool = False
    products: bool = False
    backend: str | None = None


class Step:
    """A network, its images, and a step over them."""

    def __init__(self, bench, size, variant, batch, micro_batch):
        torch.manual_seed(0)
        self.bench, self.variant, self.count = bench, variant, max(1, batch // micro_batch)
        compile = functools.partial(bench.compile, mode=variant.mode) if variant.compile else None
        self.trainer = Trainer(size, 1.5e-4, "f32" if variant.pure else "bf16", compile, bench.device)
        self.parameters = list(self.trainer.model.parameters())
        if variant.products:
            self.trainer.filter = low_pass_filters(size.image, size.radius, bench.device)["products"]
        self.masters = None
        if variant.pure:
            # The optimizer's, in f32, and their gradients; those of the model are of bf16.
            self.masters = [torch.nn.Parameter(p.detach().clone()) for p in self.parameters]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            self.trainer.optimizer = adamw(torch.nn.ParameterList(self.masters), 1.5e-4)
            self.trainer.model.to(BF16)
            loss = self.trainer.loss
            self.trainer.loss = lambda images, target, noise: loss(images.to(BF16), target, noise)
        # More than one batch, so that no cache knows the images.
        self.pool = [bench.images(micro_batch, size.image) for _ in range(max(4, self.count))]
        self.pixels, self.noise = self.pool[0].clone(), self.trainer.noise(self.pool[0])
        self.turn, self.micro = 0, self.accumulate
        if variant.graph:
            self.record()

    def accumulate(self):
        """One micro-batch, of `self.pixels` and `self.noise`."""
        backend = BACKENDS.get(self.variant.backend)
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            loss = self.trainer.accumulate(self.pixels, self.noise, 1 / self.count)
        if self.masters:
            for master, parameter in zip(self.masters, self.parameters):
                master.grad.add_(parameter.grad)
                parameter.grad = None
        return loss

    def record(self):
        """Puts a micro-batch's work into a graph, whose gradients stay where they are. Without a GPU it is not recorded."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        if self.bench.device == "cpu":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.accumulate()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.accumulate()

        def replay():
            graph.replay()
            return loss

        self.micro = replay
        self.zero_grad()

    def zero_grad(self):
        if self.masters:
            torch._foreach_zero_([master.grad for master in self.masters])
        else:
            self.trainer.optimizer.zero_grad(set_to_none=not self.variant.graph)

    def gradients(self):
        """Of the first micro-batch: its loss as if it were the whole step, and the gradients that are there then."""
        self.pixels.copy_(self.pool[0])
        torch.manual_seed(1)
        self.noise.copy_(self.trainer.noise(self.pixels))
        loss = self.micro() * self.count
        of = self.masters or self.parameters
        found = torch.cat([p.grad.flatten().float() for p in of if p.grad is not None]) * self.count
        # On the host: the GPU's memory is for the steps.
        found = [loss.float().cpu(), found.cpu()]
        self.zero_grad()
        return found

    def __call__(self):
        total = 0
        for _ in range(self.count):
            self.pixels.copy_(self.pool[self.turn % len(self.pool)])
            self.noise.uniform_()
            self.turn += 1
            total = total + self.micro().float()
        self.trainer.optimizer.step()
        self.zero_grad()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        return total.item()


def method(bench):
    """The peer does the same work: losses, gradients and weights have the golden values of a tiny network, in f64."""
    default = torch.get_default_dtype()
    try:
        # What it says is no row.
        with contextlib.redirect_stdout(sys.stderr):
            wrong = check()
        if wrong:
            bench.failures.append("method: mae_step.py has other values than those on record")
    finally:
        torch.set_default_dtype(default)


def has_backend(bench, size, backend):
    """Whether PyTorch has this attention here, for both stacks of the network."""
    for dim, heads, tokens in ((size.width, size.heads, 50), (size.decoder_width, size.decoder_heads, 197)):
        q = bench.random(1, heads, tokens, dim // heads).requires_grad_()
        try:
            with sdpa_kernel(BACKENDS[backend]):
                F.scaled_dot_product_attention(q, q, q).sum().backward()
        except RuntimeError:
            return False
    return True


def step(bench, network, variant, batch, micro_batch, wanted):
    """Times a variant, once it has the loss and the gradients of the plain one, which `wanted` keeps."""
    size = SIZES[network]
    if bench.smoke:
        size, batch, micro_batch = replace(SIZES["small64"], depth=1, decoder_depth=1), 4, 2
    if variant.backend and not has_backend(bench, size, variant.backend):
        bench.say("left out: PyTorch has no such attention here")
        return
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    key = network, micro_batch
    try:
        if key not in wanted:
            wanted[key] = Step(bench, size, Variant("eager"), batch, micro_batch).gradients()
        run = Step(bench, size, variant, batch, micro_batch)
        found = run.gradients()
        first = run()
    except torch.OutOfMemoryError:
        run = None
    if run is None:  # Not above: the exception holds on to the step's tensors.
        if micro_batch == 1:
            raise RuntimeError("not even one image fits")
        bench.say(f"{variant.name}: micro-batches of {micro_batch} do not fit, half as many images next")
        torch.cuda.empty_cache()
        return step(bench, network, variant, batch, micro_batch // 2, wanted)
    # In bf16, which rounds otherwise in every variant; what is wrong in kind is off by far more.
    if not bench.agrees(variant.name, found, wanted[key], 5e-2):
        return
    losses = [first]
    times = bench.times(lambda: losses.append(run()), windows=7, warm_up=1)
    if not losses[-1] < first or not all(map(math.isfinite, losses)):
        bench.failures.append(f"step {network} {variant.name}: the loss went from {first:.3f} to {losses[-1]:.3f}")
        return
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device == "cuda" else 0
    name = f"{variant.name} (micro-batch {micro_batch}; {memory:.0f} GiB)"
    bench.row(("train", "step", network), run.count * micro_batch, "bf16", name, times, images=run.count * micro_batch)
