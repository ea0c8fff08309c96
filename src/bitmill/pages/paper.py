"""A picture of a page as an SVG file of its own, for cards and papers: light, with its style inside."""

from __future__ import annotations

_STYLE = """
text { font: 13px system-ui, "Helvetica Neue", Arial, "DejaVu Sans", "Noto Sans", sans-serif; fill: #1f2328 }
.tick { font-size: 12px; fill: #6a7178 }
.quiet { fill: #6a7178 } .strong { fill: #1f2328 } .grid { stroke: #e6e6e1 } .axis { stroke: #6a7178 }
.whisker { stroke: #1f2328; stroke-width: 1.3; opacity: .75 } .band { fill: #b3541e; opacity: .16 }
.front { fill: none; stroke: #2f6f9f; stroke-width: 2; opacity: .55 }
.budget { stroke: #1f2328; stroke-dasharray: 6 4 }
.spot circle { fill: #2f6f9f; stroke: #fff; stroke-width: 1.5 } .spot.beaten circle { fill: #9db4c4 }
.spot.knee circle { fill: #b3541e } .bar, .cell { fill: #2f6f9f } .bar.pooled { fill: #9db4c4 }
.broken { fill: #b3261e } .floor { stroke: #b3541e; stroke-width: 1.4; stroke-dasharray: 5 4 }
.curve { fill: none; stroke: #2f6f9f; stroke-width: 2.4 } .mark { stroke: #6a7178; stroke-dasharray: 2 4 }
.c0 { stroke: #2f6f9f } .c1 { stroke: #c77d2e } .c2 { stroke: #3f8f6b } .c3 { stroke: #a8527c }
.c4 { stroke: #7b6bb5 } .c5 { stroke: #8b8b3a } .c6 { stroke: #4aa3b5 } .c7 { stroke: #b3541e }
.c8 { stroke: #69808f } .c9 { stroke: #c96f6f }
"""


def on_paper(svg: str) -> str:
    """The same picture on white, to be opened alone."""
    start, _, rest = svg.partition(">")
    opened = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{opened}><style>{_STYLE}</style>{paper}{rest}\n"
