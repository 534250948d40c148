"""Shared by the tests of HTML reports: hostile text, and a parser of a page's tags and text."""

from html.parser import HTMLParser

EVIL = "<script>alert(1)</script> & \"'><img src=x onerror=y>\x1b\ud800"


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def names(self) -> set[str]:
        return {name for name, _ in self.tags}

    def attribute_names(self) -> set[str]:
        return {name for _, attributes in self.tags for name in attributes}
