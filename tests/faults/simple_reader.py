"""A second reader of rows, written from docs/data.md alone, and rows for both.

A conversation is a list of (role, pieces). A piece is text, ("image", name), ("label", text) or
("box", numbers). Objects have one box here, in pixels or on the grid.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

Piece = str | tuple[str, Any]
Conversation = list[tuple[str, list[Piece]]]

TAG = re.compile(
    "<img>(.*?)</img>|(<image>)|(<ref-object>)|(<bbox>)|<ref>(.*?)</ref>|<box>(.*?)</box>",
    re.DOTALL,
)
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
ROLES["system"] = "system"
IMAGES = ("a.png", "b.png")  # those that exist, 640 x 480 pixels
LAYOUTS = ("conversations", "messages", "query", "instruction", "conversation", "vqa", "text")


def read(row: dict[str, Any]) -> Conversation:
    """Returns the conversation of a row; raises whatever Python raises if it cannot."""
    is_vqa = "question" in row
    # An empty system message is none, as in csv.
    turns = [("system", row["system"])] if row.get("system") and not is_vqa else []
    for question, answer in row.get("history") or []:
        turns += [("user", question), ("assistant", answer)]
    if "conversations" in row:
        turns += [(ROLES[entry["from"]], entry["value"]) for entry in row["conversations"]]
    elif "messages" in row:
        turns += [(ROLES[entry["role"]], text_of(entry["content"])) for entry in row["messages"]]
    elif "query" in row:
        turns += [("user", row["query"]), ("assistant", row.get("response"))]
    elif "instruction" in row:
        more = "\n" + row["input"] if row.get("input") else ""
        turns += [("user", row["instruction"] + more), ("assistant", row.get("output"))]
    elif "conversation" in row:
        for pair in row["conversation"]:
            turns += [("user", pair["human"]), ("assistant", pair.get("assistant"))]
    elif is_vqa:
        answers = [answer for answer in row.get("answers") or [] if answer is not None]
        best = max(answers, key=answers.count) if answers else None
        turns += [("user", ("vqa", row["image"], row["question"])), ("assistant", best)]
    else:
        turns += [("user", ""), ("assistant", row["text"])]
    turns = [(role, text) for role, text in turns if text is not None]
    return Filler(row).fill(turns)


def text_of(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for item in content:
        is_image = item["type"] == "image"
        texts.append(f"<img>{item['image']}</img>" if is_image else item["text"])
    return "".join(texts)


class Filler:
    """Puts the images and objects of a row where its tags are."""

    def __init__(self, row: dict[str, Any]):
        is_vqa = "question" in row
        images = row.get("images") or ([row["image"]] if "image" in row and not is_vqa else [])
        self.images = [images] if isinstance(images, str) else list(images)
        self.objects = row.get("objects") or []
        self.counts = {"image": 0, "label": 0, "box": 0}

    def fill(self, turns: list[tuple[str, Any]]) -> Conversation:
        texts = "".join(text for _, text in turns if isinstance(text, str))
        if self.images and "<image>" not in texts:
            position = [role for role, _ in turns].index("user")
            role, text = turns[position]
            turns[position] = (role, "<image>" * len(self.images) + text)
        return [(role, self.pieces(text)) for role, text in turns]

    def pieces(self, text: Any) -> list[Piece]:
        if isinstance(text, tuple):
            _, image, question = text
            # The published prompt of VQA
            return [("image", image), *self.pieces(f"{question} Answer:")]
        pieces: list[Piece] = []
        end = 0
        for tag in TAG.finditer(text):
            pieces += [text[end : tag.start()], *self.replaced(tag)]
            end = tag.end()
        return joined([*pieces, text[end:]])

    def replaced(self, tag: re.Match[str]) -> list[Piece]:
        path, image, label, box, label_text, box_text = tag.groups()
        if path is not None:
            return [("image", path)]
        if image:
            return [("image", self.next("image", self.images))]
        if label:
            return [("label", self.next("label", self.objects)["caption"])]
        if box:
            return [("box", tuple(map(float, self.next("box", self.objects)["bbox"])))]
        if label_text is not None:
            return [("label", label_text)]
        return [("box", tuple(float(number) for number in re.findall(r"\d+", box_text)))]

    def next(self, kind: str, values: list[Any]) -> Any:
        self.counts[kind] += 1
        return values[self.counts[kind] - 1]


def joined(pieces: list[Piece]) -> list[Piece]:
    """Joins neighbouring texts and leaves out empty ones."""
    result: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and result and isinstance(result[-1], str):
            result[-1] += piece
        elif piece != "":
            result.append(piece)
    return result


class Rows:
    """Draws rows of one layout, and spoils some of them."""

    def __init__(self, layout: str, seed: int):
        self.layout = layout
        self.chance = random.Random(seed)

    def row(self) -> dict[str, Any]:
        return getattr(self, self.layout)()

    def spoiled(self) -> dict[str, Any]:
        """A row in which up to three values are replaced, removed or added."""
        row = json.loads(json.dumps(self.row()))
        for _ in range(self.chance.randint(0, 3)):
            node: Any = row
            while True:
                keys = list(node) if isinstance(node, dict) else range(len(node))
                if not keys:
                    break
                key = self.chance.choice(keys)
                inner = node[key]
                if isinstance(inner, dict | list) and self.chance.random() < 0.7:
                    node = inner
                    continue
                self.spoil(node, key)
                break
        return row

    def spoil(self, node: Any, key: Any) -> None:
        match self.chance.randint(0, 3):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                added = self.chance.choice(("id", "system", "images", "text", "from", "x"))
                node[added] = self.odd_value()
            case 2 if isinstance(node[key], str):
                text = node[key]
                cut = self.chance.randint(0, len(text))
                node[key] = text[:cut] + str(self.odd_value()) + text[cut:]
            case _:
                node[key] = self.odd_value()

    def odd_value(self) -> Any:
        values = (None, True, 0, -1.5, 10**30, "", " ", "\n", "<img>", "</img>", "<box>(1,2)")
        values += ("none.png", "a.png", [], {}, ["a"], {"a": 1}, "\u2028", "\x00", "<ref>x</ref>")
        return self.chance.choice(values)

    def words(self) -> str:
        alphabet = ("dog", "a", "Ä", "狗", "🐶", " ", "\n", "1", "(", '"', "\\", "\u2029", "<b>")
        return "".join(self.chance.choice(alphabet) for _ in range(self.chance.randint(1, 6)))

    def box(self) -> list[int]:
        left, top = self.chance.randint(0, 300), self.chance.randint(0, 200)
        return [left, top, left + self.chance.randint(1, 300), top + self.chance.randint(1, 200)]

    def markup(self) -> str:
        x1, y1, x2, y2 = self.box()
        return (
            f"<ref>{self.chance.choice(('dog', 'the cat'))}</ref><box>({x1},{y1}),({x2},{y2})</box>"
        )

    def with_images(self, question: str) -> str:
        for image in self.chance.sample(IMAGES, self.chance.randint(0, 2)):
            question = f"<img>{image}</img>{question}"
        return question

    def turns(self) -> list[tuple[str, str]]:
        """Pairs of question and answer; the first question has an image in half of the rows."""
        pairs = [(self.words(), self.words()) for _ in range(self.chance.randint(1, 3))]
        if self.chance.random() < 0.5:
            question, answer = pairs[0]
            pairs[0] = (f"<img>a.png</img>{self.with_images(question)}", answer + self.markup())
        return pairs

    def more(self) -> dict[str, Any]:
        """Keys that any row may have."""
        more: dict[str, Any] = {}
        if self.chance.random() < 0.3:
            more["system"] = self.words()
        if self.chance.random() < 0.3:
            more["id"] = self.chance.choice(("x", 7))
        return more

    def conversations(self) -> dict[str, Any]:
        entries = []
        for question, answer in self.turns():
            entries.append({"from": self.chance.choice(("user", "human")), "value": question})
            entries.append({"from": self.chance.choice(("assistant", "gpt")), "value": answer})
        return {"conversations": entries, **self.more()}

    def messages(self) -> dict[str, Any]:
        entries: list[dict[str, Any]] = []
        for question, answer in self.turns():
            content: Any = question
            if self.chance.random() < 0.5:
                content = [{"type": "image", "image": "b.png"}, {"type": "text", "text": question}]
            entries.append({"role": "user", "content": content})
            entries.append({"role": "assistant", "content": answer})
        return {"messages": entries, **self.more()}

    def query(self) -> dict[str, Any]:
        [*history, (question, answer)] = self.turns()
        row = {"query": question, "response": answer, "history": history, **self.more()}
        if self.chance.random() < 0.5:
            bbox_type = self.chance.choice(("real", "norm_1000"))
            found = {"caption": "dog", "bbox": self.box(), "bbox_type": bbox_type, "image": 0}
            row |= {"images": ["a.png"], "objects": [found], "history": []}
            row |= {"query": "Find <ref-object>", "response": "<bbox>" + self.words()}
        return row

    def instruction(self) -> dict[str, Any]:
        [*history, (question, answer)] = self.turns()
        row = {"instruction": question, "output": answer, "history": history, **self.more()}
        if self.chance.random() < 0.5:
            row["input"] = self.words()
        return row

    def conversation(self) -> dict[str, Any]:
        pairs = [{"human": question, "assistant": answer} for question, answer in self.turns()]
        return {"conversation": pairs, **self.more()}

    def vqa(self) -> dict[str, Any]:
        answers = [
            self.chance.choice(("2", "two", "dog")) for _ in range(self.chance.randint(1, 5))
        ]
        return {"image": "a.png", "question": self.words(), "answers": answers}

    def text(self) -> dict[str, Any]:
        [(question, answer), *_] = self.turns()
        return {"text": question + answer, **self.more()}
