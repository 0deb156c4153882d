"""A tokenizer of SentencePiece's kind, as the metadata of a GGUF file describe it."""

from pathlib import Path

from mos_jax.models.gguf import GGUFFile
from mos_jax.models.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]
# In the order of their scores: longer pieces out of what stands further back in the list, two that
# overlap ("hel", "ell"), and one that no pair makes ("xyz").
PIECES = """▁t he ▁the ▁a hel ell in ing ▁he ▁hell hello lo ▁hello ▁▁a xyz ▁▁t an ana nan é▁ ▁é 你好
▁ a b e g h i l n o t x y z é 你 好 ! . 1 2""".split()
USER = ["\n", "\n\n", "  ", "   ", "<b>"]
TOKENS = [*SPECIALS, *BYTES, *USER, *PIECES, "[PAD0]"]
SCORES = [0.0] * (len(TOKENS) - len(PIECES) - 1) + [-float(i) for i in range(len(PIECES))] + [0.0]
TYPES = [CONTROL] * 3 + [UNKNOWN, CONTROL] + [BYTE] * 256 + [USER_DEFINED] * len(USER)
TYPES += [NORMAL] * len(PIECES) + [UNUSED]


def tokenizer_of(fields):
    named = {f"tokenizer.{key}": value for key, value in fields.items() if value is not None}
    return Tokenizer.from_gguf(GGUFFile(Path("m.gguf"), named, {}))


def sentencepiece(**changes):
    fields = {
        "ggml.model": "llama",
        "ggml.tokens": TOKENS,
        "ggml.scores": SCORES,
        "ggml.token_type": TYPES,
        "ggml.bos_token_id": 2,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 0,
        "ggml.add_space_prefix": False,
    }
    return tokenizer_of(fields | {key.replace("__", "."): v for key, v in changes.items()})
