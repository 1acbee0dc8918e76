"""The one table of patterns: how convolutions, BatchNorms, activations and additions (:mod:`.nodes`) make a chain.

A chain in a graph is ``conv [BatchNorm] [activation]``, once or more, ``[+ shortcut] [activation]`` behind the last,
``[max-pool]``; between two of them nobody else may read what is handed on (in front of a sum its size may be asked). In front
of the first convolution there may be ``BatchNorm [activation]``, the chain's *entry*. The rules:

* a weight layer is a convolution with something behind it, a bias at least; without that it has nothing to be fused with;
* a Linear is a convolution too, with a BatchNorm; one without is in a chain only behind an entry or in front of a sum;
* all convolutions of a chain take inputs of as many dimensions, and so do its BatchNorms and its pooling;
* layers follow each other into one chain while the same frame holds them, or a shortcut spans them;
* the shortcut is the chain's input, or a convolution and BatchNorm of it; else any other tensor (``skip``) that is made for the
  sum, or a convolution and BatchNorm of one. The sum may be in place only in what the chain itself made;
* an entry is read by the chain's first convolution alone, and by the projection if there is one; the shortcut may start in
  front of it (then it is no second input), or from elsewhere;
* a chain reads its input where its first convolution stands, with a ``skip`` where the sum stands; nothing between the two may
  write in place, but into what a layer there has made for it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import fx, nn

from ..describe import Parts, WeightLayer, activation_of, class_of, dimensions_of, is_norm, layer_refusal, refusal
from .functions import tensor_at
from .nodes import Node, Nodes


@dataclass(frozen=True)
class LayerPlace:
    """Where the modules of a weight layer are, dotted, from the root; an activation that is a function is a module's place."""

    conv: str
    norm: str | None = None
    activation: str | nn.Module | None = None


@dataclass(frozen=True)
class EntryPlace:
    """Where the modules of an entry are, likewise."""

    norm: str
    activation: str | nn.Module | None = None


@dataclass
class Match:
    """A chain in a graph."""

    layers: list[LayerPlace]
    nodes: list[Node]
    x: Node
    out: Node
    residual: bool = False
    projection: LayerPlace | None = None
    pool: str | None = None
    skip: Node | None = None
    entry: EntryPlace | None = None
    sized: Node | None = None  # what is in front of the sum, if somebody asks for its size


#: The runs of a chain with a shortcut, its projection, and what the shortcut starts from if not from the chain's input.
Joined = tuple[list[Match], Match | None, Node | None]


class Matcher(Nodes):
    """Finds the chains of one graph.

    Args:
        root: the module that was traced.
        graph: its graph.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph)
        self.cut: dict[Node, Match] = {}  # what a run with a bare Linear behind it hands on -> the run without

    # ---- walking

    def follow(self, node: Node, passed: list[Node]) -> Node | None:
        """The only node that reads this one, past identities, which are added to ``passed``."""
        while True:
            if len(node.users) != 1:
                return None
            node = next(iter(node.users))
            if not self.is_identity(node):
                return node
            passed.append(node)

    def layer(self, conv: Node) -> tuple[LayerPlace, list[Node]]:
        """A convolution with what follows it."""
        nodes, place = [conv], LayerPlace(self.place(conv))
        norm: Any = None
        passed: list[Node] = []
        following = self.follow(conv, passed)
        if (
            following is not None
            and self.is_norm(following)
            and self.fits(conv, following)
            and self._quiet([*nodes, *passed, following], following)
        ):
            nodes += [*passed, following]
            norm = self.module(following)
            place = replace(place, norm=self.place(following))
            if type(activation_of(norm)) not in (type(None), nn.Identity):
                return replace(place, activation=f"{following.target}.act"), nodes
            passed = []
            following = self.follow(following, passed)
        if following is not None and self.is_activation(following) and self._quiet([*nodes, *passed, following], following):
            nodes += [*passed, following]
            place = replace(place, activation=self.activation(following))
        return place, nodes

    # ---- chains

    def find(self, same: Callable[[Node, Node], bool]) -> list[Match]:
        """All chains, in the order of their first convolutions.

        Args:
            same: whether two nodes were called in the same frame.
        """
        by_out = self._runs(same)
        for node in self.nodes:
            pair = self.added(node)
            if pair is not None:
                self._join(node, pair, by_out)
        for out, before in self.cut.items():
            if by_out.pop(out, None) is not None:  # no sum behind it
                by_out[before.out] = before
        taken = {node for match in by_out.values() for node in match.nodes}
        for match in by_out.values():
            self._enter(match, taken)
            self._pool(match)
        chains = [match for match in by_out.values() if self._worth(match)]
        self._tell(chains)
        return sorted(chains, key=lambda match: self.order[match.nodes[0]])

    def _tell(self, chains: list[Match]) -> None:
        """Why each layer that is in no chain is in none."""
        inside = {node for match in chains for node in match.nodes}
        for node in self.nodes:
            module = self.module(node)
            if module is None or node in inside:
                continue
            place = self.place(node)
            if isinstance(module, nn.modules.conv._ConvNd) or class_of(module) in (nn.Conv2d, nn.Conv1d):
                refused = refusal(Parts([WeightLayer(place, module)]), structure_only=True)
                self.reasons.setdefault(place, refused or self._behind(node))
            elif is_norm(module):
                self.reasons.setdefault(place, "no convolution of its dimensions has it to itself, in front of it or behind it")
            elif isinstance(module, nn.modules.batchnorm._NormBase):
                self.reasons.setdefault(place, f"a {type(module).__name__} is no BatchNorm2d or BatchNorm1d")

    def _behind(self, node: Node) -> str:
        """What keeps a convolution alone."""
        if len(node.users) != 1:
            return f"its output is read {len(node.users)} times"
        user = next(iter(node.users))
        module = self.module(user)
        name = getattr(user.target, "__name__", str(user.target)) if module is None else class_of(module).__name__
        return f"stands alone: behind it is {name}, nothing to fuse with"

    def _runs(self, same: Callable[[Node, Node], bool]) -> dict[Node, Match]:
        """Weight layers by what they hand on; those that follow each other in one frame together."""
        by_out: dict[Node, Match] = {}
        for node in self.nodes:
            if not self.is_conv(node):
                continue
            place, nodes = self.layer(node)
            reason = self.refused(place)
            if reason is not None:
                self.reasons[place.conv] = reason
                continue
            x: Any = node.args[0]
            match = Match([place], nodes, x, nodes[-1])
            before = self._before(match, by_out)
            joined = before is not None and same(before.nodes[-1], node) and not self.is_bare(before)
            if before is not None and joined and self._quiet([*before.nodes, *self.strip(match.x)[1], *nodes], match.out):
                if self.is_bare(match):
                    self.cut[match.out] = before
                match = self._appended(before, match, by_out)
            by_out[match.out] = match
        return by_out

    def refused(self, place: LayerPlace) -> str | None:
        """Why a layer cannot be launched, or None."""
        return layer_refusal(self.weight_layer(place))

    def dimensions(self, place: LayerPlace) -> int:
        """Of a layer's input."""
        return dimensions_of(self.modules[place.conv])

    def is_bare(self, match: Match) -> bool:
        """Whether a run ends with a Linear without a BatchNorm, with which nothing is fused but a sum or an entry."""
        return self.dimensions(match.layers[0]) == 2 and match.layers[-1].norm is None

    def has_bias(self, place: LayerPlace) -> bool:
        """Whether a convolution adds a bias, which on a GPU is a kernel of its own."""
        return cast(Any, self.modules[place.conv]).bias is not None

    def names(self, place: LayerPlace) -> set[str]:
        """What must not be twice in a chain: its convolution and its BatchNorm, whose statistics each call moves on."""
        conv = self.functions[place.conv].name if place.conv in self.functions else place.conv
        return {conv} if place.norm is None else {conv, self.norm_name(place.norm)}

    def strip(self, node: Node) -> tuple[Node, list[Node]]:
        """What identities in front of a node hand on, and these."""
        passed: list[Node] = []
        while self.is_identity(node):
            passed.insert(0, node)
            node = cast(Node, node.args[0])
        return node, passed

    def _before(self, match: Match, by_out: dict[Node, Match]) -> Match | None:
        """The run in front of a run, if the two can be one: nobody else reads what is between, no module twice."""
        source, passed = self.strip(match.x)
        before = by_out.get(source)
        if before is None or before.residual or any(len(node.users) != 1 for node in (source, *passed)):
            return None
        last = before.layers[-1]
        if self.dimensions(last) != self.dimensions(match.layers[0]):
            return None
        known = {name for layer in before.layers for name in self.names(layer)}
        twice = any(known & self.names(layer) for layer in match.layers)
        return before if not twice and (last.norm is not None or last.activation is not None) else None

    def _appended(self, before: Match, match: Match, by_out: dict[Node, Match]) -> Match:
        """Two runs as one."""
        del by_out[before.out]
        nodes = [*before.nodes, *self.strip(match.x)[1], *match.nodes]
        return Match([*before.layers, *match.layers], nodes, before.x, match.out)

    def weight_layer(self, place: LayerPlace) -> WeightLayer:
        """The modules at a place."""
        find: Any = self.modules.get
        activation = find(place.activation) if isinstance(place.activation, str) else place.activation
        return WeightLayer(place.conv, find(place.conv), find(place.norm) if place.norm else None, activation)

    def _join(self, node: Node, pair: tuple[Node, Node, bool], by_out: dict[Node, Match]) -> None:
        """Make the runs that end in a sum one chain with a shortcut, if they are one.

        The shortcut from the chain's own input comes first, then one from elsewhere, with a projection if there is one.
        """
        for how in (self._around, self._projected, self._beside):
            for main, side in ((0, 1), (1, 0)):
                given = cast(Node, pair[side])
                (out, passed), (shortcut, side_passed) = self.strip(cast(Node, pair[main])), self.strip(given)
                match = by_out.get(out)
                if match is None or match.residual or match.layers[-1].activation is not None:
                    continue
                if len(self.readers(out)) != 1 or any(len(part.users) != 1 for part in passed):
                    continue
                projection = by_out.get(shortcut)
                if projection is match or (projection is not None and not self._projects(projection, match, side_passed)):
                    projection = None
                written = pair[2] and side == 0 and projection is None  # += would write into what is not the chain's
                found = None if written else how(match, projection, given, by_out)
                if found is None:
                    continue
                runs, projection, skip = found
                mine = [*passed, *(() if projection is None else projection.nodes)]
                mine += side_passed if projection is not None or skip is None else []
                mine += self.strip(runs[0].x)[1] if projection is None and skip is None else []
                mine += [part for run in runs[1:] for part in self.strip(run.x)[1]]
                mine += [part for run in runs for part in run.nodes]
                if self._quiet(mine, node):
                    self._merge(runs, projection, skip, mine, node, by_out)
                    return

    def _around(self, match: Match, projection: Match | None, shortcut: Node, by_out: dict[Node, Match]) -> Joined | None:
        """The runs from where the shortcut starts, if it starts from the first's input."""
        start, passed = self.strip(shortcut if projection is None else projection.x)
        runs = self._reach(match, start, by_out)
        if runs is None:
            return None
        if projection is not None and (projection.x is not runs[0].x or self._twice([*runs, projection])):
            return None
        if projection is None and any(len(node.users) != 1 for node in (*passed, *self.strip(runs[0].x)[1])):
            return None
        return runs, projection, None

    def _projected(self, match: Match, projection: Match | None, shortcut: Node, by_out: dict[Node, Match]) -> Joined | None:
        """A run, and the projection of another tensor."""
        if projection is None or self._twice([match, projection]):
            return None
        return [match], projection, projection.x

    def _beside(self, match: Match, projection: Match | None, shortcut: Node, by_out: dict[Node, Match]) -> Joined | None:
        """A run, and another tensor; not one that the sum would surely broadcast."""
        source, _ = self.strip(shortcut)
        broadcast = source.op == "get_attr" or (self.is_pooled(source) and self.dimensions(match.layers[0]) > 2)
        return None if broadcast else ([match], None, shortcut)

    def _projects(self, run: Match, match: Match, passed: list[Node]) -> bool:
        """Whether a run can be the projection shortcut of another: one layer, without an activation, for the sum alone."""
        alone = all(len(node.users) == 1 for node in (run.out, *passed))
        alike = self.dimensions(run.layers[0]) == self.dimensions(match.layers[0])
        return len(run.layers) == 1 and run.layers[0].activation is None and not run.residual and alone and alike

    def _twice(self, runs: list[Match]) -> bool:
        """Whether a module is in several layers."""
        names = [name for run in runs for layer in run.layers for name in self.names(layer)]
        return len(set(names)) != len(names)

    def _reach(self, match: Match, start: Node, by_out: dict[Node, Match]) -> list[Match] | None:
        """The runs from ``start`` to the end of ``match``, or None."""
        runs = [match]
        while self.strip(runs[0].x)[0] is not start:
            before = self._before(runs[0], by_out)
            if before is None or before in runs:
                return None
            runs.insert(0, before)
        return None if self._twice(runs) else runs

    def _quiet(self, mine: list[Node], node: Node) -> bool:
        """Whether nothing that is not of the chain writes between its first node and its last."""
        first = min(self.order[part] for part in mine)
        others = [part for part in self.nodes[first : self.order[node]] if part not in mine]
        # A live BatchNorm that is called in between as well would move its statistics in another order.
        moved = {of for part in mine if self.is_norm(part) for of in self._statistics(part)}
        if any(self.is_norm(part) and not moved.isdisjoint(self._statistics(part)) for part in others):
            return False
        if moved and any(not moved.isdisjoint(map(self._read, part.all_input_nodes)) for part in others):
            return False
        return all(self.is_pure(part) or self._into_new(part, first) for part in others)

    def _statistics(self, norm: Node) -> list[Any]:
        """What a BatchNorm is told by: the statistics that it moves on, and the module, under whatever name."""
        module: Any = self.module(norm)
        if module is None:
            return norm.all_input_nodes[1:]
        tensors = [getattr(module, name, None) for name in ("running_mean", "running_var", "num_batches_tracked")]
        return [module, *(id(tensor) for tensor in tensors if tensor is not None)]

    def _read(self, node: Node) -> Any:
        """What a node is among :meth:`_statistics`."""
        return id(tensor_at(self.root, str(node.target))) if node.op == "get_attr" else node

    def _into_new(self, node: Node, first: int) -> bool:
        """Whether what an activation in place writes into was made behind ``first`` by a layer, and nobody else reads it."""
        source = node.args[0] if node.args and self.is_activation(node) else None
        if not isinstance(source, Node) or len(source.users) != 1 or self.order[source] < first:
            return False
        return self.is_conv(source) or self.is_norm(source)

    def _merge(
        self,
        runs: list[Match],
        projection: Match | None,
        skip: Node | None,
        mine: list[Node],
        node: Node,
        by_out: dict[Node, Match],
    ) -> None:
        for run in (*runs, *([projection] if projection is not None else [])):
            del by_out[run.out]
        layers, nodes, out = [layer for run in runs for layer in run.layers], [*mine, node], node
        behind: list[Node] = []
        following = self.follow(node, behind)
        if following is not None and self.is_activation(following):
            layers[-1] = replace(layers[-1], activation=self.activation(following))
            nodes += [*behind, following]
            out = following
        nodes.sort(key=self.order.__getitem__)
        side = projection.layers[0] if projection is not None else None
        before = runs[-1].out
        sized = before if len(before.users) > 1 else None
        x = self.strip(runs[0].x)[0] if projection is None and skip is None else runs[0].x  # where the shortcut starts
        by_out[out] = Match(layers, nodes, x, out, True, side, skip=skip, sized=sized)

    def entry(self, x: Node) -> tuple[EntryPlace, list[Node], Node] | None:
        """The BatchNorm that a tensor comes from, with the activation behind it; their nodes; and what it reads."""
        norm, nodes = self.strip(x)
        activation: str | nn.Module | None = None
        if self.is_activation(norm):
            activation = self.activation(norm)
            inner, passed = self.strip(cast(Node, norm.args[0]))
            norm, nodes = inner, [*passed, norm, *nodes]
        if not self.is_norm(norm):
            return None
        if type(activation_of(self.module(norm))) not in (type(None), nn.Identity):
            if activation is not None:
                return None
            activation = f"{norm.target}.act"
        return EntryPlace(self.place(norm), activation), [norm, *nodes], cast(Node, norm.args[0])

    def _first(self, match: Match) -> Node:
        """The node of a convolution."""
        return next(node for node in match.nodes if self.is_conv(node))

    def place(self, node: Node) -> str:
        """What stands for a module."""
        return self.places.get(node) or str(node.target)

    def norm_name(self, norm: str) -> str:
        """What a BatchNorm is called in :meth:`names`: by its statistics, as in :meth:`_statistics`."""
        module: Any = self.modules[norm]
        return norm if module.running_mean is None else str(id(module.running_mean))

    def _enter(self, match: Match, taken: set[Node]) -> None:
        """Take the BatchNorm in front of a chain into it, if all that read it are in the chain, behind its activation."""
        found = self.entry(match.x)
        if found is None or not taken.isdisjoint(found[1]):
            return
        place, nodes, x = found
        if not self.fits(self._first(match), nodes[0]):
            return
        skip, passed = (None, []) if match.skip is None else self.strip(match.skip)
        beside = match.residual and match.projection is None and match.skip is None  # the shortcut starts behind it
        readers = {user for node in nodes for user in node.users}
        if beside or skip in nodes or not readers <= {*nodes, *match.nodes}:
            return
        known = {name for layer in (*match.layers, match.projection) if layer is not None for name in self.names(layer)}
        mine = sorted([*nodes, *match.nodes], key=self.order.__getitem__)
        if self.norm_name(place.norm) in known or not self._quiet(mine, match.out):
            return
        match.entry, match.x, match.nodes = place, x, mine
        if skip is x and match.projection is None and all(len(node.users) == 1 for node in passed):
            match.skip, match.nodes = None, sorted([*passed, *mine], key=self.order.__getitem__)

    def _pool(self, match: Match) -> None:
        """Take the max-pooling behind a chain into it."""
        behind: list[Node] = []
        following = self.follow(match.out, behind)
        if match.residual or following is None or not self.is_pool(following):
            return
        if match.layers[-1].activation is not None and self.may_be_written(following):
            return  # the backward reads the chain's output, eager's the activation's
        if self.fits(self._first(match), following):
            match.pool = self.place(following)
            match.nodes += [*behind, following]
            match.out = following

    def _worth(self, match: Match) -> bool:
        """Whether there is something to fuse, of which something is gained."""
        layers = [*match.layers, *(() if match.projection is None else (match.projection,))]
        if match.entry is not None or any(layer.norm is not None for layer in layers):
            return True
        if self.dimensions(match.layers[0]) == 2:
            return False
        if match.residual:
            return True
        if not any(layer.activation is not None or self.has_bias(layer) for layer in match.layers):
            return False
        if self.is_pooled(match.x):
            for layer in match.layers:
                self.reasons.setdefault(layer.conv, "behind a global pooling: one pixel an image, nothing to gain")
            return False
        return True
