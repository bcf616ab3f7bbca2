"""Architectures as SVG: one row per layer, one tile per expert, as wide as its number of neurons."""

from __future__ import annotations

from html import escape

from moesaic.nas.costs.use import LayerUse
from moesaic.nas.report.colours import EXPERT, INK, MUTED, SHARED, USED
from moesaic.nas.report.data import Model
from moesaic.search_spaces import FeedForward
from moesaic.search_spaces.architecture import layer_names
from moesaic.search_spaces.draw import LayerPicture, picture

_WIDTH, _LEFT, _TILES, _GAP = 1040, 118, 500, 2
_ROW, _TILE, _BAR = 46, 22, 4
_TEXT_AT = _LEFT + _TILES + 20

HATCH = (
    '<svg width="0" height="0" aria-hidden="true"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<rect width="6" height="6" fill="{SHARED}"/><rect width="2" height="6" fill="#fff" fill-opacity="0.55"/>'
    "</pattern></defs></svg>"
)
"""The fill pattern of shared experts, once per page: every picture refers to it."""


def pixels_per_neuron(models: list[Model]) -> float:
    """A common scale for pictures that are compared: the largest feed-forward part fills the row."""
    parts = [layer.feed_forward for model in models for layer in model.architecture.layers.values()]
    wide = ((_TILES - _GAP * (part.experts + bool(part.shared_size))) / part.neurons for part in parts if part.experts)
    return min(wide, default=1.0)


def architecture_svg(model: Model, scale: float) -> str:
    """The picture of ``model`` at ``scale`` pixels per neuron."""
    layers = model.architecture.layers
    names = layer_names(layers)
    rows = []
    for line, layer, use in zip(picture(model.architecture), layers.values(), model.uses, strict=True):
        row = _row(names[line.slot], line, layer.feed_forward, use, scale)
        rows.append(f'<g transform="translate(0 {len(rows) * _ROW})">{row}</g>')
    name = escape(f"Architecture {model.name}, {len(layers)} layers")
    return (
        f'<svg class="architecture" viewBox="0 0 {_WIDTH} {len(rows) * _ROW}" role="img" aria-label="{name}">'
        f"{''.join(rows)}</svg>"
    )


def use_text(part: FeedForward, use: LayerUse) -> str:
    """What one token uses of a layer, shared expert included."""
    if not part.experts:
        return ""
    neurons = f"{use.neurons + part.shared_size:.0f} of {part.neurons} neurons per token"
    if part.router is None:
        return neurons
    experts = f"{use.pairs:.2f} of {part.experts} experts" + (" and the shared one" if part.shared_size else "")
    return f"{experts}, {neurons}"


def _row(name: str, line: LayerPicture, part: FeedForward, use: LayerUse, scale: float) -> str:
    shapes, at = [], float(_LEFT)
    tiles = ([(line.shared, "url(#hatch)", "shared expert")] if line.shared else []) + [
        (size, EXPERT, "expert" if part.router else "dense layer") for size in line.tiles
    ]
    for size, fill, kind in tiles:
        width = size * scale
        shapes.append(
            f'<rect x="{at:.1f}" y="4" width="{width:.1f}" height="{_TILE}" rx="2" fill="{fill}">'
            f"<title>{kind} of {size} neurons</title></rect>"
        )
        if width >= 9 * len(str(size)):
            shapes.append(_text(at + width / 2, 19.5, str(size), size=11, anchor="middle"))
        at += width + _GAP
    used = (use.neurons + part.shared_size) * scale
    shapes.append(
        f'<rect x="{_LEFT}" y="{_TILE + 7}" width="{used:.1f}" height="{_BAR}" rx="2" fill="{USED}">'
        "<title>neurons that one token uses</title></rect>"
    )
    return "".join(
        [
            _text(0, 19.5, name, MUTED),
            _text(_LEFT - 14, 19.5, line.attention, anchor="end"),
            *shapes,
            _text(_TEXT_AT, 16, line.feed_forward),
            _text(_TEXT_AT, 33, use_text(part, use), MUTED, size=11),
        ]
    )


def _text(x: float, y: float, text: str, colour: str = INK, *, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
