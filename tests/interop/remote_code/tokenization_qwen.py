"""Stands in for the published file of this name: loads the vocabulary, and encodes single bytes."""

import base64

from transformers import PreTrainedTokenizer


class QWenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "qwen.tiktoken"}  # noqa: RUF012

    def __init__(self, vocab_file, **kwargs):
        self.ranks = {}
        with open(vocab_file, "rb") as file:
            for line in file.read().splitlines():
                token, rank = line.split()
                self.ranks[base64.b64decode(token)] = int(rank)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.ranks)

    def get_vocab(self):
        return {token.decode("latin-1"): rank for token, rank in self.ranks.items()}

    def _tokenize(self, text):
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.ranks[token.encode("latin-1")]
