"""Drawings and images as parts of a page: no file, no request, colours of the page's theme."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
from markupsafe import Markup
from PIL import Image

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_DROPPED = {f"{{{_SVG}}}{name}" for name in ("metadata", "style")}

PALETTE = {
    "#ffffff": ("paper", "#16191d"),
    "#000000": ("ink", "#e6e8ea"),
    "#333333": ("ink", "#e6e8ea"),
    "#777777": ("muted", "#9aa3ac"),
    "#6e6e6e": ("muted", "#9aa3ac"),
    "#c4c4c4": ("rule", "#525a63"),
    "#bbbbbb": ("rule", "#525a63"),
    "#e6e6e6": ("grid", "#2c3238"),
    "#eaf2f8": ("inner", "#1f2c38"),
    "#f3f3f3": ("outer", "#24292e"),
    "#9a9a9a": ("grey", "#8b949e"),
    "#0072b2": ("blue", "#4aa8e0"),
    "#d55e00": ("vermilion", "#f08a3c"),
    "#009e73": ("green", "#2fc295"),
    "#e69f00": ("orange", "#f0b429"),
}
"""Colour of a figure -> its name in the page's style sheet, and what it is on a dark page."""

_LIGHT = {"ink": "#1f2328", "muted": "#5f6670"}
"""Where the page is not exactly as the figures."""


def palette(dark: bool) -> dict[str, str]:
    """Return name -> colour of the page's theme."""
    colours = {name: on_dark if dark else own for own, (name, on_dark) in PALETTE.items()}
    return colours if dark else {**colours, **_LIGHT}


def inline_svg(data: bytes, prefix: str, label: str) -> Markup:
    """Make a drawing of matplotlib part of a page.

    Args:
        data: an SVG file, its texts kept as texts.
        prefix: of the drawing's ids, which a page may have once.
        label: what those hear who do not see it.
    """
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(data)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in _DROPPED:
                parent.remove(child)
    for element in root.iter():
        _adapt(element, prefix)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    text = ElementTree.tostring(root, encoding="unicode")
    # HTML knows the namespace by itself, and white space of paths is no text.
    text = re.sub(r"\s*\n\s*", " ", text).replace(f' xmlns="{_SVG}"', "")
    return Markup(text)


def _adapt(element: ElementTree.Element, prefix: str) -> None:
    link = element.attrib.pop(_LINK, None)
    if link:
        element.set("href", f"#{prefix}-{link[1:]}")
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set("id", f"{prefix}-{value}")
        elif name == "style":
            element.set("style", _themed(value))
        elif "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{prefix}-"))
        elif name == "transform":
            if value.startswith("rotate(-0 "):
                del element.attrib["transform"]
        elif name == "d":
            element.set("d", _short_path(value))
    # Names that matplotlib numbers, to which nothing refers.
    if re.fullmatch(rf"{prefix}-[A-Za-z]+\d?d?_\d+", element.get("id", "")):
        del element.attrib["id"]


def _themed(style: str) -> str:
    def named(match: re.Match[str]) -> str:
        found = PALETTE.get(match[0].lower())
        return f"var(--{found[0]})" if found else match[0]

    style = re.sub(r"font-family:[^;]*;?\s*", "", style)
    return re.sub(r"#[0-9a-fA-F]{6}\b", named, style)


def _short_path(path: str) -> str:
    """Round a path to a hundredth of a point."""
    return re.sub(
        r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), path
    )


def png_uri(image: np.ndarray, most: int = 96) -> str:
    """Return an image as a data URI.

    Args:
        image: uint8[height, width, channels], 1 or 3 channels.
        most: pixels a side; larger ones are shrunk.
    """
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((most, most))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
