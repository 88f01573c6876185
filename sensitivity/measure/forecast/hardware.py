"""Measures how fast this machine runs the operations of a model, without the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.quantize.methods import method_of, needs_both_paths, needs_fisher
from sensitivity.quantize.run_time.inputs import round_inputs
from sensitivity.quantize.run_time.keys_and_values import round_cached
from sensitivity.quantize.run_time.settings import CHANNELS
from sensitivity.quantize.solving import solve
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Scheme

TOKENS = 1024  # in a measured product, at most; the cost of more is assumed to be in proportion
SIDE = 1024  # rows and columns of the weight whose quantization is measured, at most
ROWS_OF_STEPS = 16  # rows: so few that quantizing them takes little more than the steps from column to column
ELEMENTWISE_NUMBERS = TOKENS * 512  # in a measured elementwise operation, at most
SECONDS_PER_MEASUREMENT = 0.05  # seconds for one measurement
FLOAT32 = torch.float32  # holds every number of a narrower dtype
WORTH_MEMORY = 1.25  # a dtype that is less than so many times as fast is not worth twice the memory
PRODUCT = (128, 1024)  # tokens and width of the product that compares dtypes: .03 seconds a run at 1 GFLOP/s


def slowdown(stored: torch.dtype, device: torch.device) -> float:
    """How many times longer a product takes in a checkpoint's dtype than in float32; the fastest of a few runs each.

    CPUs without units for bfloat16 compute it number by number, a hundred times slower.
    """
    tokens, width = PRODUCT
    seconds: dict[torch.dtype, float] = {}
    with torch.inference_mode():
        for kind in (FLOAT32, stored):
            x, weight = (torch.ones(rows, width, device=device, dtype=kind) for rows in (tokens, tokens))
            runs: list[float] = []
            began = time.perf_counter()
            while len(runs) < 2 or (len(runs) < 20 and time.perf_counter() - began < 0.01):
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight).sum().item()  # .item() waits for a device that is not the host
                runs.append(time.perf_counter() - start)
            seconds[kind] = min(runs)
    return seconds[stored] / seconds[FLOAT32]


@dataclass
class Hardware:
    """Times of a model's operations on a device, each measured once at the shapes that are asked for."""

    device: torch.device
    dtype: torch.dtype
    clock: Callable[[], float] = time.perf_counter  # or CPU seconds, where other processes use the machine
    measured: dict[object, float] = field(default_factory=dict)  # seconds by operation and shape
    operations: float = 0.0  # floating-point operations of the measured products
    spent: float = 0.0  # seconds of the measured products

    def matmul(self, tokens: int, rows: int, cols: int) -> float:
        """Seconds for so many tokens through a linear layer."""
        measured_size = max(1, min(tokens, TOKENS))
        if (measured_size, rows, cols) not in self.measured:
            weight, x = self._random(rows, cols), self._random(measured_size, cols)
            self.measured[measured_size, rows, cols] = self._time(lambda: torch.nn.functional.linear(x, weight))
            self.operations += 2 * measured_size * rows * cols
            self.spent += self.measured[measured_size, rows, cols]
        return self.measured[measured_size, rows, cols] * max(tokens, 1) / measured_size

    def attention(self, rows: int, heads: int, queries: int, keys: int, width: int) -> float:
        """Seconds for attention of `queries` over `keys` in so many sequences."""
        measured_size = min(rows, max(1, TOKENS // queries))
        shape = ("attention", measured_size, heads, queries, keys, width)
        if shape not in self.measured:
            q, k = self._random(measured_size, heads, queries, width), self._random(measured_size, heads, keys, width)
            self.measured[shape] = self._time(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
        return self.measured[shape] * rows / measured_size

    def elementwise(self, numbers: int) -> float:
        """Seconds to read, change and write so many numbers, without the overhead of calling the operation."""
        measured_size = max(1, min(numbers, ELEMENTWISE_NUMBERS))
        if ("elementwise", measured_size) not in self.measured:
            x = self._random(measured_size)
            seconds = self._time(lambda: torch.nn.functional.silu(x)) - self.call
            self.measured["elementwise", measured_size] = max(seconds, 0.0)
        return self.measured["elementwise", measured_size] * numbers / measured_size

    def rounding(self, tokens: int, width: int, cached: bool = False) -> float:
        """Seconds to round the inputs of a layer for so many tokens, or keys or values; the bits make no difference."""
        measured_size = max(1, min(tokens, TOKENS))
        if ("rounding", measured_size, width, cached) not in self.measured:
            x = self._random(measured_size, width)
            once = (lambda: round_cached(x, 4, CHANNELS)) if cached else (lambda: round_inputs(x, 8))
            self.measured["rounding", measured_size, width, cached] = self._time(once)
        return self.measured["rounding", measured_size, width, cached] * max(tokens, 1) / measured_size

    @cached_property
    def call(self) -> float:
        """Seconds to call a module on almost nothing, which is most of the cost of a small model."""
        module, x = torch.nn.Linear(1, 1, device=self.device, dtype=self.dtype), self._random(1, 1)
        return self._time(lambda: module(x))

    def quantizing(self, scheme: Scheme, weight: Weight) -> float:
        """Seconds to quantize one weight.

        A calibrated method takes a step for each column, which is timed on few rows; the rest of its time grows with
        the rows, and with the square of the columns. The factor of the input's Gram matrix is not counted: all schemes
        and all weights that read the input share it.
        """
        rows, cols = min(weight.rows, SIDE), min(weight.cols, SIDE)
        whole, larger = self._solving(scheme, rows, cols), weight.numel / (rows * cols)
        if not method_of(scheme).calibrated:
            return whole * larger
        steps = min(self._solving(scheme, min(rows, ROWS_OF_STEPS), cols), whole)
        return steps * weight.cols / cols + (whole - steps) * larger * weight.cols / cols

    def _solving(self, scheme: Scheme, rows: int, cols: int) -> float:
        """Seconds to quantize a weight of this shape, when its input's Gram matrix has been factorized."""
        if (scheme, rows, cols) not in self.measured:
            values = (torch.randn(rows, cols, device=self.device).to(self.dtype),)
            seen = self._curvature(cols) if method_of(scheme).calibrated else None
            if seen is not None:
                seen.factor()
                if needs_both_paths(scheme):
                    x = torch.randn(2 * cols, cols, device=self.device)
                    seen.paths = TwoPaths(cols, self.device)
                    seen.paths.add(x, x, None, None)
            fisher = tuple(w.float().square() for w in values) if needs_fisher(scheme) else None

            def once() -> None:
                ((stored,),) = solve(Linears(("a probe",), values, seen, fisher=fisher), [scheme])
                if stored is not None:
                    stored.dequantize()

            self.measured[scheme, rows, cols] = self._time(once)
        return self.measured[scheme, rows, cols]

    def factorizing(self, cols: int) -> float:
        """Seconds to factorize the Gram matrix of an input."""
        side = min(cols, SIDE)
        if ("factor", side) not in self.measured:
            seen = self._curvature(side)

            def once() -> None:
                seen.free_factor()
                seen.factor()

            self.measured["factor", side] = self._time(once)
        return self.measured["factor", side] * (cols / side) ** 3

    def _curvature(self, cols: int) -> Curvature:
        """Statistics of random inputs."""
        seen = Curvature(cols, self.device)
        seen.add(torch.randn(2 * cols, cols, device=self.device))
        return seen

    @property
    def flops(self) -> float:
        """Floating-point operations per second, over all measured products."""
        return self.operations / self.spent if self.spent else 0.0

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def _time(self, run: Callable[[], object]) -> float:
        """The mean of as many runs as there is time for, after one to warm up; other load on the machine counts.

        A run that takes long is not done again.
        """
        with torch.inference_mode():
            began = self.clock()
            run()
            self._wait()
            if (first := self.clock() - began) > 10 * SECONDS_PER_MEASUREMENT:
                return first
            began, runs = self.clock(), 0
            while not runs or self.clock() - began < SECONDS_PER_MEASUREMENT:
                run()
                runs += 1
                self._wait()
        return (self.clock() - began) / runs

    def _wait(self) -> None:
        """Wait for the device, since calls on CUDA return before they have run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
