"""Draw images from a trained diffusion transformer.

    python -m recipes.sample_images runs/tiny-dit --labels 0,1,2,3,4,5,6,7,8,9 --each 4

writes images.npy, (images, rows, columns, channels) float32 in 0 to 1, and images.svg, a page to look at with a row for
each class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.errors import UserError
from recipes.models.dit import DiTConfig, sampled

if TYPE_CHECKING:
    import numpy as np

PIXEL = 6
"""Rows and columns of a pixel on the page."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.sample_images", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the directory of a run, or of one checkpoint")
    parser.add_argument("--labels", help="classes, with commas between them; default: all")
    parser.add_argument("--each", type=int, default=4, help="images of each class (default: 4)")
    parser.add_argument("--steps", type=int, default=50, help="steps of Euler's method (default: 50)")
    parser.add_argument("--guidance", type=float, default=1.5, help="weight of the class (default: 1.5; 1: as learned)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--out", default="images", help="the files' name without its end (default: images)")
    parser.add_argument("--backend", help="jax or torch")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, and not their average")
    args = parser.parse_args(argv)
    try:
        return draw(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def draw(args: argparse.Namespace) -> int:
    """Write the images that the command asks for."""
    import numpy as np

    import portatrain

    made = portatrain.load(args.run, backend=args.backend)
    config = made.recipe.model
    if not isinstance(config, DiTConfig):
        raise UserError(
            f"run {args.run}",
            expected="one of a DiT",
            got=type(config).__name__,
            do="Train tiny-dit, and name its run.",
        )
    if made.recipe.ema_decay is not None and not args.no_ema:
        made = portatrain.load(args.run, backend=args.backend, ema=True)
    try:
        classes = [int(n) for n in args.labels.split(",")] if args.labels else list(range(config.classes))
    except ValueError:
        raise UserError("--labels", expected="numbers", got=args.labels, do="Write --labels 0,1,2.") from None
    if args.each < 1:
        raise UserError("--each", expected="at least 1", got=str(args.each), do="Use 4.")
    labels = np.repeat(classes, args.each)
    images = sampled(made.predict, config, labels, steps=args.steps, guidance=args.guidance, seed=args.seed)
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out.with_suffix(".npy"), images)
        out.with_suffix(".svg").write_text(page(images, args.each), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out {args.out}", expected="a writable name", got=str(error), do="Choose another."
        ) from error
    print(f"{len(images)} images of step {made.step}: {out.with_suffix('.npy')}, {out.with_suffix('.svg')}")
    return 0


def page(images: np.ndarray, each: int) -> str:
    """Return an SVG page of images (B, rows, columns, 1 or 3), `each` in a row."""
    import numpy as np

    _, rows, columns, channels = images.shape
    width, height = each * (columns + 1) * PIXEL, len(images) // each * (rows + 1) * PIXEL
    found = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" shape-rendering="crispEdges">']
    for n, image in enumerate(np.rint(images * 255).astype(int)):
        top, left = n // each * (rows + 1), n % each * (columns + 1)
        for (row, column), pixel in zip(np.ndindex(rows, columns), image.reshape(-1, channels), strict=True):
            red, green, blue = pixel if channels == 3 else (pixel[0],) * 3
            found.append(
                f'<rect x="{(left + column) * PIXEL}" y="{(top + row) * PIXEL}" width="{PIXEL}" height="{PIXEL}" '
                f'fill="#{red:02x}{green:02x}{blue:02x}"/>'
            )
    return "\n".join([*found, "</svg>\n"])


if __name__ == "__main__":
    raise SystemExit(main())
