"""How peers are timed: compared first, then medians of runs with the L2 cache flushed, as rows of a record."""

import csv
import statistics
import subprocess
import sys
import time

import torch
import torch._dynamo
import torch._functorch.config

BF16, F32 = torch.bfloat16, torch.float32
COLUMNS = ("op", "direction", "shape", "batch", "precision", "variant", "ms", "low_ms", "high_ms",
           "images_per_s", "gb_per_s", "tflop_per_s", "share", "sm_mhz", "watts")
# More than the L2 cache of any GPU there is.
FLUSHED_BYTES = 256 << 20


class OutOfTime(Exception):
    pass


class Bench:
    """Compares, measures, and writes rows."""

    def __init__(self, out, device, smoke, end):
        self.device, self.smoke = device, smoke
        self.out, self.table = out, csv.writer(out, lineterminator="\n")
        self.section, self.until, self.end = "", end, end
        self.failures, self.peaks, self.clocks = [], {}, None
        self.flushed = torch.empty(self.pick(FLUSHED_BYTES, 1), dtype=torch.uint8, device=device)
        self.table.writerow(COLUMNS)

    def pick(self, size, tiny):
        return tiny if self.smoke else size

    def say(self, sentence):
        print(f"gpu.py: {self.section}: {sentence}", file=sys.stderr, flush=True)

    def random(self, *shape, dtype=BF16):
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def images(self, count, side):
        """uint8 (count, 3, side, side) with the spectrum of photos, 1/f, and colours that go together: a GPU takes less
        power, and is faster, on numbers that are alike."""
        frequency = torch.fft.fftfreq(side, device=self.device)[:, None] ** 2 + torch.fft.rfftfreq(
            side, device=self.device) ** 2
        frequency[0, 0] = torch.inf
        parts = []
        for begin in range(0, count, 256):
            noise = torch.randn(min(256, count - begin), 4, side, side, device=self.device)
            noise = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.sqrt(), s=(side, side))
            noise = noise / noise.std((1, 2, 3), keepdim=True)
            colours = 0.9 * noise[:, :1] + 0.4 * noise[:, 1:]
            parts.append((115 + 57 * colours).clamp_(0, 255).to(torch.uint8))
        return torch.cat(parts)

    def compile(self, function, mode=None):
        """As a user would; without a GPU only traced, which needs no compiler."""
        if self.device == "cpu":
            return torch.compile(function, backend="aot_eager", dynamic=False)
        return torch.compile(function, mode=mode, dynamic=False)

    def variants(self, run):
        """A function as it is, and compiled."""
        # After eight shapes of one function the compiler would leave the ninth as it is.
        torch._dynamo.reset()
        # Gradients are taken many times of one result.
        torch._functorch.config.donated_buffer = False
        return {"eager": run, "compiled": self.compile(run)}

    def agrees(self, name, got, want, tolerance):
        """Whether a variant's results are right, in relative norm; NaN is not. One that is wrong is not to be timed."""
        for got, want in zip(got, want, strict=True):
            got, want = got.detach().double(), want.detach().double()
            error = ((got - want).norm() / want.norm()).item()
            if not error <= tolerance:
                self.failures.append(f"{self.section} {name}: off by {error:.1e}, more than {tolerance:.0e}: not timed")
                return False
        return True

    def times(self, run, windows=15, warm_up=3):
        """Milliseconds of runs, one by one, sorted."""
        if time.monotonic() > min(self.until, self.end):
            raise OutOfTime
        warm_up, windows = self.pick((warm_up, windows), (1, 2))
        for _ in range(warm_up):
            run()
        if self.device == "cpu":
            times = []
            for _ in range(windows):
                begin = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - begin))
            return sorted(times)
        self.clocks = self.clocks or clocks_under(run)
        events = []
        for _ in range(windows):
            self.flushed.zero_()
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            run()
            events[-1][1].record()
        torch.cuda.synchronize()
        return sorted(begin.elapsed_time(end) for begin, end in events)

    def row(self, name, batch, precision, variant, times, *, nbytes=0, flops=0, images=0):
        """`name` is op, direction and shape, as in our records; then useful bytes, operations and images of a run."""
        low, ms, high = statistics.quantiles(times, n=4, method="inclusive")
        seconds = ms / 1e3
        if name[0] == "peak":
            self.peaks[name[1]] = (nbytes or flops) / seconds
        needed = [amount / self.peaks[peak] for peak, amount in (("copy", nbytes), ("product", flops)) if peak in self.peaks]
        share = f"{max(needed) / seconds:.3f}" if needed and max(needed) else ""
        rates = [f"{amount / seconds / unit:.4g}" if amount else ""
                 for amount, unit in ((images, 1), (nbytes, 1e9), (flops, 1e12))]
        self.table.writerow((*name, batch, precision, variant, f"{ms:.4f}", f"{low:.4f}", f"{high:.4f}", *rates, share,
                             *(self.clocks or ("", ""))))
        self.out.flush()

    def run(self, section, seconds):
        self.section, self.until, self.clocks = section.__name__, time.monotonic() + seconds, None
        torch._functorch.config.donated_buffer = True
        try:
            section(self)
        except OutOfTime:
            self.say(f"{seconds:.0f} s are over, the rest is left out")
        except Exception as error:  # The sections after this one can still be measured.
            self.failures.append(f"{self.section}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        torch._dynamo.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def clocks_under(run):
    """SM clock in MHz and power in W while a GPU is kept busy; empty where the driver's tool is not there."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
    try:
        tool = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return "", ""
    until = time.monotonic() + 5
    while tool.poll() is None:
        run()
        torch.cuda.synchronize()
        if time.monotonic() > until:
            tool.kill()
    values = [value.strip() for value in tool.communicate()[0].split(",")]
    return tuple(values) if tool.returncode == 0 and len(values) == 2 else ("", "")
