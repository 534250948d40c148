"""Draws where a model looks while it answers, token by token.

python examples/look_at_attention.py Qwen/Qwen-VL-Chat dog.jpg "What is the dog doing?" looks.png
"""

from __future__ import annotations

import sys

from qwenvl_lit import QwenVL
from qwenvl_lit.types import DataError


def look(model: QwenVL, image: str, question: str, drawing: str) -> None:
    """Prints each token of the answer with the share of its attention that the image gets."""
    maps = model.attend(image, question)
    print(maps.answer)
    shares = maps.images[0].answer_maps.sum((1, 2)).tolist()
    for token, share in zip(maps.tokens, shares, strict=True):
        print(f"{share:6.1%}  {token!r}")
    model.draw_attention(maps, drawing)


if __name__ == "__main__":
    try:
        look(QwenVL.load(sys.argv[1]), *sys.argv[2:])
    except DataError as error:
        sys.exit(str(error))
