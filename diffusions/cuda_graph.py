"""A network whose calls are replayed as CUDA graphs: for small batches, which take longer to start than to compute."""

import torch
from torch import Tensor, nn

MOST_PIXELS = 2**18  # of a batch, from where on the GPU is busy anyway
WARM_UP = 2  # calls before one is captured: compilation and the choice of algorithms are over by then
PAYS = 20  # calls; capturing one is worth its time for more


class Graphed:
    """Calls `net(x, t, **cond)`, by a graph from the third call with tensors of the same shapes on.

    The graph reads the weights where they lie, so that they must not be replaced. Only for inference on a GPU, under
    one setting of autocast, from one thread; everywhere else, above MOST_PIXELS, and where `net` is no module (what
    watches the calls of one would not see a replay) it is called as it is.
    """

    def __init__(self, net: nn.Module, calls: int) -> None:
        """calls: how many there will be."""
        self.net, self.pays = net, calls > PAYS and isinstance(net, nn.Module)
        self.calls: dict[tuple, int] = {}
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}

    def __getattr__(self, name: str):
        return getattr(self.net, name)

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """x [B, C, H, W], t [B] int64 and conditions -> what the network says, in memory of its own."""
        inputs = {"x": x, "t": t, **cond}
        if not self.pays or not x.is_cuda or torch.is_grad_enabled() or x.numel() // x.shape[1] > MOST_PIXELS:
            return self.net(x, t, **cond)
        key = tuple((name, value.shape, value.dtype, value.stride()) for name, value in inputs.items())
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= WARM_UP:
            return self.net(x, t, **cond)
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs)
        graph, held, out = self.graphs[key]
        for name, value in inputs.items():
            held[name].copy_(value)
        graph.replay()
        return out.clone()

    def _capture(self, inputs: dict[str, Tensor]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]:
        held = {name: value.clone() for name, value in inputs.items()}
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may pin memory meanwhile
            out = self.net(held["x"], held["t"], **{name: v for name, v in held.items() if name not in ("x", "t")})
        return graph, held, out
