"""Answers to the questions of MT-Bench by a model: both turns, a batch at a time, at the benchmark's temperatures."""

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


class AnswerWriter:
    """Answers questions by batches. What one is answered does not depend on the others: each has its own generator.

    A token is drawn as the largest of logit / temperature + Gumbel noise, which is sampling by temperature; no other
    setting of sampling applies. Batches change the last bits of logits, so a draw may turn where two tokens are next to
    equal.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, max_new_tokens: int):
        self._model, self._tokenizer, self._seed, self._max_new_tokens = model, tokenizer, seed, max_new_tokens
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id
        self._ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        self.too_long = 0  # turns without an answer

    def answer(self, questions: Sequence[dict]) -> list[list[str]]:
        """The answers to both turns of each question."""
        chats = [[] for _ in questions]
        for turn in (1, 2):
            for chat, question in zip(chats, questions, strict=True):
                chat.append({"role": "user", "content": question["turns"][turn - 1]})
            for chat, text in zip(chats, self._answer_turn(questions, chats, turn), strict=True):
                chat.append({"role": "assistant", "content": text})
        return [[chat[1]["content"], chat[3]["content"]] for chat in chats]

    def _answer_turn(self, questions: Sequence[dict], chats: list[list[dict]], turn: int) -> list[str]:
        prompts = []
        for chat in chats:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompts.append(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        texts, together = [""] * len(prompts), []
        for index, prompt in enumerate(prompts):
            room = self._max_new_tokens if self._positions is None else self._positions - len(prompt)
            if room >= self._max_new_tokens:
                together.append(index)
            elif room > 0:  # alone, as a batch has one length for all
                texts[index] = self._generate([prompt], [questions[index]], turn, room)[0]
            else:
                self.too_long += 1
        if together:
            chosen = [prompts[index] for index in together], [questions[index] for index in together]
            for index, text in zip(together, self._generate(*chosen, turn, self._max_new_tokens), strict=True):
                texts[index] = text
        return texts

    def _generate(self, prompts: list[list[int]], questions: list[dict], turn: int, max_new_tokens: int) -> list[str]:
        device, width = self._model.device, max(map(len, prompts))
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0]
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        draws = []
        for question in questions:
            digest = hashlib.sha256(f"{self._seed} {question['question_id']} {turn}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
            draws.append((TEMPERATURES[question["category"]], generator))
        with torch.no_grad():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._ends,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([_Draw(draws)]),
            )
        texts = self._tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]


class _Draw(LogitsProcessor):
    """Makes the largest score that of a token drawn by temperature; each row has a temperature and a generator."""

    def __init__(self, draws: list[tuple[float, torch.Generator]]):
        self._draws = draws

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (rows, tokens), in fp32."""
        drawn = scores.clone()
        for row, (temperature, generator) in enumerate(self._draws):
            if temperature > 0:
                exponential = torch.empty_like(scores[row]).exponential_(generator=generator)
                drawn[row] = scores[row] / temperature - exponential.clamp_min(1e-30).log()
        return drawn
