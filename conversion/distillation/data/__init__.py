"""Conversations and documents as training examples: files and datasets in, padded or packed batches out.

    dataset = open_data([{"file": "train.jsonl", "root": "images"}], processor, max_tokens=8192)
    batch = pad([dataset[0], dataset[1]], pad_token_id=2)  # input_ids, attention_mask, labels, pixel_values

In the order in which a record passes through them:

- `records`: one record of a file or of a table;
- `formats`: what a record may look like, as messages and images;
- `encoding`: messages and images to token ids, labels and tiles, which together are called a row;
- `documents`: texts to rows, instead of these three;
- `dataset`: rows by number; `curriculum`: short ones first; `stream`: rows of streaming datasets, without end;
- `bad_rows`: counts records that cannot become rows and stops a run that meets too many;
- `collate`: rows to a batch; `tiles`: its tiles, normalised on the device;
- `sources`: the entries of a recipe's `data:`, and `training_data`: all that a run reads.
"""

from .bad_rows import BadRowCounter
from .collate import pack, pad
from .dataset import ConversationDataset, UnusableData
from .encoding import ConversationEncoder
from .formats import BadRow
from .sources import check_entry, open_data
from .stream import ConversationStream, StreamLoader
from .tiles import TileNormalizer


__all__ = [
    "BadRow",
    "BadRowCounter",
    "ConversationDataset",
    "ConversationEncoder",
    "ConversationStream",
    "StreamLoader",
    "TileNormalizer",
    "UnusableData",
    "check_entry",
    "open_data",
    "pack",
    "pad",
]
