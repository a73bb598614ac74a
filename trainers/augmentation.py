"""Augmented training rows: TinyBERT's word replacement (Jiao et al., Findings of EMNLP 2020, section 4.1).

Every alphabetic word that is no stop word gets candidates: a word of one piece those that a masked language model
proposes in its place, any other its neighbours in a table of word vectors. Copies of a sentence are drawn in which
each such word is replaced with a fixed probability. Labels are kept, and so are the original rows.

Our readings: GloVe's vectors are replaced by the model's own word embeddings, a word of several pieces being their
mean. Text between words stays as it is, and a candidate takes the capital letter of the word it replaces. Candidates
are alphabetic and no single letters. In pairs the other sentence is the original one; TinyBERT's code leaves it at its
last variant. Question and context are such a pair, and words of answers stay; TinyBERT's code has no such task.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpointing import folder_lock
from .data import AUGMENTATION, data_identity, load_data, shard_name, source_columns, task_of
from .initialization import resolve_model
from .recipe import DataSpec
from .results import write_atomic


CANDIDATES, PROBABILITY = 15, 0.4  # a word's candidates, chance that it is replaced; TinyBERT's code
SHARD_ROWS = 500  # original rows of a shard; what an interruption can lose
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SPACE = ("Ġ", "▁")  # how a piece that begins a word is marked where the others are not

STOP_WORDS = frozenset(
    """
    a an the this that these those such each every either neither another other others both all any some no none
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one ones who whom whose which what
    am is are was were be been being do does did doing done have has had having will would shall should can could may
    might must ought cannot
    not nor and or but if then else than as so because while until unless though although since whether
    of at by for with without about against between among into onto through during before after above below to from up
    down in out on off over under upon within toward towards across along around behind beside besides beyond near per
    via
    again further once here there when where why how very too just only also even still yet ever never more most less
    least few much many own same now quite rather almost already
    """.split()
)


class Proposals:
    """Candidates for the words of a sentence.

    Args:
        model: checkpoint or Hub id of a masked language model; any encoder for mode "neighbours".
        mode: "masked-lm", or "neighbours" for embedding neighbours of every word.
        count: candidates a word.

    Raises:
        ValueError: the checkpoint has no masked language model's head, or the tokenizer no offsets or mask.
    """

    def __init__(self, model: str, mode: Literal["masked-lm", "neighbours"], count: int = CANDIDATES):
        folder = resolve_model(model)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel | None = None
        self.count = count
        if not self.tokenizer.is_fast or self.tokenizer.mask_token_id is None:
            raise ValueError(f"{model}: expected a tokenizer with offsets and a mask token")
        if mode == "masked-lm":
            loaded, info = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError(
                    f"{model}: expected a masked language model, found none of its tensors "
                    f"{sorted(info['missing_keys'])[:3]}; candidates 'neighbours' need no such head"
                )
            self.model = loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        else:
            loaded = AutoModel.from_pretrained(folder, dtype=torch.float32)
        limit = min(self.tokenizer.model_max_length, loaded.config.max_position_embeddings)
        self.most_pieces = (limit - self.tokenizer.num_special_tokens_to_add(pair=True) - 2) // 2
        vectors = loaded.get_input_embeddings().weight.detach().float().cpu()  # (V, C)
        self.vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        self.words = _vocabulary(self.tokenizer, len(vectors))
        self.is_word = torch.tensor([word is not None for word in self.words])
        self.neighbours = lru_cache(maxsize=100_000)(self._neighbours)

    def __call__(self, sentence: str, spans: Sequence[tuple[int, int]]) -> list[list[str]]:
        """Candidates for the words at these character spans; depends on nothing but the sentence."""
        words = [sentence[start:end] for start, end in spans]
        proposed = self._masked(sentence, spans) if self.model is not None and spans else {}
        return [
            proposed[index] if index in proposed else self.neighbours(word.lower()) for index, word in enumerate(words)
        ]

    @torch.no_grad()
    def _masked(self, sentence: str, spans: Sequence[tuple[int, int]]) -> dict[int, list[str]]:
        """Candidates of the words of one piece: the masked sentence with the original as second segment, the most
        probable pieces but those that continue a word."""
        encoded = self.tokenizer(sentence, sentence, return_offsets_mapping=True, verbose=False)
        offsets, segments = encoded.pop("offset_mapping"), encoded.sequence_ids()
        if segments.count(0) > self.most_pieces:
            encoded = self.tokenizer(
                sentence, sentence, return_offsets_mapping=True, truncation=True, max_length=2 * self.most_pieces
            )
            offsets, segments = encoded.pop("offset_mapping"), encoded.sequence_ids()
        tokens_of: dict[int, list[int]] = {}
        for token, ((start, end), segment) in enumerate(zip(offsets, segments)):
            for index, (first, last) in enumerate(spans):
                if segment == 0 and start < last and end > first:
                    tokens_of.setdefault(index, []).append(token)
        places = {
            index: tokens[0]
            for index, tokens in tokens_of.items()
            if len(tokens) == 1
            and offsets[tokens[0]][1] == spans[index][1]
            and encoded["input_ids"][tokens[0]] != self.tokenizer.unk_token_id
        }
        if not places:
            return {}
        rows = list(places.values())
        ids = torch.tensor([encoded["input_ids"]] * len(rows))
        ids[range(len(rows)), rows] = self.tokenizer.mask_token_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in encoded:
            inputs["token_type_ids"] = torch.tensor([encoded["token_type_ids"]] * len(rows))
        logits = self.model(**{key: value.to(self.model.device) for key, value in inputs.items()}).logits
        best = logits[range(len(rows)), rows].float().cpu().topk(min(self.count, len(self.words))).indices.tolist()
        return {index: [self.words[i] for i in row if self.words[i]] for index, row in zip(places, best)}

    def _neighbours(self, word: str) -> list[str]:
        """Vocabulary words with the largest cosine to the mean of the word's pieces, without the word itself."""
        pieces = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if not pieces or self.tokenizer.unk_token_id in pieces:
            return []
        cosines = self.vectors @ self.vectors[pieces].mean(0)
        cosines[~self.is_word] = -torch.inf
        nearest = cosines.topk(min(2 * self.count, len(cosines))).indices.tolist()
        found = dict.fromkeys(self.words[i] for i in nearest if self.words[i] and self.words[i].lower() != word)
        return list(found)[: self.count]


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str | None]:
    """Piece id -> the alphabetic word of two letters or more that it is, None for all others."""
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))]
    marked = sum(piece.startswith(_SPACE) for piece in pieces) > len(pieces) // 10
    special = set(tokenizer.all_special_tokens)
    words: list[str | None] = [None] * size
    for index, piece in enumerate(pieces):
        begins = piece.startswith(_SPACE) if marked else not piece.startswith("##")
        word = piece.lstrip("".join(_SPACE)) if marked else piece
        if begins and piece not in special and word.isalpha() and len(word) > 1:  # letters are pieces of anything
            words[index] = word
    return words


def replaceable(sentence: str) -> list[tuple[int, int]]:
    """Character spans of the alphabetic words that are no stop words; words with apostrophe or hyphen are left out."""
    spans = [match.span() for match in _WORD.finditer(sentence)]
    words = [sentence[start:end] for start, end in spans]
    return [span for span, word in zip(spans, words) if word.isalpha() and word.lower() not in STOP_WORDS]


def variants(
    sentence: str,
    spans: Sequence[tuple[int, int]],
    candidates: Sequence[Sequence[str]],
    copies: int,
    probability: float,
    generator: np.random.Generator,
) -> dict[str, list[str]]:
    """Different variants of a sentence, none of them itself, from `copies` draws, with their words at the spans."""
    found: dict[str, list[str]] = {}
    for _ in range(copies):
        text, end = [], 0
        for (start, stop), options in zip(spans, candidates):
            word = sentence[start:stop]
            if generator.random() < probability and options:
                option = options[generator.integers(len(options))]
                word = option[:1].upper() + option[1:] if word[:1].isupper() else option
            text += [sentence[end:start], word]
            end = stop
        found.setdefault("".join(text) + sentence[end:], text[1::2])
    found.pop(sentence, None)
    return found


def augment(
    spec: DataSpec,
    output: str | Path,
    model: str,
    *,
    mode: Literal["masked-lm", "neighbours"] = "masked-lm",
    copies: int | None = None,
    candidates: int = CANDIDATES,
    probability: float = PROBABILITY,
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
) -> dict[str, int]:
    """Writes the training split of `spec` and its variants to `output`, in parquet shards of `shard_rows` originals.

    A row depends on itself, its index and the seed only, not on other rows or on shards. What is written is not made
    again: the same call continues after an interruption, to the same bytes. The folder is what `data.augmented` takes.

    Args:
        copies: draws for each sentence of a row; default TinyBERT's number for the task.

    Returns:
        `rows` of the training split and `augmented`, those and their variants.

    Raises:
        ValueError: data, model or a number is wrong, or `output` holds another augmentation.
    """
    output = Path(output)
    rows = load_data(spec, [spec.train_split])[spec.train_split]
    task = task_of(spec, rows)
    copies = task.copies if copies is None else copies
    if copies is None:
        raise ValueError(f"copies: {spec.task or 'own data'} is not augmented by default; expected a number of copies")
    for name, value in (("copies", copies), ("candidates", candidates), ("shard_rows", shard_rows)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    if not 0 < probability <= 1:
        raise ValueError(f"probability: expected a number in (0, 1], found {probability}")
    proposals = Proposals(model, mode, candidates)
    settings = {
        "rows": data_identity(rows),
        "shards": -(-len(rows) // shard_rows),
        "shard_rows": shard_rows,
        "model": Path(model).name,
        "weights": _digest(proposals),
        "mode": mode,
        "copies": copies,
        "candidates": candidates,
        "probability": probability,
        "seed": seed,
    }
    with folder_lock(output):
        path = output / AUGMENTATION
        found = {"shard_rows": SHARD_ROWS} | json.loads(path.read_text()) if path.exists() else settings
        if found != settings:
            changed = [key for key in settings if found.get(key) != settings[key]]
            raise ValueError(
                f"{path}: holds another augmentation ({', '.join(changed)} differ); choose another folder"
            )
        write_atomic(path, json.dumps(settings, indent=1).encode())
        written = 0
        with tqdm(total=len(rows), desc="augment", unit="row") as progress:
            for shard in range(settings["shards"]):
                file = output / shard_name(shard)
                begin, end = shard * shard_rows, min((shard + 1) * shard_rows, len(rows))
                if not file.exists():
                    made = [
                        row
                        for index in range(begin, end)
                        for row in _with_variants(rows[index], index, proposals, copies, probability, seed, progress)
                    ]
                    write_atomic(file, _parquet(made, rows.features, source_columns(spec)))
                else:
                    progress.update(end - begin)
                written += pq.ParquetFile(file).metadata.num_rows
    return {"rows": len(rows), "augmented": written}


def _with_variants(
    row: dict[str, Any],
    index: int,
    proposals: Proposals,
    copies: int,
    probability: float,
    seed: int,
    progress: tqdm,
) -> Iterator[dict[str, Any]]:
    yield row
    for field, key in enumerate(key for key in ("text", "text_pair", "question", "context") if key in row):
        spans = replaceable(row[key])
        if key == "context":
            kept = [(start, start + len(text)) for start, text in _answers(row)]
            spans = [span for span in spans if not any(span[0] < end and span[1] > start for start, end in kept)]
        generator = np.random.default_rng([seed, index, field])
        options = proposals(row[key], spans)
        for text, words in variants(row[key], spans, options, copies, probability, generator).items():
            changed = {key: text}
            if key == "context":
                growth = [(stop, len(word) - (stop - start)) for (start, stop), word in zip(spans, words, strict=True)]
                starts = [start + sum(more for stop, more in growth if stop <= start) for start, _ in _answers(row)]
                changed["answers"] = row["answers"] | {"answer_start": starts}
            yield row | changed
    progress.update()


def _answers(row: dict[str, Any]) -> list[tuple[int, str]]:
    return list(zip(row["answers"]["answer_start"], row["answers"]["text"], strict=True))


def _parquet(rows: list[dict[str, Any]], features: Features, columns: dict[str, str]) -> bytes:
    """Shard with the source's column names; labels as indices or numbers."""
    types = features.arrow_schema
    table = {name: pa.array([row[key] for row in rows], types.field(key).type) for key, name in columns.items()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, compression="zstd")
    return buffer.getvalue()


def _digest(proposals: Proposals) -> str:
    """SHA-256 of the weights that make the candidates."""
    state = {"vectors": proposals.vectors} if proposals.model is None else proposals.model.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
