"""mmMamba in lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), written for version 0.7.

Copy this file to `lmms_eval/models/simple/mmmamba.py`, add one line to `AVAILABLE_SIMPLE_MODELS` in
`lmms_eval/models/__init__.py`,

    "mmmamba": "MmMamba",

and run `python -m lmms_eval --model mmmamba --model_args pretrained=user/name-or-folder --tasks mme --batch_size 8`.

The model brings its own code from its folder or from the Hub; the package mmmamba need not be installed.
"""

import os

import torch
from lmms_eval import utils
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor


IMAGE = "<image>"
# Of a task's generation arguments, those that `generate` is given; others are meant for other models.
GENERATION = ("max_new_tokens", "num_beams", "top_p", "top_k", "repetition_penalty", "length_penalty")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


@register_model("mmmamba")
class MmMamba(lmms):
    """A model folder of mmMamba: teacher, linear or hybrid.

    Args:
        pretrained: Model folder, or its name on the Hub.
        device: Where it runs; a GPU if there is one, each process of several on its own.
        batch_size: Questions answered at once.
        dtype: Of the weights; as they are stored on a GPU, float32 on a processor, if not given.
        max_new_tokens: Longest answer, in tokens, where a task does not say.
        max_batch_size: Not used; lmms-eval gives it to every model.

    Raises:
        ValueError: if `batch_size` is no number.
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
        # Many processors have no instructions for half precision; fp32 runs well on all.
        dtype = dtype or ("float32" if self.device.type == "cpu" else "auto")
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(pretrained, dtype=dtype, trust_remote_code=True).to(self.device).eval()
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers requests with arguments (question, generation arguments, pictures of a document, document, task,
        split). Raises ValueError for videos."""
        ordered = utils.Collator([request.args for request in requests], lambda x: -len(x[0]), grouping=True)
        answers = []
        with self._progress(len(requests)) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                questions, arguments, to_pictures, *places = zip(*batch, strict=True)
                documents = [self._document(*place) for place in zip(*places, strict=True)]
                pictures = [
                    pictures_of(document) for pictures_of, document in zip(to_pictures, documents, strict=True)
                ]
                # The collator puts requests with the same generation arguments together.
                new = self._answers(questions, pictures, arguments[0])
                for question, answer in zip(questions, new, strict=True):
                    self.cache_hook.add_partial("generate_until", (question, arguments[0]), answer)
                answers += new
                bar.update(len(batch))
        return ordered.get_original(answers)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers requests whose task asks on after each answer.

        Their arguments have, after the pictures, a function of (document, earlier answers, number of the round, and
        what it returned before) that gives the round's pictures and question, whether to stop, all answers, and what
        it wants to be given next time. A round's question stands alone; earlier ones are not shown to the model.

        Returns:
            The answers of all rounds, for each request.
        """
        ordered = utils.Collator([request.args for request in requests], lambda x: -len(x[0]), grouping=True)
        results = []
        with self._progress(len(requests)) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                open_ones = [_Conversation(self._document(*request[4:]), request) for request in batch]
                conversations = list(open_ones)
                while open_ones:
                    questions, pictures = [one.question for one in open_ones], [one.pictures for one in open_ones]
                    new = self._answers(questions, pictures, batch[0][1])
                    open_ones = [one for one, answer in zip(open_ones, new, strict=True) if one.goes_on(answer)]
                for one in conversations:
                    self.cache_hook.add_partial("generate_until_multi_round", one.request[:2], one.answers)
                results += [one.answers for one in conversations]
                bar.update(len(batch))
        return ordered.get_original(results)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Scores answers to requests with arguments (question, answer or function of the document, pictures of a
        document, document, task, split), or (question, answer) alone.

        Returns:
            The log probability of the answer as the whole of what follows the question, end of turn not counted, and
            whether it is what the model would say.
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
                results.append(self._score(question, pictures, str(answer)))
                bar.update()
        return results

    def _score(self, question: str, pictures, answer: str) -> tuple[float, bool]:
        pictures = _pictures(pictures)
        content = [{"type": "image", "image": picture} for picture in pictures]
        if text := question.replace(IMAGE, "").strip():
            content.append({"type": "text", "text": text})
        user = [{"role": "user", "content": content}] if content else []

        def encoded(said: str):
            # Tasks put a space before an answer; here it begins its turn.
            turns = [*user, {"role": "assistant", "content": said.strip()}]
            return self.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")

        # Without an answer the turn is open, as it is for generation.
        inputs, start = encoded(answer).to(self.device), encoded("")["input_ids"].shape[1]
        targets = inputs["input_ids"][0, start:-1]  # the last one ends the turn
        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=len(targets) + 2).logits[0, :-2].float()
        chosen = logits.log_softmax(-1).gather(-1, targets[:, None])
        return chosen.sum().item(), bool((logits.argmax(-1) == targets).all())

    def _answers(self, questions, pictures, arguments: dict) -> list[str]:
        """Answers several questions at once, each about its own pictures, and ends them where the task says."""
        pictures = [_pictures(row) for row in pictures]
        questions = [_with_places(question, len(row)) for question, row in zip(questions, pictures, strict=True)]
        tiles, counts = None, []
        if flat := [picture for row in pictures for picture in row]:
            vision = self.processor.image_processor(flat, return_tensors="pt")
            tiles, counts = vision["pixel_values"], vision["num_patches"].tolist()
        counts = iter(counts)
        per_question = [[next(counts) for _ in row] for row in pictures]
        with torch.inference_mode():
            answers = self.model.batch_chat(
                self.processor.tokenizer, tiles, questions, self._options(arguments), num_patches_list=per_question
            )
        until = arguments.get("until") or []
        ends = [until] if isinstance(until, str) else [end for end in until if end]
        for end in ends:
            answers = [answer.split(end)[0].strip() for answer in answers]
        return answers

    def _options(self, arguments: dict) -> dict:
        """Arguments of `generate` from a task's; a temperature of 0 means greedy, as everywhere in lmms-eval."""
        options = {key: arguments[key] for key in GENERATION if arguments.get(key) is not None}
        options.setdefault("max_new_tokens", self.max_new_tokens)
        temperature = arguments.get("temperature") or 0
        options["do_sample"] = bool(arguments.get("do_sample", temperature > 0) and arguments.get("temperature") != 0)
        if options["do_sample"]:
            options |= {"temperature": temperature} if temperature else {}
        else:
            options = {key: value for key, value in options.items() if key not in ("top_p", "top_k")}
        return options

    def _document(self, number, task: str, split: str):
        return self.task_dict[task][split][number]

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self.rank != 0, desc="Model Responding")


class _Conversation:
    """One request of several rounds."""

    def __init__(self, document, request: tuple):
        self.document, self.request, self.ask = document, request, request[3]
        self.question, self.pictures = request[0], request[2](document)
        self.answers, self.info = [], None

    def goes_on(self, answer: str) -> bool:
        """Takes the answer, and asks for the next round."""
        self.answers.append(answer)
        self.pictures, self.question, stop, answers, self.info = self.ask(
            self.document,
            previous_output=list(self.answers),
            round_idx=len(self.answers),
            previous_round_info=self.info,
        )
        self.answers = list(answers)
        return not stop


def _pictures(pictures) -> list:
    """Pictures as a flat list of PIL images and paths."""
    if pictures is None:
        return []
    flat = []
    for picture in pictures if isinstance(pictures, (list, tuple)) else [pictures]:
        flat += _pictures(picture) if isinstance(picture, (list, tuple)) else [] if picture is None else [picture]
    if videos := [str(x) for x in flat if str(x).lower().endswith(VIDEOS)]:
        raise ValueError(f"{videos[0]} is a video, which mmMamba does not look at; choose tasks with pictures.")
    return flat


def _with_places(question: str, pictures: int) -> str:
    """A question with `<image>` for each picture: where the task put it, or else in front."""
    if question.count(IMAGE) == pictures:
        return question
    question = question.replace(IMAGE, "").strip()
    return IMAGE * pictures + "\n" + question if pictures else question
