"""Draw docs/architecture.svg: the packages of lisa_dist by level, and what imports what. `make docs` runs it first."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, ROW, BOX = 860, 84, (112, 40)
BASE = "settings, errors, files"  # the modules that lie in no package


def packages() -> dict[str, set[str]]:
    """Every package of lisa_dist with those that it imports; modules outside a package are one, BASE or commands."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "lisa_dist").rglob("*.py")):
        own = package_of(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lisa_dist."):
                found.setdefault(own, set()).add(package_of(tuple(node.module.split("."))))
    del found["public names"]
    names = {*found, *(name for imported in found.values() for name in imported)}
    return {name: found.get(name, set()) - {name} for name in names}


def package_of(parts: tuple[str, ...]) -> str:
    """The package of a module by the parts of its name."""
    if len(parts) > 1 and parts[1] in ("cli", "__main__"):
        return "commands"
    if parts[-1] == "__init__" and len(parts) == 2:
        return "public names"
    return parts[1] if (ROOT / "lisa_dist" / parts[1]).is_dir() else BASE


def levels(graph: dict[str, set[str]]) -> list[list[str]]:
    """Packages from the lowest level up: each stands one above the highest that it imports."""
    level: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        level[name] = 1 + max((level[below] for below in graph[name]), default=-1)
    return [sorted(name for name in level if level[name] == at) for at in range(max(level.values()) + 1)]


def direct(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no chain of others implies, which are enough to draw."""

    def below(name: str) -> set[str]:
        return graph[name] | {deeper for one in graph[name] for deeper in below(one)}

    return [
        (name, to)
        for name in sorted(graph)
        for to in sorted(graph[name])
        if not any(to in below(other) for other in graph[name] - {to})
    ]


def draw() -> str:
    """The picture as SVG."""
    graph = packages()
    rows = levels(graph)[::-1]
    height, (wide, high) = ROW * len(rows), BOX
    place = {
        name: (WIDTH * (at + 0.5) / len(row), ROW * (level + 0.5))
        for level, row in enumerate(rows)
        for at, name in enumerate(row)
    }
    lines = [
        f'<line x1="{place[name][0]:.0f}" y1="{place[name][1] + high / 2:.0f}" '
        f'x2="{place[to][0]:.0f}" y2="{place[to][1] - high / 2:.0f}"/>'
        for name, to in direct(graph)
    ]
    boxes, names = [], []
    for name, (x, y) in sorted(place.items()):
        width = max(wide, 8 * len(name))
        boxes.append(f'<rect x="{x - width / 2:.0f}" y="{y - high / 2:.0f}" width="{width}" height="{high}" rx="6"/>')
        names.append(f'<text x="{x:.0f}" y="{y + 5:.0f}">{name}</text>')
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *('<g stroke="#9ca3af" stroke-width="1.2">', *lines, "</g>"),
        *('<g fill="#eef2ff" stroke="#4f46e5">', *boxes, "</g>"),
        *('<g fill="#111827" font-size="14" text-anchor="middle">', *names, "</g>"),
        "</svg>\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
