"""A checkpoint of ours as a language model of lm-evaluation-harness.

Tokenizer, prefix, truncation and windows are those of the harness's `hf` backend on the exported folder, so both give
the same numbers. Shapes: B requests, T tokens, N tokens of an answer, V vocabulary.
"""

import torch
import torch.nn.functional as F
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megacocomix.errors import UserError

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts (unused), the tokens that are read, and the tokens that are scored."""


class NativeLM(TemplateLM):
    """`model` maps int64 tokens [B, T] to (logits [B, T, V], anything) and reads up to `context` tokens."""

    def __init__(
        self, model: nn.Module, context: int, tokenizer: PreTrainedTokenizerBase, batch: int, device: torch.device
    ):
        super().__init__()
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.batch = batch
        self._device = device
        self._context = context

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self._context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids, with what the tokenizer adds by itself unless `add_special_tokens` says otherwise; a text that
        begins with the prefix gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of its answer, and whether greedy decoding would give it."""
        # The longest first: what does not fit the memory fails at once, and a batch has little padding.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(order), desc="scoring", unit="request", disable=disable_tqdm or None) as progress:
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                for index, score in zip(chosen, self._score([requests[index] for index in chosen]), strict=True):
                    found[index] = score
                progress.update(len(chosen))
        return found

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """The same for one batch."""
        rows = []
        for _, context, answer in requests:
            if len(answer) > self.max_length:
                raise UserError(f"an answer of {len(answer)} tokens does not fit the context of {self.max_length}.")
            # What is too long loses its beginning; the last token is only predicted.
            rows.append(torch.tensor((context + answer)[-(self.max_length + 1) : -1]))
        # Padding on the right: the model is causal, so what is before it does not see it.
        tokens_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
        logits_BTV = self.model(tokens_BT)[0]
        return [
            _answer_score(logits_TV[: len(row)], answer)
            for logits_TV, row, (_, _, answer) in zip(logits_BTV, rows, requests, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, cut into windows of up to `max_length` tokens that share none."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in rolling:
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises UserError: a checkpoint of ours only scores."""
        raise UserError(
            "this task has the model write text, and a checkpoint of ours only scores text here: export it with "
            "tools/convert_checkpoint.py --to hf and evaluate the folder."
        )


def _answer_score(logits_TV: Tensor, answer: list[int]) -> tuple[float, bool]:
    """The log-probability of the tokens that the last N rows predict, and whether each is the most probable."""
    log_probs_NV = F.log_softmax(logits_TV[-len(answer) :].float(), dim=-1)
    answer_N = torch.tensor(answer, device=logits_TV.device)
    log_prob = log_probs_NV.gather(-1, answer_N[:, None]).sum().item()
    return log_prob, bool((log_probs_NV.argmax(-1) == answer_N).all())
