"""CUDA graphs of the layers over a full window: their kernels are recorded once, and then launched together."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from model.attention import CachedAttention, SecondBlockAttention, SelfAttention, WriteThenDenoiseAttention
from model.causal_wan import CausalWanModel
from model.conditioning import Conditioning, TextContext, Tokens
from model.kv_cache import KVCache

RunLayers = Callable[..., Tokens]
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Runs a function and records its kernels. Returns a function that launches them again, and the output, which is then
overwritten."""


def use_cuda_graphs(net: CausalWanModel) -> None:
    """Let all passes of a network on a CUDA device launch the layers over a full window as CUDA graphs."""
    net._run_layers = LayerGraphs(net._run_layers, CudaRecorder())  # type: ignore[method-assign]


class CudaRecorder:
    """Records CUDA graphs. They share their memory, so the output of one is lost when another is launched."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, for example to decode.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        self._pool = graph.pool()
        return graph.replay, output


@dataclass
class _Graph:
    inputs: list[Tensor]  # static buffers
    sources: list[Tensor]  # tensors that the buffers were last copied from
    launch: Callable[[], object]
    output: Tensor

    def run(self, sources: list[Tensor]) -> Tensor:
        """Return the output for other inputs."""
        changed = [i for i, (old, new) in enumerate(zip(self.sources, sources, strict=True)) if old is not new]
        if changed:
            torch._foreach_copy_([self.inputs[i] for i in changed], [sources[i] for i in changed])
        self.sources = sources
        self.launch()
        return self.output.clone()


class LayerGraphs:
    """Runs layers, and records them when it runs the same work over a full window for the second time.

    The first time runs them directly, so that code is compiled and memory is allocated. A cache has one graph for each
    kind of pass and each place in its ring; the graphs end with the cache, or when its text changes. Everything else,
    such as passes while the window fills, runs directly.
    """

    def __init__(self, run_layers: RunLayers, record: Recorder):
        """
        Args:
            run_layers: `CausalWanModel._run_layers`.
        """
        self._run_layers, self._record = run_layers, record
        self._graphs: WeakKeyDictionary[KVCache, dict[Hashable, _Graph | None]] = WeakKeyDictionary()
        self._texts: WeakKeyDictionary[KVCache, TextContext] = WeakKeyDictionary()

    def __call__(
        self, tokens: Tokens, text: TextContext, attention: SelfAttention, start: int = 0, end: int | None = None
    ) -> Tokens:
        """See `CausalWanModel._run_layers`."""
        work = _work(tokens, attention)
        if work is None:
            return self._run_layers(tokens, text, attention, start, end)
        cache, kind = work
        if self._texts.get(cache) is not text:
            self._graphs[cache], self._texts[cache] = {}, text
        graphs, key, sources = self._graphs[cache], (kind, start, end), list(_inputs(tokens))
        if key not in graphs:
            graphs[key] = None
            return self._run_layers(tokens, text, attention, start, end)
        graph = graphs[key]
        if graph is None:
            inputs = [x.clone() for x in sources]
            static = _with_inputs(tokens, inputs)
            launch, output = self._record(lambda: self._run_layers(static, text, attention, start, end).hidden)
            graph = graphs[key] = _Graph(inputs, list(inputs), launch, output)
        return replace(tokens, hidden=graph.run(sources))


def _work(tokens: Tokens, attention: SelfAttention) -> tuple[KVCache, Hashable] | None:
    """Return the cache, and a key of the kernels that a pass launches; None if later passes cannot launch the same."""
    if torch.is_grad_enabled() or not isinstance(
        attention, (CachedAttention, WriteThenDenoiseAttention, SecondBlockAttention)
    ):
        return None
    cache, written = attention.cache, 0
    if not cache.is_full_window():
        return None
    if not isinstance(attention, SecondBlockAttention) and attention.read_frames is not None:
        return None
    if isinstance(attention, WriteThenDenoiseAttention):
        written = attention.written_frames
    elif isinstance(attention, CachedAttention):
        if attention.before != cache.num_frames:
            return None
        written = tokens.grid[0] if attention.append else 0
    slots = tuple(cache.placement(written))
    shapes = tuple(tuple(x.shape) for x in _inputs(tokens))
    return cache, (type(attention), slots, shapes)


def _inputs(tokens: Tokens) -> Iterator[Tensor]:
    """Yield all tensors of a pass that change from pass to pass."""
    yield from (tokens.hidden, tokens.rope, tokens.conditioning.modulation)
    for rows in tokens.conditioning.layers:
        yield from rows


def _with_inputs(tokens: Tokens, inputs: list[Tensor]) -> Tokens:
    """Return tokens with these tensors in the places of those of `_inputs`."""
    hidden, rope, modulation, *rest = inputs
    rows = iter(rest)
    layers = tuple(tuple(next(rows) for _ in layer) for layer in tokens.conditioning.layers)
    conditioning = Conditioning(modulation, tokens.conditioning.head, layers)
    return replace(tokens, hidden=hidden, rope=rope, conditioning=conditioning)
