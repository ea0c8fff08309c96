"""A picture of a page as an SVG file of its own, for cards and papers: light, with its style inside."""

from __future__ import annotations

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .tick { font-size: 12px; fill: #6a7178 }
.quiet { fill: #6a7178 } .strong { fill: #1f2328 } .grid { stroke: #e6e6e1 } .axis { stroke: #6a7178 }
.whisker { stroke: #1f2328; stroke-width: 1.3; opacity: .75 } .band { fill: #b3541e; opacity: .16 }
.front { fill: none; stroke: #2f6f9f; stroke-width: 2; opacity: .55 }
.budget { stroke: #1f2328; stroke-dasharray: 6 4 }
.spot circle { fill: #2f6f9f; stroke: #fff; stroke-width: 1.5 } .spot.beaten circle { fill: #9db4c4 }
.spot.knee circle { fill: #b3541e }
"""


def on_paper(svg: str) -> str:
    """The same picture on white, to be opened alone."""
    start, _, rest = svg.partition(">")
    opened = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{opened}><style>{_STYLE}</style>{paper}{rest}\n"
