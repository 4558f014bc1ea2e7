"""A model's answers to questions of MT-Bench: both turns, in batches, at the temperatures of the benchmark."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.turns import as_taken, takes_parts

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
    """Answers questions in batches. An answer does not depend on its batch: each question has its own generator.

    A token is the argmax of logit / temperature + Gumbel noise, which samples at that temperature; no other sampling
    setting applies. The batch size changes the last bits of logits, which may decide between two nearly equal tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, max_new_tokens: int):
        self._model: Any = model  # its type does not declare `generate`
        self._tokenizer, self._seed, self._max_new_tokens = tokenizer, seed, max_new_tokens
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id
        self._ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        self.num_too_long = 0  # turns without an answer, as their prompt fills the context

    def answer(self, questions: Sequence[dict]) -> list[list[str]]:
        """The answers to both turns of each question."""
        chats: list[list[dict]] = [[] for _ in questions]
        for turn in (1, 2):
            for chat, question in zip(chats, questions, strict=True):
                chat.append({"role": "user", "content": question["turns"][turn - 1]})
            for chat, text in zip(chats, self._answer_turn(questions, chats, turn), strict=True):
                chat.append({"role": "assistant", "content": text})
        return [[chat[1]["content"], chat[3]["content"]] for chat in chats]

    def _answer_turn(self, questions: Sequence[dict], chats: list[list[dict]], turn: int) -> list[str]:
        prompts, parts = [], takes_parts(self._tokenizer)
        for chat in chats:
            turns = as_taken(chat, parts)
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            prompts.append(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        texts, batch = [""] * len(prompts), []
        for index, prompt in enumerate(prompts):
            room = self._max_new_tokens if self._positions is None else self._positions - len(prompt)
            if room >= self._max_new_tokens:
                batch.append(index)
            elif room > 0:  # by itself: a batch has one limit for all
                texts[index] = self._generate([prompt], [questions[index]], turn, room)[0]
            else:
                self.num_too_long += 1
        if batch:
            chosen = [prompts[index] for index in batch], [questions[index] for index in batch]
            for index, text in zip(batch, self._generate(*chosen, turn, self._max_new_tokens), strict=True):
                texts[index] = text
        return texts

    def _generate(self, prompts: list[list[int]], questions: list[dict], turn: int, max_new_tokens: int) -> list[str]:
        device, width = self._model.device, max(map(len, prompts))
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0]
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        samplings = []
        for question in questions:
            digest = hashlib.sha256(f"{self._seed} {question['question_id']} {turn}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
            samplings.append((TEMPERATURES[question["category"]], generator))
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
                logits_processor=LogitsProcessorList([SampleByTemperature(samplings)]),
            )
        texts = self._tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]


class SampleByTemperature(LogitsProcessor):
    """Makes the sampled token's score the largest. Each sequence has a temperature and a generator; 0 is greedy."""

    def __init__(self, samplings: list[tuple[float, torch.Generator]]):
        self._samplings = samplings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (sequences, vocabulary), in fp32."""
        noisy = scores.clone()
        for index, (temperature, generator) in enumerate(self._samplings):
            if temperature > 0:
                exponential = torch.empty_like(scores[index]).exponential_(generator=generator)
                noisy[index] = scores[index] / temperature - exponential.clamp_min(1e-30).log()
        return noisy
