"""What an MLX graph would take: peak memory, operations of products, bytes moved.

Knows how MLX orders a graph, shares buffers and runs ahead of itself; nothing of models.
To add a kind of operation: its name in VIEWS or IN_PLACE, or its products in `_products`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Their output is another look at the buffer of their first input.
VIEWS = _names(
    "Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten Reshape Slice Split "
    "Squeeze StopGradient Transpose Unflatten"
)
# Their output takes the place of an input of the same size that nothing else needs.
IN_PLACE = _names(
    "Abs Add AsType Compiled Cos Divide DynamicSliceUpdate Equal Erf Exp Expm1 Greater "
    "GreaterEqual Less LessEqual Log Log1p LogAddExp LogicalAnd LogicalNot LogicalOr Maximum "
    "Minimum Multiply Negative NotEqual Power RMSNorm RoPE Rsqrt Scatter ScatterAxis Select "
    "Sigmoid Sin SliceUpdate Softmax Sqrt Square Subtract Tanh"
)
# What MLX's compiler makes one operation of, where nobody else needs what is between.
FUSED = IN_PLACE - _names(
    "DynamicSliceUpdate RMSNorm RoPE Scatter ScatterAxis SliceUpdate Softmax"
) | {"Broadcast"}
# Of mlx.core's evaluation: the widest front of its order, how many tasks are under way at once, and
# how many dispatches of the CPU make a task.
_WIDEST = 20
_TASKS = 10
_DISPATCHES = 10
Array = tuple[str, tuple[int, ...], Any]
"""Name, shape and dtype of an array of a graph."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one evaluation of a function takes.

    Attributes:
        peak_bytes: Most that exists at once beside its inputs.
        work: For each operation that computes something, its floating-point operations in products,
            and the bytes that it reads and writes.
    """

    peak_bytes: int
    work: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(flops for flops, _ in self.work)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Its time where each operation waits for arithmetic or for memory, whichever is slower."""
        return sum(max(flops / flops_per_s, moved / bytes_per_s) for flops, moved in self.work)


@dataclass(eq=False)
class _Node:
    name: str
    inputs: list[Array]
    outputs: list[Array]


@dataclass(eq=False)
class _Buffer:
    """Memory that one or more arrays look at, and when its last user so far was sent off."""

    size: int
    holders: int = 0
    used: int = -(10**9)
    ours: bool = True


@dataclass(eq=False)
class _Memory:
    """What exists at each moment, as the main thread sees it: it is ahead of what was computed."""

    behind: int
    now: int = 0
    active: int = 0
    peak: int = 0
    leaving: deque[tuple[int, int]] = field(default_factory=deque)

    def take(self, size: int) -> None:
        self.active += size
        self.peak = max(self.peak, self.active)

    def give_back(self, buffer: _Buffer) -> None:
        """Free a buffer as soon as its last user has run."""
        self.leaving.append((buffer.used + self.behind, buffer.size))

    def go_on(self, dispatches: int) -> None:
        self.now += dispatches
        while self.leaving and self.leaving[0][0] <= self.now:
            self.active -= self.leaving.popleft()[1]


def cost_of(
    function: Callable[..., Sequence[mx.array]],
    arrays: dict[str, mx.array],
    *,
    owned: Iterable[str] = (),
    compiled: bool = False,
) -> Cost:
    """What one call of a function would take; its graph is made and never evaluated.

    Args:
        function: Takes arrays by name, gives arrays. What it uses besides should be small, and
            nothing in it may have a gradient of its own making, which MLX cannot tell of.
        arrays: Only their shapes and types are used, so they need not be evaluated.
        owned: Names of those that nobody else holds: they are freed after their last use.
        compiled: Whether the function will run through `mx.compile`.
    """
    rows: dict[str, list[dict[str, Any]]] = {}

    def by_place(*given: mx.array) -> Sequence[mx.array]:
        return function(**dict(zip(arrays, given, strict=True)))

    # By place, since Python's binding takes at most 1,024 names.
    values: Any = tuple(arrays.values())
    mx.export_function(lambda row: rows.setdefault(row["type"], []).append(row), by_place, values)
    nodes = [_Node(row["name"], row["inputs"], row["outputs"]) for row in rows["primitive"]]
    names = dict(zip(arrays, map(tuple, rows["inputs"][0]["inputs"]), strict=True))
    wanted = [name for name, _, _ in rows["outputs"][0]["outputs"]]
    if compiled:
        nodes = _fused(nodes, wanted)
    freed = [names[keyword] for keyword in owned]
    peak = _peak(_ordered(nodes, wanted), wanted, freed)
    return Cost(peak_bytes=peak, work=tuple(_work(nodes)))


def _fused(nodes: list[_Node], wanted: list[str]) -> list[_Node]:
    """The nodes with each group of elementwise operations as one, as MLX's compiler has it."""
    users: dict[str, list[_Node]] = {}
    for node in nodes:
        for name, _, _ in node.inputs:
            users.setdefault(name, []).append(node)
    ends: dict[_Node, _Node] = {node: node for node in nodes}
    for node in reversed(nodes):
        if node.name not in FUSED or node.outputs[0][0] in wanted:
            continue
        ends_of_users = {ends[user] for user in users.get(node.outputs[0][0], [])}
        if len(ends_of_users) == 1:
            end = ends_of_users.pop()
            if end.name in FUSED and end.outputs[0][1] == node.outputs[0][1]:
                ends[node] = end
    groups: dict[_Node, list[_Node]] = {}
    for node in nodes:
        groups.setdefault(ends[node], []).append(node)
    return [_as_one(groups[node]) for node in nodes if node in groups]


def _as_one(group: list[_Node]) -> _Node:
    if len(group) == 1:
        return group[0]
    inside = {node.outputs[0][0] for node in group}
    inputs = {a[0]: a for node in group for a in node.inputs if a[0] not in inside}
    return _Node("Compiled", list(inputs.values()), group[-1].outputs)


def _ordered(nodes: list[_Node], wanted: list[str]) -> list[_Node]:
    """The nodes in the order of MLX's evaluation: breadth first from the end, not too wide."""
    made_by = {name: node for node in nodes for name, _, _ in node.outputs}
    last = _Node("", [(name, (), None) for name in wanted], [])
    waiting: dict[_Node, int] = {}
    for node in [last, *nodes]:
        for name, _, _ in node.inputs:
            if (maker := made_by.get(name)) is not None:
                waiting[maker] = waiting.get(maker, 0) + 1
    tape, stack, position = [last], list[tuple[_Node, int]](), 0
    while position < len(tape) or stack:
        if position < len(tape):
            node, start = tape[position], 0
            position += 1
        else:
            node, start = stack.pop()
        for number in range(start, len(node.inputs)):
            if (maker := made_by.get(node.inputs[number][0])) is None:
                continue
            if len(tape) - position >= _WIDEST:
                stack.append((node, number))
                break
            waiting[maker] -= 1
            if not waiting[maker]:
                tape.append(maker)
    return tape[:0:-1]


def _peak(order: list[_Node], wanted: list[str], owned: list[Array]) -> int:
    """Most bytes of buffers at once, without the inputs."""
    memory = _Memory(_TASKS * _DISPATCHES)
    uses: dict[str, int] = dict.fromkeys(wanted, 1)
    for node in order:
        for name, _, _ in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    buffers: dict[str, _Buffer] = {}
    strided: set[str] = set()
    for array in owned:
        buffers[array[0]] = _Buffer(_bytes(array), holders=1)
        memory.active += _bytes(array)
    held = memory.peak = memory.active
    for node in order:
        for array in node.inputs:
            # Inputs and constants that are held elsewhere.
            buffers.setdefault(array[0], _Buffer(_bytes(array), holders=2, ours=False))
        shared = _shared(node, buffers, uses, strided, memory)
        for array in node.outputs:
            buffer = shared or _Buffer(_bytes(array))
            if shared is None:
                memory.take(buffer.size)
            if uses.get(array[0]):
                buffer.holders += 1
                buffers[array[0]] = buffer
            elif shared is None:
                buffer.used = memory.now
                memory.give_back(buffer)
        for name, _, _ in node.inputs:
            buffer = buffers[name]
            if buffer is not shared:
                buffer.used = memory.now
            uses[name] -= 1
            if not uses[name]:
                buffer.holders -= 1
                if not buffer.holders and buffer.ours:
                    buffer.used = max(buffer.used, 0)
                    memory.give_back(buffer)
        memory.go_on(1 if node.name in VIEWS else 2)
    return memory.peak - held


def _shared(
    node: _Node,
    buffers: dict[str, _Buffer],
    uses: dict[str, int],
    strided: set[str],
    memory: _Memory,
) -> _Buffer | None:
    """The buffer of an input that a node's output uses too; None where it needs its own."""
    if node.name in VIEWS:
        source, target = node.inputs[0], node.outputs[0]
        loose = source[0] in strided
        if loose and node.name in ("Reshape", "Flatten") and len(target[1]) < len(source[1]):
            return None
        if loose or node.name in ("Transpose", "Broadcast", "BroadcastAxes", "Slice", "Split"):
            strided.update(name for name, _, _ in node.outputs)
        return buffers[source[0]]
    if node.name not in IN_PLACE:
        return None
    for array in node.inputs:
        buffer = buffers[array[0]]
        free = buffer.ours and buffer.holders == 1 and uses[array[0]] == 1
        free = free and memory.now - buffer.used >= memory.behind
        if free and buffer.size == _bytes(node.outputs[0]) and array[0] not in strided:
            return buffer
    return None


def _bytes(array: Array) -> int:
    return math.prod(array[1]) * int(array[2].size)


def _work(nodes: list[_Node]) -> Iterable[tuple[int, int]]:
    for node in nodes:
        if node.name not in VIEWS:
            moved = sum(map(_bytes, [*node.inputs, *node.outputs]))
            yield _products(node), moved


def _products(node: _Node) -> int:
    """Floating-point operations of a node that multiplies matrices; 0 for any other."""
    if node.name == "ScaledDotProductAttention":
        (_, (*batch, queries, width), _), (_, (*_, keys, _), _) = node.inputs[:2]
        return 4 * math.prod(batch) * queries * keys * width
    if "MM" in node.name.upper().replace("MATMUL", "MM"):
        return 2 * math.prod(node.outputs[0][1]) * node.inputs[0][1][-1]
    return 0
