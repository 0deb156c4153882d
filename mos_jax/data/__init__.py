"""Examples, their tokens, and batches of fixed shape."""

from mos_jax.data.batches import (
    Batch,
    PackingFigures,
    empty_batch,
    evaluation_batches,
    make_batch,
    packing_figures,
)
from mos_jax.data.config import DataConfig
from mos_jax.data.examples import (
    Example,
    Message,
    Task,
    TokenIds,
    commonest_answer,
    question_and_answer,
)
from mos_jax.data.load import Data, load_data, load_task
from mos_jax.data.loader import BatchSource, Loader
from mos_jax.data.memory import MemoryOptions, MemoryTask
from mos_jax.data.packing import Layout, choose_layout, plan_epoch, widen
from mos_jax.data.tokens import (
    TokenExample,
    Tokenised,
    Tokenizer,
    answer_ids,
    prompt_ids,
    prompt_text,
    tokenize_all,
    tokenize_example,
)

__all__ = [
    "Batch",
    "BatchSource",
    "Data",
    "DataConfig",
    "Example",
    "Layout",
    "Loader",
    "MemoryOptions",
    "MemoryTask",
    "Message",
    "PackingFigures",
    "Task",
    "TokenExample",
    "TokenIds",
    "Tokenised",
    "Tokenizer",
    "answer_ids",
    "choose_layout",
    "commonest_answer",
    "empty_batch",
    "evaluation_batches",
    "load_data",
    "load_task",
    "make_batch",
    "packing_figures",
    "plan_epoch",
    "prompt_ids",
    "prompt_text",
    "question_and_answer",
    "tokenize_all",
    "tokenize_example",
    "widen",
]
