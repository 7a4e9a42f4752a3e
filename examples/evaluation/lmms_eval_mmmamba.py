"""mmMamba in lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), written for version 0.7.

Copy this file to `lmms_eval/models/simple/mmmamba.py`, add one line to `AVAILABLE_SIMPLE_MODELS` in
`lmms_eval/models/__init__.py`,

    "mmmamba": "MmMamba",

and run `python -m lmms_eval --model mmmamba --model_args pretrained=user/name-or-folder --tasks mme --batch_size 8`.

The model's code is loaded with it from its folder or the Hub; the package mmmamba need not be installed.
"""

import os

import torch
from lmms_eval import utils
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor


PLACEHOLDER = "<image>"
# Generation arguments of a task that are passed on to `generate`; others are meant for other models.
GENERATION_ARGUMENTS = ("max_new_tokens", "num_beams", "top_p", "top_k", "repetition_penalty", "length_penalty")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


@register_model("mmmamba")
class MmMamba(lmms):
    """A model folder of mmMamba: teacher, linear or hybrid.

    Args:
        pretrained: Model folder, or its name on the Hub.
        device: Such as "cpu"; if not given, a GPU if there is one, and each process its own of several.
        batch_size: Questions answered at once.
        dtype: Of the weights; if not given, as they are stored on a GPU, float32 on a CPU.
        max_new_tokens: Longest answer in tokens, for tasks that do not set it.
        max_batch_size: Not used; lmms-eval passes it to every model.

    Raises:
        ValueError: if `batch_size` is no number, or the model reads text only.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str | None = None,
        max_new_tokens: int = 1024,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} cannot be used; give a number of at least 1.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
        # Many CPUs have no instructions for half precision.
        dtype = dtype or ("float32" if self.device.type == "cpu" else "auto")
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        if getattr(self.processor, "image_processor", None) is None:
            raise ValueError(f"{pretrained} reads text only; score it with lm-evaluation-harness instead.")
        self.model = AutoModel.from_pretrained(pretrained, dtype=dtype, trust_remote_code=True).to(self.device).eval()
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers requests.

        Args:
            requests: Their arguments are (question, generation arguments, function from a document to its pictures,
                document number, task, split).

        Raises:
            ValueError: for videos.
        """
        ordered = utils.Collator([request.args for request in requests], lambda x: -len(x[0]), grouping=True)
        answers = []
        with self._progress(len(requests)) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                questions, arguments = [request[0] for request in batch], batch[0][1]  # batches share arguments
                pictures = [to_pictures(self._document(*place)) for _, _, to_pictures, *place in batch]
                batch_answers = self._answer(questions, pictures, arguments)
                for question, answer in zip(questions, batch_answers, strict=True):
                    self.cache_hook.add_partial("generate_until", (question, arguments), answer)
                answers += batch_answers
                bar.update(len(batch))
        return ordered.get_original(answers)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers requests whose task asks another question after each answer.

        The model sees the question of a round without the earlier ones.

        Args:
            requests: Their arguments are those of `generate_until` with one more after the pictures: a function of
                (document, earlier answers, number of the round, information from the round before) that returns the
                round's pictures and question, whether to stop, all answers, and information for the next round.

        Returns:
            The answers of all rounds, for each request.
        """
        ordered = utils.Collator([request.args for request in requests], lambda x: -len(x[0]), grouping=True)
        results = []
        with self._progress(len(requests)) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                conversations = [_Conversation(self._document(*request[4:]), request) for request in batch]
                unfinished = conversations
                while unfinished:
                    questions, pictures = [c.question for c in unfinished], [c.pictures for c in unfinished]
                    answers = self._answer(questions, pictures, batch[0][1])
                    unfinished = [c for c, answer in zip(unfinished, answers, strict=True) if c.next_round(answer)]
                for conversation in conversations:
                    arguments = conversation.request[:2]
                    self.cache_hook.add_partial("generate_until_multi_round", arguments, conversation.answers)
                results += [conversation.answers for conversation in conversations]
                bar.update(len(batch))
        return ordered.get_original(results)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log probabilities of answers.

        Args:
            requests: Their arguments are (question, answer or function from a document to it, function from a
                document to its pictures, document number, task, split), or (question, answer) alone.

        Returns:
            For each request the log probability of the answer, without the end of its turn, and whether greedy
            decoding would give it.
        """
        results = []
        with self._progress(len(requests)) as bar:
            for question, answer, *rest in [request.args for request in requests]:
                pictures = []
                if rest:
                    to_pictures, *place = rest
                    document = self._document(*place)
                    pictures = to_pictures(document)
                    answer = answer(document) if callable(answer) else answer
                results.append(self._log_probability(question, pictures, str(answer)))
                bar.update()
        return results

    def _log_probability(self, question: str, pictures, answer: str) -> tuple[float, bool]:
        pictures = _flatten(pictures)
        content = [{"type": "image", "image": picture} for picture in pictures]
        if text := question.replace(PLACEHOLDER, "").strip():
            content.append({"type": "text", "text": text})
        user = [{"role": "user", "content": content}] if content else []

        def encode(answer: str):
            # Tasks put a space before an answer, but here it starts a turn.
            turns = [*user, {"role": "assistant", "content": answer.strip()}]
            return self.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")

        # The template renders an empty answer like the prompt of an answer to be generated.
        inputs, start = encode(answer).to(self.device), encode("")["input_ids"].shape[1]
        targets = inputs["input_ids"][0, start:-1]  # without <|im_end|>
        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=len(targets) + 2).logits[0, :-2].float()
        log_probabilities = logits.log_softmax(-1).gather(-1, targets[:, None])
        return log_probabilities.sum().item(), bool((logits.argmax(-1) == targets).all())

    def _answer(self, questions, pictures, arguments: dict) -> list[str]:
        """Answers a batch of questions about their own pictures; answers end before a string of `until`."""
        pictures = [_flatten(row) for row in pictures]
        questions = [_with_placeholders(question, len(row)) for question, row in zip(questions, pictures, strict=True)]
        tiles, counts = None, []
        if all_pictures := _flatten(pictures):
            vision = self.processor.image_processor(all_pictures, return_tensors="pt")
            tiles, counts = vision["pixel_values"], vision["num_patches"].tolist()
        counts = iter(counts)
        num_patches_list = [[next(counts) for _ in row] for row in pictures]
        with torch.inference_mode():
            answers = self.model.batch_chat(
                self.processor.tokenizer,
                tiles,
                questions,
                self._generation_options(arguments),
                num_patches_list=num_patches_list,
            )
        until = arguments.get("until") or []
        ends = [until] if isinstance(until, str) else [end for end in until if end]
        for end in ends:
            answers = [answer.split(end)[0].strip() for answer in answers]
        return answers

    def _generation_options(self, arguments: dict) -> dict:
        """Arguments of `generate` from a task's; as everywhere in lmms-eval, a temperature of 0 means greedy."""
        options = {key: arguments[key] for key in GENERATION_ARGUMENTS if arguments.get(key) is not None}
        options.setdefault("max_new_tokens", self.max_new_tokens)
        temperature = arguments.get("temperature") or 0
        options["do_sample"] = bool(arguments.get("do_sample", temperature > 0) and arguments.get("temperature") != 0)
        if options["do_sample"] and temperature:
            options["temperature"] = temperature
        if not options["do_sample"]:
            for name in ("top_p", "top_k"):
                options.pop(name, None)
        return options

    def _document(self, number, task: str, split: str):
        return self.task_dict[task][split][number]

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self.rank != 0, desc="Model Responding")


class _Conversation:
    """A request of several rounds, with the pictures and the question of its current round."""

    def __init__(self, document, request: tuple):
        self.document, self.request = document, request
        self.question, _, to_pictures, self.ask_task, *_ = request
        self.pictures, self.answers, self.round_info = to_pictures(document), [], None

    def next_round(self, answer: str) -> bool:
        """Gives the answer to the task; returns whether there is another round."""
        self.answers.append(answer)
        self.pictures, self.question, stop, answers, self.round_info = self.ask_task(
            self.document,
            previous_output=list(self.answers),
            round_idx=len(self.answers),
            previous_round_info=self.round_info,
        )
        self.answers = list(answers)
        return not stop


def _flatten(pictures) -> list:
    """A picture, or nested lists of pictures, as a flat list; None is no picture. Raises ValueError for videos."""
    if pictures is None:
        return []
    flat = []
    for picture in pictures if isinstance(pictures, (list, tuple)) else [pictures]:
        flat += _flatten(picture) if isinstance(picture, (list, tuple)) else [] if picture is None else [picture]
    if videos := [str(x) for x in flat if str(x).lower().endswith(VIDEO_SUFFIXES)]:
        raise ValueError(f"{videos[0]} is a video, which mmMamba does not read; choose tasks with pictures.")
    return flat


def _with_placeholders(question: str, num_pictures: int) -> str:
    """A question with one `<image>` per picture: where the task put them, else in front."""
    if question.count(PLACEHOLDER) == num_pictures:
        return question
    question = question.replace(PLACEHOLDER, "").strip()
    return PLACEHOLDER * num_pictures + "\n" + question if num_pictures else question
