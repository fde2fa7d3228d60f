# SPDX-License-Identifier: Apache-2.0
"""Rewrites a captured graph: layers that gain run sparse, fused with what follows them.

The graph may come from torch.export or from Dynamo. Whatever is not lowered stays as it was, and
runs in torch.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparselt.affine import bind_affine
from sparselt.builder import LAYER, DenseStep, operation
from sparselt.conversion import PLAN_ATTRIBUTE
from sparselt.explanation import Row, row_of
from sparselt.fuse import Fusion, argument, fold_batch_norm, follow, is_mutating
from sparselt.layers import Constants, GraphLayer, read_layer, set_weights
from sparselt.nn import SPARSE_LAYERS, SparseConv2d, SparseLayer, SparseLinear
from sparselt.packed_rows import PackedRows
from sparselt.plan import SEMI_STRUCTURED, Plan
from sparselt.pooling import max_pool_step
from sparselt.semi_structured import SemiStructuredLinear
from sparselt.shapes import copied, drawn, propagate
from sparselt.shelf import Shelf
from sparselt.tune import Tuner

__all__ = ["Lowered", "lower"]

aten = torch.ops.aten

# A torch function takes the same arguments as the aten operator that torch.export writes, and is
# called in half the time.
_DIRECT: dict[Any, Any] = {
    aten.adaptive_avg_pool2d.default: torch._C._nn.adaptive_avg_pool2d,
    aten.add.Tensor: torch.add,
    aten.flatten.using_ints: torch.flatten,
    aten.max_pool2d.default: torch.max_pool2d,
    aten.mul.Tensor: torch.mul,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
}
# Values from which on pooling a contiguous tensor by shifted maxima was 5 to 16 times as fast.
_LARGE_POOL = 1 << 15
# Random numbers to time a layer with; to draw more takes longer than the layer.
_DRAWN = 1 << 14
_LINEAR = torch.ops.sparselt.linear.default
_CONV2D = torch.ops.sparselt.conv2d.default


@dataclass
class Lowered:
    """A graph after lowering.

    Attributes:
        module: runs it; takes the placeholders' values in order.
        unused: indices of the placeholders that nothing reads any more.
        rows: what became of each layer, in graph order.
        weights: for each row, the index of the placeholder of its weight; None where it is unknown.
        sources: indices of the placeholders whose values are baked into packed weights.
        others: how often each other operation is called; these run in torch.
        calls: for each node of the graph that is a layer, the index of its row, by node name.
        plans: what each layer was planned as, by the name of its node in the given graph.
    """

    module: fx.GraphModule
    unused: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    weights: list[int | None] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)


def lower(
    module: fx.GraphModule,
    values: Mapping[int, Tensor],
    inputs: Sequence[Any],
    tuner: Tuner,
    names: Mapping[int, str] | None = None,
    packed: dict[tuple[Any, ...], Any] | None = None,
    plans: Mapping[str, Plan] | None = None,
    shelf: Shelf | None = None,
) -> Lowered:
    """Lowers a copy of a graph.

    Args:
        module: the graph; not changed.
        values: the known placeholders (weights and buffers), by index.
        inputs: a value for every placeholder; shapes are taken from these.
        tuner: plans and times.
        names: names of the known placeholders, for the rows.
        packed: layers made before from the same weights, and a place to leave new ones, so
            that several lowerings of one graph share their memory.
        plans: of layers planned before, by node name; the others are planned anew.
        shelf: where some of the values are; those that are only packed go back there.
    """
    result = copied(module)
    graph = result.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    # A buffer that the graph itself writes to is no constant.
    constant = Constants(
        {
            placeholders[i]: value
            for i, value in values.items()
            if not any(is_mutating(user) for user in placeholders[i].users)
        },
        shelf or Shelf(),
    )
    _erase_dropout(graph)
    propagate(result, inputs)
    lowering = _Lowering(graph, constant, tuner, {} if packed is None else packed, plans or {})
    lowering.names = {placeholders[index]: name for index, name in (names or {}).items()}
    for node in list(graph.nodes):
        layer = read_layer(node, constant)
        if layer is not None:
            lowering.take(layer)
        else:
            lowering.pool(node)
    lowering.sources.update(bind_affine(graph, constant))
    _erase_unread_constants(graph, constant)
    for node in graph.nodes:
        node.target = _DIRECT.get(node.target, node.target)
    graph.lint()
    result.recompile()
    unused = [i for i, node in enumerate(placeholders) if not node.users]
    sources = [i for i, node in enumerate(placeholders) if node in lowering.sources]
    others = Counter(
        operation(node)
        for node in graph.nodes
        if node.op.startswith("call_") and node not in lowering.done
    )
    weights = [None if node is None else placeholders.index(node) for node in lowering.weights]
    calls = {node.name: row for node, row in lowering.calls.items()}
    return Lowered(
        result, unused, lowering.rows, weights, sources, dict(others), calls, lowering.plans
    )


def _erase_dropout(graph: fx.Graph) -> None:
    """Erases the dropouts of eval mode, which hand on their input."""
    names = {aten.dropout.default: "train", F.dropout: "training"}
    for node in list(graph.nodes):
        if node.target in names and argument(node, 2, names[node.target], True) is False:
            node.replace_all_uses_with(argument(node, 0, "input"))
            graph.erase_node(node)


def _erase_unread_constants(graph: fx.Graph, constant: Constants) -> None:
    """Erases transposes of lowered weights; any other unread call may act by changing a tensor."""
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and not node.users and constant(node) is not None:
            graph.erase_node(node)


class _Lowering:
    """The state of one pass over a graph."""

    def __init__(
        self,
        graph: fx.Graph,
        constant: Constants,
        tuner: Tuner,
        packed: dict[tuple[Any, ...], Any],
        known: Mapping[str, Plan],
    ) -> None:
        self.graph = graph
        self.constant = constant
        self.tuner = tuner
        self.packed = packed
        self.known = known
        self.plans: dict[str, Plan] = {}
        self.calls: dict[fx.Node, int] = {}
        self.names: dict[fx.Node, str] = {}
        self.rows: list[Row] = []
        self.weights: list[fx.Node | None] = []
        self.sources: set[fx.Node] = set()
        self.done: set[fx.Node] = set()

    def take(self, layer: GraphLayer) -> None:
        """Plans one layer, and rewrites it if its plan is sparse."""
        value = layer.input.meta.get("val")
        name, plan = self.name_of(layer), self.known.get(layer.node.name)
        if plan is None:
            inputs, obstacle = [], ""
            if isinstance(value, Tensor):
                inputs = [_look_alike(value)]
                if value.dtype != torch.float32 and value.device.type == "cpu":
                    obstacle = f"its input is {value.dtype}, and kernels compute float32"
            plan = self.tuner.plan(layer.module, inputs=inputs, obstacle=obstacle)
        self.plans[layer.node.name] = plan
        fusion = self.fusion_of(layer)
        fused = fusion.describe()
        if fused:
            plan = replace(plan, reason=f"{plan.reason}; with {fused}")
        halved = plan.format == SEMI_STRUCTURED
        if not plan.is_dense and not halved:
            sparse = self.sparse(layer, plan, fusion)
            self.replace(layer, fusion, _bind(sparse, _direct(layer)), sparse)
            row = row_of(name, sparse)
            self.constant.put_back(layer.sources)
        else:
            setattr(layer.module, PLAN_ATTRIBUTE, plan)
            row = row_of(name, layer.module)
            if fused or halved or isinstance(layer.node.target, torch._ops.OpOverload):
                self.replace(layer, fusion, *self.dense(layer, plan, fusion))
            else:
                self.done.add(layer.node)
                self.calls[layer.node] = len(self.rows)
        assert row is not None
        self.rows.append(row)
        self.weights.append(layer.sources[0] if layer.sources else None)

    def name_of(self, layer: GraphLayer) -> str:
        """The module path that the weight's name tells, or the node's own name."""
        if not layer.sources:
            return layer.node.name
        source = layer.sources[0]
        return self.names.get(source, _readable(source.name)).removesuffix(".weight")

    def fusion_of(self, layer: GraphLayer) -> Fusion:
        """What can be computed together with a layer."""
        fusion = follow(layer.node, self.constant, type(layer.module) is nn.Linear, _direct(layer))
        norm = fusion.batch_norm
        weight, bias = _weights(layer.module)
        if norm is not None and fold_batch_norm(weight[:, :0], bias, norm) is None:
            return Fusion(layer.node, [layer.node])
        return fusion

    def sparse(self, layer: GraphLayer, plan: Plan, fusion: Fusion) -> SparseLayer:
        """The layer as planned; its packed weight is shared among the lowerings of one graph."""
        key = (layer.node.name, plan.format, plan.block)
        if key not in self.packed:
            weight, _ = _weights(layer.module)
            made = SPARSE_LAYERS[type(layer.module)](_folded(layer, fusion), plan, weight != 0)
            made.lower, made.upper = fusion.lower, fusion.upper
            self.packed[key] = made
        sparse: SparseLayer = copy.copy(self.packed[key])
        sparse.kernel, sparse.plan = plan.kernel, plan
        return sparse

    def dense(
        self, layer: GraphLayer, plan: Plan, fusion: Fusion
    ) -> tuple[Callable[..., Tensor], DenseStep]:
        """Torch's own operator with the batch norm folded, and the rest done in place after it."""
        key = (layer.node.name, plan.format)
        if key not in self.packed:
            module = _folded(layer, fusion)
            if plan.format == SEMI_STRUCTURED:
                assert isinstance(module, nn.Linear)
                module = SemiStructuredLinear(module, plan)
            self.packed[key] = module
        made = PackedRows(self.packed[key], self.tuner)
        packs = self.packed.setdefault((layer.node.name, "packed rows"), made)
        step = DenseStep(layer.node.name, self.packed[key], fusion.lower, fusion.upper, packs)
        return _bind_dense(step), step

    def replace(
        self,
        layer: GraphLayer,
        fusion: Fusion,
        step: Callable[..., Tensor],
        native: SparseLayer | DenseStep,
    ) -> None:
        """Puts one call in place of the layer and of what is fused with it."""
        arguments = [layer.input] + ([fusion.residual] if fusion.residual is not None else [])
        with self.graph.inserting_before(fusion.end):
            call = self.graph.call_function(step, tuple(arguments))
        call.meta = {**fusion.end.meta, LAYER: native}
        fusion.end.replace_all_uses_with(call)
        for node in reversed(fusion.chain):
            self.graph.erase_node(node)
        self.sources.update(layer.sources, fusion.sources)
        self.done.add(call)
        self.calls[call] = len(self.rows)

    def pool(self, node: fx.Node) -> None:
        """Rewrites a max pooling where shifted maxima are faster than torch's."""
        step = max_pool_step(node)
        if step is None or argument(node, 0, "input").meta["val"].device.type != "cpu":
            return
        source, target, rest = argument(node, 0, "input"), node.target, node.args[1:]
        kwargs = {name: value for name, value in node.kwargs.items() if name != "input"}
        x = _look_alike(source.meta["val"])
        original = cast("Callable[..., object]", _DIRECT.get(target, target))
        calls = {"shifted": lambda: step(x), "torch": lambda: original(x, *rest, **kwargs)}
        # Large contiguous ones gain several times over, and need no clock that others disturb.
        clear = x.is_contiguous() and x.numel() >= _LARGE_POOL
        key = ("pool", rest, str(kwargs), x.shape, x.stride())
        if clear or self.tuner.fastest(calls, key) == "shifted":
            node.target = step


def _folded(layer: GraphLayer, fusion: Fusion) -> nn.Module:
    """The layer's module with the batch norm in its weights."""
    if fusion.batch_norm is None:
        return layer.module
    module = copy.copy(layer.module)
    module._parameters = dict(module._parameters)
    folded = fold_batch_norm(*_weights(layer.module), fusion.batch_norm)
    assert folded is not None
    set_weights(module, *folded)
    return module


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return weight, bias


def _direct(layer: GraphLayer) -> bool:
    """Whether the operator takes the layer's input as it is, so that a residual can be added."""
    if isinstance(layer.module, nn.Linear):
        return True
    value = layer.input.meta.get("val")
    plain = isinstance(layer.module, nn.Conv2d) and not isinstance(layer.module.padding, str)
    return plain and isinstance(value, Tensor) and value.dim() == 4


def _bind(sparse: SparseLayer, direct: bool) -> Callable[..., Tensor]:
    """What a graph calls for a sparse layer: the operator with all but its input filled in."""
    parts, meta = sparse.weight.parts(), sparse.weight.meta()
    bias, lower, upper = sparse.bias, sparse.lower, sparse.upper
    kernel = sparse.kernel or sparse.weight.format

    if isinstance(sparse, SparseLinear):

        def step(x: Tensor, residual: Tensor | None = None) -> Tensor:
            result: Tensor = _LINEAR(x, parts, meta, bias, residual, lower, upper, kernel)
            return result

    elif isinstance(sparse, SparseConv2d) and direct:
        geometry = sparse.geometry()

        def step(x: Tensor, residual: Tensor | None = None) -> Tensor:
            result: Tensor = _CONV2D(
                x, parts, meta, bias, residual, *geometry, lower, upper, kernel
            )
            return result

    else:

        def step(x: Tensor, residual: Tensor | None = None) -> Tensor:
            assert residual is None
            return sparse.forward(x)

    step.__name__ = step.__qualname__ = kernel
    return step


def _bind_dense(dense: DenseStep) -> Callable[..., Tensor]:
    """What a graph calls for a layer that stays dense and has something fused."""
    module, lower, upper = dense.module, dense.lower, dense.upper
    weight, bias = _weights(module)
    operator: Any = F.linear
    if isinstance(module, SemiStructuredLinear):
        operator = lambda x, *_: module.forward(x)  # noqa: E731
    geometry: tuple[Any, ...] = ()
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        operator = torch.conv1d if isinstance(module, nn.Conv1d) else torch.conv2d
        geometry = (module.stride, module.padding, module.dilation, module.groups)

    def step(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = operator(x, weight, bias, *geometry)
        if residual is not None:
            y.add_(residual)
        if lower == 0.0 and upper is None:
            return y.relu_()
        return y if lower is None and upper is None else y.clamp_(lower, upper)

    step.__name__ = step.__qualname__ = f"dense_{type(module).__name__.lower()}"
    return step


def _look_alike(value: Tensor) -> Tensor:
    """A tensor of the shape, layout and device of a fake one, of some random numbers repeated."""
    count = value.numel()
    few = drawn((min(count, _DRAWN),))
    x = few.repeat(-(-count // max(len(few), 1)))[:count].view(value.shape)
    x = x.to(value.device, value.dtype)
    last = torch.channels_last
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=last)
    return x.contiguous(memory_format=last) if channels_last and not value.is_contiguous() else x


def _readable(placeholder: str) -> str:
    """A placeholder's name of Dynamo as a path of modules, as far as that can be told."""
    path = re.sub(r"^_?modules_", "", re.sub(r"^[lL]_(self|fn|mod)_|_$", "", placeholder))
    return re.sub(r"_(modules|parameters|buffers)_", ".", path)
