"""A conversation that goes on from what a model has already read.

Mamba-2 layers keep all they know of the past in a state of fixed size, so a conversation can stop, be copied, saved
and continued without reading anything twice. `ConversationState` is that: the model's cache, and the text that the
cache has not seen yet. What it reads is token for token the conversation as the chat template renders it whole.

The kept state always ends where tokens end whatever follows: at a control token (the end of a turn, or of a picture)
or before a space. The start of an answer is not the start of the stored answer, so a state never ends there.
"""

import copy
import hashlib
import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .processing_mmmamba import PLACEHOLDER, as_text, expand_placeholders
from .tokenization_mmmamba import PLAIN_TEXT_MARK


FORMAT = "mmmamba-conversation-1"
MARK = "\x00"  # stands for what is said while a template is taken apart; no tokenizer meets it
TILES_AT_ONCE = 16
# Text up to the last space that follows no other: see `MmMambaTokenizer.splits_at_spaces`.
WORDS = re.compile(f".*[^\\s▁{PLAIN_TEXT_MARK}](?= )", re.DOTALL)
WORD = "x"  # any word, to stand before a space


def generation_options(model, tokenizer, generation_config: dict | GenerationConfig, streamer=None) -> dict:
    """Arguments of `generate` for an answer, which ends with `<|im_end|>` whatever the generation config knows."""
    as_object = isinstance(generation_config, GenerationConfig)
    options = {"generation_config": generation_config} if as_object else dict(generation_config)
    defaults = options.get("generation_config", model.generation_config)
    options["streamer"] = options.pop("streamer", streamer)
    if options.get("max_length") is not None:
        options.setdefault("max_new_tokens", None)  # the model's own would win
    elif not as_object or defaults.max_length is None:
        options.setdefault("max_new_tokens", defaults.max_new_tokens or 1024)
    ends = options.pop("eos_token_id", defaults.eos_token_id)
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
    ends = sorted((ends | {tokenizer.convert_tokens_to_ids("<|im_end|>")}) - {None, tokenizer.unk_token_id})
    return options | {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


def decode_answer(tokenizer, ids: list[int], ends: list[int]) -> str:
    """The answer in generated ids, up to the first of `ends`."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def check_tiles(num_patches_list: list[int], pixel_values: Tensor | None) -> None:
    """Raises ValueError if the tiles of all pictures are not as many as there are."""
    tiles = 0 if pixel_values is None else len(pixel_values)
    if sum(num_patches_list) != tiles:
        raise ValueError(
            f"num_patches_list counts {sum(num_patches_list)} tiles but pixel_values has {tiles}; give the number "
            "of tiles of each picture, thumbnail included."
        )


class TemplateError(ValueError):
    """A chat template whose turns cannot be rendered one by one."""


class ConversationState:
    """What a model has read and said, ready to go on.

        state = model.conversation(tokenizer)
        state.extend(text=document)                     # read now, answer later
        print(state.ask("What is it about?", {"max_new_tokens": 64}))
        other = state.fork()                            # two continuations of one past
        state.save("book.safetensors")
        state = ConversationState.load("book.safetensors", model, tokenizer)

    Args:
        model: An `MmMambaForConditionalGeneration`.
        tokenizer: The package's tokenizer, with its chat template.
        system_message: Replaces the template's own.

    Raises:
        TemplateError: if the chat template renders a turn otherwise the more turns there are.
    """

    def __init__(self, model, tokenizer, system_message: str | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.system_message = system_message
        self.cache = model.new_cache()
        self.ids: list[int] = []  # what the cache has read
        self.last = ""  # text whose encoding ends as theirs does: a control token, or a word
        self.pending = ""  # rendered text behind it
        self.in_turn = False  # whether the user's turn is open
        self.turns = 0
        self.home: tuple[torch.device, torch.dtype] | None = None  # where the model was when it read them
        self._pieces = self._take_apart()

    def _render(self, *said: str, prompt: bool = False) -> str:
        system = [] if self.system_message is None else [self.system_message]
        roles = ["system"] * len(system) + [("user", "assistant")[i % 2] for i in range(len(said))]
        texts = [as_text(text, self.tokenizer) for text in system] + list(said)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _take_apart(self) -> dict[str, str]:
        """What the template writes around what is said."""
        start, _ = self._render(MARK).split(MARK)
        asked, answered = self._render(MARK, prompt=True), self._render("a", MARK)
        before, end_of_answer = answered.split(MARK)
        turn, end_of_turn = self._render("a", "b", MARK).removeprefix(self._render("a", "b")).split(MARK)
        prompt = asked.removeprefix(start + MARK + end_of_turn)
        pieces = {
            "start": start,
            "turn": turn,
            "end of turn": end_of_turn,
            "prompt": prompt,
            "answer": before.removeprefix(start + "a" + end_of_turn),
            "end of answer": end_of_answer,
            # Turns in which nothing is said may be written otherwise.
            "empty start": self._render(""),
            "empty turn": self._render("a", "b", "").removeprefix(self._render("a", "b")),
            "empty answer": self._render("a", "").removeprefix(self._render("a")),
        }
        whole = self._render("a", "b", "c", "d", "e", prompt=True)
        ours = ""
        for first, asks, answers in ((True, "a", "b"), (False, "c", "d")):
            ours += (
                pieces["start" if first else "turn"] + asks + end_of_turn + pieces["answer"] + answers + end_of_answer
            )
        if ours + turn + "e" + end_of_turn + prompt != whole:
            raise TemplateError(
                "The tokenizer's chat template renders a turn otherwise the more turns there are, so nothing that was "
                "read can be kept; use chat() with its history."
            )
        return pieces

    def __len__(self) -> int:
        """Tokens that were read and are kept."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Size of the kept state in bytes: constant for Mamba-2 layers, growing by token for attention layers."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def extend(
        self, text: str = "", pixel_values: Tensor | None = None, num_patches_list: list[int] | None = None
    ) -> "ConversationState":
        """Adds to the user's turn and reads it, as far as it cannot change by what may follow.

        Args:
            text: What to add, with `<image>` for each picture; pictures without one stand before the text.
            pixel_values: (tiles, channels, height, width), the tiles of the new pictures in order; or None.
            num_patches_list: Tiles of each new picture; all tiles are one picture if not given.

        Returns:
            This state.

        Raises:
            ValueError: if placeholders, `num_patches_list` and tiles disagree in number; nothing is added then.
        """
        if text or pixel_values is not None or num_patches_list:
            with self._undone_on_failure():
                self._add(text, pixel_values, num_patches_list)
        return self

    def ask(
        self,
        question: str,
        generation_config: dict | GenerationConfig,
        pixel_values: Tensor | None = None,
        num_patches_list: list[int] | None = None,
        streamer=None,
    ) -> str:
        """Ends the user's turn with a question and answers it; the answer becomes part of the conversation.

        Args:
            question: What to ask; may be empty after `extend`.
            generation_config: Arguments of `generate`, or a GenerationConfig; left as it is.
            pixel_values, num_patches_list: As in `extend`.
            streamer: A Transformers streamer, which gets the answer as it grows.

        Raises:
            ValueError: as `extend`, and if nothing is asked; the conversation stays as it was then.
        """
        if not self.in_turn and not question.replace(PLACEHOLDER, "").strip():
            raise ValueError("The question is empty; ask something.")
        options = generation_options(self.model, self.tokenizer, generation_config, streamer)
        with self._undone_on_failure():
            self._add(question, pixel_values, num_patches_list, self._pieces["end of turn"])
            self._ready()
            prompt = self._encode(self.pending + self._pieces["prompt"])
            ids = torch.tensor([self.ids + prompt], device=self.model.device)
            kept, cache = self._snapshot(), self.cache
            rows = rows_of(self.model, options)
            if rows > 1:  # beams, or several answers of which the first is taken: on a copy
                with torch.no_grad():
                    cache = copy.deepcopy(cache)
                    cache.reorder_cache(torch.zeros(rows, dtype=torch.long, device=self.model.device))
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options
            )
            self._go_back(kept)
            answer = decode_answer(self.tokenizer, output[0, ids.shape[1] :].tolist(), options["eos_token_id"])
            self._answer(answer)
        return answer

    def tell(
        self,
        question: str,
        answer: str,
        pixel_values: Tensor | None = None,
        num_patches_list: list[int] | None = None,
    ) -> None:
        """Adds a turn whose answer is known; arguments and what is raised as in `ask`."""
        with self._undone_on_failure():
            self._add(question, pixel_values, num_patches_list, self._pieces["end of turn"])
            self._answer(answer)

    def fork(self) -> "ConversationState":
        """A second conversation with the same past; each goes on without the other."""
        other = copy.copy(self)
        other.ids = list(self.ids)
        with torch.no_grad():
            other.cache = copy.deepcopy(self.cache)
        return other

    def _add(self, text: str, pixel_values: Tensor | None, num_patches_list: list[int] | None, end: str = "") -> None:
        """Adds to the user's turn, see `extend`, and what the template writes behind it."""
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        check_tiles(num_patches_list, pixel_values)
        if num_patches_list and PLACEHOLDER not in text:
            text = (PLACEHOLDER + "\n") * len(num_patches_list) + text
        said = PLACEHOLDER.join(as_text(part, self.tokenizer) for part in text.split(PLACEHOLDER))
        (said,) = expand_placeholders([said], num_patches_list, self.model.config.vision_config.tokens_per_tile)
        if not self.in_turn:
            begin = "turn" if self.turns else "start"
            said, end = (self._pieces[begin] + said, end) if said else (self._pieces[f"empty {begin}"], "")
        self._read(self.pending + said + end, pixel_values)
        self.in_turn = True

    def _answer(self, answer: str) -> None:
        # Read with the next turn: until then only its end would be known for certain.
        said = as_text(answer, self.tokenizer)
        self.pending += (
            self._pieces["answer"] + said + self._pieces["end of answer"] if said else self._pieces["empty answer"]
        )
        self.in_turn = False
        self.turns += 1

    def _encode(self, text: str) -> list[int]:
        """Ids of text that follows what was read."""
        if not self.ids:
            return self.tokenizer(text)["input_ids"]
        read, both = (self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in (self.last, self.last + text))
        return both[len(read) :]

    def _read(self, text: str, pixel_values: Tensor | None = None) -> None:
        """Reads text as far as its tokens are certain and keeps the rest pending."""
        ends = [(text.rfind(token) + len(token), token) for token in self.tokenizer.get_added_vocab() if token in text]
        if self.tokenizer.splits_at_spaces and (words := WORDS.match(text)):
            ends.append((words.end(), WORD))
        if not ends:
            self.pending = text
            return
        end, last = max(ends)
        ids = self._encode(text[:end])
        self._feed(ids, pixel_values)
        self.ids += ids
        self.pending, self.last = text[end:], last

    @torch.no_grad()
    def _feed(self, ids: list[int], pixel_values: Tensor | None) -> None:
        self._ready()
        model, image_token = self.model, self.model.config.image_token_id
        tiles = iter(() if pixel_values is None else pixel_values.split(TILES_AT_ONCE))
        rows = model.model.embed_tokens.weight.new_empty(0, model.config.text_config.hidden_size)
        pieces = torch.tensor([ids], device=model.device).split(
            model.prefill_piece(1, len(self.ids) + len(ids)), dim=1
        )
        with tqdm(total=len(ids), unit=" tokens", desc="reading", delay=2, disable=None, leave=False) as bar:
            for piece in pieces:
                wanted = int((piece == image_token).sum())
                while len(rows) < wanted:  # pictures become rows as they are needed, whatever their number
                    some = next(tiles)
                    new = model.get_image_features(some).pooler_output
                    if new.shape[1] != (expected := model.config.vision_config.tokens_per_tile):
                        raise ValueError(
                            f"A tile of {some.shape[2]} x {some.shape[3]} pixels gives {new.shape[1]} rows, and the "
                            f"prompt has {expected} for each; let the image processor cut the tiles."
                        )
                    rows = torch.cat([rows, new.flatten(0, 1)])
                images = {"image": BaseModelOutputWithPooling(pooler_output=rows[:wanted])} if wanted else None
                rows = rows[wanted:]
                model.model(input_ids=piece, past_key_values=self.cache, use_cache=True, mm_encoder_outputs=images)
                bar.update(piece.shape[1])

    def _ready(self) -> None:
        """Raises ValueError if the model was moved since it read; makes tensors of inference mode writable."""
        home = (self.model.device, self.model.dtype)
        if not self.ids:
            self.home = home
        if self.home != home:
            raise ValueError(
                f"The model was on {self.home[0]} in {self.home[1]} when it read this, now it is on {home[0]} in "
                f"{home[1]}; move it back, or save the conversation before and load it afterwards."
            )
        if not torch.is_inference_mode_enabled() and any(x.is_inference() for x in self._tensors().values()):
            for layer, linear in zip(self.cache.layers, self.cache.is_linear, strict=True):
                if linear:
                    states = layer.conv_states, layer.recurrent_states
                    layer.conv_states[0], layer.recurrent_states[0] = (state[0].clone() for state in states)
                else:
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    # --- going back -------------------------------------------------------------------------------------------------

    def _snapshot(self) -> tuple:
        """What cannot be undone by cutting: the states of Mamba-2 layers, and the length of what was read."""
        states = [
            [x.clone() for x in (layer.conv_states[0], layer.recurrent_states[0])]
            if linear and layer.has_previous_state[0]
            else None
            for layer, linear in zip(self.cache.layers, self.cache.is_linear, strict=True)
        ]
        return states, len(self.ids), self.pending, self.last, self.in_turn, self.turns

    def _go_back(self, snapshot: tuple) -> None:
        states, length, self.pending, self.last, self.in_turn, self.turns = snapshot
        del self.ids[length:]
        if length == 0:
            self.cache = self.model.new_cache()
            return
        self.cache.seen_tokens = length
        for layer, state in zip(self.cache.layers, states, strict=True):
            if state is None:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            else:
                layer.conv_states[0].copy_(state[0])
                layer.recurrent_states[0].copy_(state[1])

    @contextmanager
    def _undone_on_failure(self):
        before = self._snapshot()
        try:
            yield
        except BaseException:
            self._go_back(before)
            raise

    # --- files ------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        if not self.ids:
            return tensors
        for index, (layer, linear) in enumerate(zip(self.cache.layers, self.cache.is_linear, strict=True)):
            if linear:
                found = {"conv_state": layer.conv_states[0], "recurrent_state": layer.recurrent_states[0]}
            else:
                found = {"keys": layer.keys, "values": layer.values}
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in found.items()}
        return tensors

    def _maker(self) -> dict:
        """What must be the same where a state is loaded: architecture, tokenizer, template, some of the weights."""
        text, weights = self.model.config.text_config, hashlib.blake2b(digest_size=16)
        some = [self.model.model.norm.weight, self.model.model.embed_tokens.weight[:64].flatten()]
        for layer in self.model.model.layers:
            is_linear = layer.layer_type == "linear_attention"
            trained = [layer.mamba.A_log, layer.mamba.dt_bias] if is_linear else [layer.self_attn.q_proj.weight[0]]
            some += [layer.post_attention_layernorm.weight, *trained]
        here = [x for x in some if not x.is_meta]  # the rest is offloaded to a disk
        some = torch.cat([x.detach().to("cpu", torch.bfloat16) for x in here])
        weights.update(some.view(torch.uint8).numpy().tobytes())
        words = hashlib.blake2b(json.dumps([self._pieces, len(self.tokenizer)]).encode(), digest_size=16)
        names = ("hidden_size", "layer_types", "num_attention_heads", "num_key_value_heads", "head_dim", "conv_kernel")
        described = {name: getattr(text, name) for name in names}
        return described | {"weights": weights.hexdigest(), "tokenizer or template": words.hexdigest()}

    def signature(self) -> tuple:
        """Changes when the model is trained, loaded or moved: what it has read fits no longer then."""
        return self.model.device, self.model.dtype, tuple(self._maker().items())

    def save(self, file: str | Path) -> None:
        """Writes the state as one safetensors file, whole or not at all.

        Raises:
            ValueError: if there is no folder for it, or a folder of its name.
        """
        file = Path(file)
        if not file.resolve().parent.is_dir() or file.is_dir():
            raise ValueError(f"{file} cannot be written: its folder must exist, and it must not be one.")
        described = {
            "format": FORMAT,
            "maker": self._maker(),
            "system_message": self.system_message,
            "last": self.last,
            "pending": self.pending,
            "in_turn": self.in_turn,
            "turns": self.turns,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        tensors["ids"] = torch.tensor(self.ids, dtype=torch.int32)
        unfinished = file.with_name(f".{file.name}.unfinished")
        try:
            save_file(tensors, unfinished, {"mmmamba": json.dumps(described)})
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path, model, tokenizer) -> "ConversationState":
        """A saved state, on `model`'s device.

        Raises:
            ValueError: if the file is no saved conversation, or another model's.
        """
        try:
            with safe_open(file, "pt", device=str(model.device)) as opened:
                described = json.loads((opened.metadata() or {}).get("mmmamba", "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        except FileNotFoundError:
            raise ValueError(f"{file} does not exist; give a file that ConversationState.save wrote.") from None
        except OSError as error:
            raise ValueError(
                f"{file} cannot be read ({error}); give a file that ConversationState.save wrote."
            ) from None
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); save the conversation again."
            ) from None
        if described.get("format") != FORMAT:
            raise ValueError(f"{file} is no saved conversation; give a file that ConversationState.save wrote.")
        state = cls(model, tokenizer, described["system_message"])
        maker = state._maker()
        if described["maker"] != maker:
            differing = sorted(name for name in maker if described["maker"].get(name) != maker[name])
            raise ValueError(
                f"{file} is another model's conversation ({', '.join(differing)} differ); load that model."
            )
        state._check(tensors, file)
        state.ids = tensors.pop("ids").tolist()
        for name in ("last", "pending", "in_turn", "turns"):
            setattr(state, name, described[name])
        for index in range(len(state.cache.layers) if state.ids else 0):
            found = {name.split(".")[2]: x for name, x in tensors.items() if name.startswith(f"layers.{index}.")}
            if "keys" in found:
                state.cache.update(found["keys"].to(model.dtype), found["values"].to(model.dtype), index)
            else:
                state.cache.update_conv_state(found["conv_state"].to(model.dtype), index)
                state.cache.update_recurrent_state(found["recurrent_state"], index)
        state.cache.seen_tokens = len(state.ids)
        state.home = (model.device, model.dtype)
        return state

    def _check(self, tensors: dict[str, Tensor], file: str | Path) -> None:
        """Raises ValueError unless these are the tensors that `save` writes for this model."""
        text = self.model.config.text_config
        heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        expected = {"ids": list(tensors["ids"].shape[:1]) if "ids" in tensors else [0]}
        read = expected["ids"][0]
        for index, kind in enumerate(text.layer_types if read else ()):
            if kind == "linear_attention":
                expected[f"layers.{index}.conv_state"] = [1, (heads + 2 * kv_heads) * size, text.conv_kernel - 1]
                expected[f"layers.{index}.recurrent_state"] = [1, heads, size, size]
            else:
                names = (f"layers.{index}.{name}" for name in ("keys", "values"))
                expected |= {name: [1, kv_heads, read, size] for name in names}
        if {name: list(tensor.shape) for name, tensor in tensors.items()} != expected:
            raise ValueError(f"{file} does not hold the tensors of a whole conversation; save the conversation again.")


def rows_of(model, options: dict) -> int:
    """How many rows `generate` makes of one prompt: beams, or answers."""
    defaults = options.get("generation_config", model.generation_config)
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(defaults, name, None) or 1 for name in names)


class History(list):
    """The (question, answer) pairs of a conversation, with the state that has read them.

    A plain list to whoever copies, compares or stores it; handed back to `chat`, nothing is read twice.
    """

    def __init__(self, turns: list[tuple[str, str]], state: ConversationState, counts: list[int], pictures: bytes):
        super().__init__(turns)
        self.kept = (state, tuple(turns), tuple(counts), pictures, state.signature())

    def __reduce__(self):
        return list, (list(self),)


def resume(
    model,
    tokenizer,
    history: list[tuple[str, str]] | None,
    pixel_values: Tensor | None,
    num_patches_list: list[int],
    system_message: str | None,
) -> tuple[ConversationState, int]:
    """A state that has read `history`, kept from an earlier call or read now, and how many pictures it has seen."""
    if isinstance(history, History) and history.kept is not None:
        state, turns, counts, pictures, signature = history.kept
        seen = None if pixel_values is None else pixel_values[: sum(counts)]
        if (
            state.model is model
            and state.tokenizer is tokenizer
            and state.system_message == system_message
            and turns == tuple(history)
            and counts == tuple(num_patches_list[: len(counts)])
            and pictures == fingerprint(seen)
            and signature == state.signature()
        ):
            history.kept = None  # the state goes on; whoever asks this history again has it read again
            return state, len(counts)
    state, pictures, tiles = ConversationState(model, tokenizer, system_message), 0, 0
    for question, answer in history or []:
        counts = num_patches_list[pictures : pictures + question.count(PLACEHOLDER)]
        of_turn = pixel_values[tiles : tiles + sum(counts)] if counts else None
        state.tell(question, answer, of_turn, counts)
        pictures, tiles = pictures + len(counts), tiles + sum(counts)
    return state, pictures


def fingerprint(pixel_values: Tensor | None) -> bytes:
    """Tells the pictures of one call of `chat` from those of another."""
    if pixel_values is None or not len(pixel_values):
        return b""
    return hashlib.blake2b(pixel_values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).digest()
