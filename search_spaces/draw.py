"""Draw an architecture as text: a line per layer, a tile per expert, as wide as the expert is large."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.search_spaces.architecture import Architecture, Slot, layer_names

CELLS = 40
"""Width of the largest feed-forward part of a picture, in characters."""


@dataclass(frozen=True)
class LayerPicture:
    """One line: ``tiles`` are the sizes of the routed experts, ``text`` the same as a row of characters. ``attention``
    has the heads, and after them those of cross-attention and how many encoder layers it reads."""

    slot: Slot
    attention: str
    tiles: tuple[int, ...]
    shared: int
    router: str
    text: str

    @property
    def feed_forward(self) -> str:
        """The feed-forward part in words."""
        return f"{self.router}: {sizes_text(self)}" if self.tiles else "no feed-forward part"


def picture(architecture: Architecture) -> list[LayerPicture]:
    """The lines of the picture; all layers have the same scale."""
    scale = max(1, *(layer.feed_forward.neurons for layer in architecture.layers.values())) / CELLS
    lines = []
    for slot, layer in architecture.layers.items():
        part = layer.feed_forward
        tiles = ["█" * max(1, round(size / scale)) for size in part.expert_sizes]
        if part.shared_size:
            tiles.insert(0, "▒" * max(1, round(part.shared_size / scale)))
        heads, kv_heads = layer.attention.heads, layer.attention.kv_heads
        attention = f"{heads}/{kv_heads} heads" if heads else "no heads"
        if layer.cross is not None:
            attention += f", {layer.cross.heads}/{layer.cross.kv_heads} to {layer.cross.span}"
        router = str(part.router) if part.router else "dense"
        lines.append(LayerPicture(slot, attention, part.expert_sizes, part.shared_size, router, " ".join(tiles)))
    return lines


def sizes_text(line: LayerPicture) -> str:
    """Expert sizes in words: ``4 x 64 + 2 x 32``, the shared expert last."""
    counts = {size: line.tiles.count(size) for size in line.tiles}
    words = [f"{n} x {size}" if n > 1 else str(size) for size, n in counts.items()]
    return " + ".join(words) + (f" + {line.shared} shared" if line.shared else "")


def draw(architecture: Architecture) -> str:
    """The whole picture as text, for a terminal and a model card: a summary line, then one per layer."""
    lines, stacks = picture(architecture), architecture.stacks
    shapes = [f"width {stack.width}, {len(stack.layers)} layers" for stack in stacks.values()]
    if len(stacks) > 1:
        shapes = [f"{name} {shape}" for name, shape in zip(stacks, shapes, strict=True)]
    head = ", ".join([*shapes, architecture.backbone.activation, architecture.fingerprint])
    tile_width = max(len(line.text) for line in lines)
    attention_width = max(10, *(len(line.attention) for line in lines))
    names = layer_names(architecture.layers)
    rows = [
        f"  {names[line.slot]:>2}  {line.attention:>{attention_width}}  {line.text:<{tile_width}}  {line.feed_forward}"
        for line in lines
    ]
    return "\n".join([head, *rows])
